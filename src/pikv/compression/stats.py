"""What compressors did, added up."""

from __future__ import annotations

from typing import Any

import torch

from pikv.compression.tokens import Compressed, Tokens, lost_and_given, relative_error


class Tally:
    """Sums over calls; what they stand for is said by ``BaseCompressor.get_compression_stats``."""

    def __init__(self) -> None:
        self.calls = 0
        self.tokens_given = 0
        self.tokens_kept = 0
        self.bytes_given = 0
        self.bytes_stored = 0
        self._lost = torch.zeros(2, dtype=torch.float64)
        self._given = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def add(self, tokens: Tokens, found: Compressed) -> None:
        """Adds one call."""
        lost, given = lost_and_given(tokens, found)
        self.calls += 1
        self.tokens_given += tokens.keys[..., 0].numel()
        self.tokens_kept += found.kept.numel()
        self.bytes_given += tokens.nbytes
        self.bytes_stored += found.nbytes
        self._lost += lost
        self._given += given

    def summary(self, shared_bytes: int) -> dict[str, Any]:
        """The sums, and ``shared_bytes`` once, if there was a call."""
        stored = self.bytes_stored + (shared_bytes if self.calls else 0)
        return {
            "compression_ratio": 1 - stored / self.bytes_given if self.bytes_given else 0.0,
            "relative_error": relative_error(self._lost, self._given),
            "calls": self.calls,
            "tokens_given": self.tokens_given,
            "tokens_kept": self.tokens_kept,
            "bytes_given": self.bytes_given,
            "bytes_stored": stored,
        }


def table_of(stats: dict[str, Any]) -> str:
    """Statistics as lines of text: all, then each method."""
    rows = [("", "calls", "tokens kept", "bytes stored", "saved", "error")]
    for name, entry in {"all": stats, **stats["methods"]}.items():
        kept, given = entry["tokens_kept"], entry["tokens_given"]
        stored = f"{entry['bytes_stored']:,} of {entry['bytes_given']:,}"
        shares = (f"{entry['compression_ratio']:.1%}", f"{entry['relative_error']:.4f}")
        rows.append((name, str(entry["calls"]), f"{kept:,} of {given:,}", stored, *shares))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
