"""What a cache must hold and answer whose tokens are stored in formats: attention reads what the rows are decoded to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transcript import require

import pikv.hf.attention as seam
from pikv.attention.params import AttentionParams
from pikv.cache.rows import RaggedRows
from pikv.cache.tokens import TokenMask

Tokens = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Keys and values by layer and row."""


@contextmanager
def attention_compared() -> Iterator[None]:
    """Has every attention over rows compared with its twin over what these are decoded to."""
    attend = seam.attend_rows

    def attend_both(queries: Tensor, rows: RaggedRows, params: AttentionParams, mask: TokenMask | None = None) -> Tensor:
        found = attend(queries, rows, params, mask)
        expected = attend_decoded(queries, rows, params, mask)
        error = float((found - expected).abs().max()) if found.numel() else 0.0
        require(error <= 1e-4 * max(1.0, float(expected.abs().max())), f"attention is off by {error:.2g} from what is stored")
        return found

    seam.attend_rows = attend_both
    try:
        yield
    finally:
        seam.attend_rows = attend


def attend_decoded(queries: Tensor, rows: RaggedRows, params: AttentionParams, mask: TokenMask | None = None) -> Tensor:
    """Same signature and result as ``attend_rows``: one row at a time, over all its tokens at once, in float64."""
    batch, num_heads, num_new, _ = queries.shape
    group = num_heads // rows.num_kv_heads
    output = torch.zeros((batch, num_heads, num_new, rows.value_dim))
    for block in rows.blocks:
        for row, keys, values in zip(block.row_ids, *block.dense(), strict=True):
            b, g = divmod(row, rows.num_kv_heads)
            heads = slice(g * group, (g + 1) * group)
            columns = torch.arange(num_new) if mask is None else mask.is_token[b].nonzero().flatten()
            scores = queries[b, heads][:, columns].double() @ keys.double().T * params.scaling
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            own = len(keys) - len(columns) + torch.arange(len(columns))
            scores = scores.masked_fill(torch.arange(len(keys)) > own.unsqueeze(1), -torch.inf)
            if params.sinks is not None:
                scores = torch.cat([scores, params.sinks[heads].double().view(-1, 1, 1).expand(-1, len(columns), 1)], 2)
            weights = scores.softmax(2)[..., : len(keys)]
            output[b, heads.start : heads.stop, columns] = (weights @ values.double()).to(output.dtype)
    return output


def tokens_of(cache: Any) -> Tokens:
    """Copies of what all rows of a cache are decoded to."""
    return {
        (layer, row): (keys.clone(), values.clone())
        for layer in cache.ragged_layers
        if (rows := cache.layers[layer].rows) is not None
        for block in rows.blocks
        for row, keys, values in zip(block.row_ids, *block.dense(), strict=True)
    }


def selected(tokens: Tokens, sequences: list[int], num_kv_heads: int) -> Tokens:
    """Those of the given sequences, as the rows of a cache of their own."""
    rows = [sequence * num_kv_heads + head for sequence in sequences for head in range(num_kv_heads)]
    layers = dict.fromkeys(layer for layer, _ in tokens)
    return {(layer, new): tokens[layer, old] for layer in layers for new, old in enumerate(rows)}


def check_same(before: Tokens, cache: Any, what: str) -> None:
    """Requires that rows start as they did before; they may have become shorter or longer."""
    for key, (keys, values) in tokens_of(cache).items():
        if key not in before:
            continue
        for old, new in zip(before[key], (keys, values), strict=True):
            length = min(len(old), len(new))
            # Some formats are decoded by products, whose rounding depends on how many rows there are.
            is_same = torch.allclose(old[:length], new[:length], rtol=1e-5, atol=1e-5)
            require(is_same, f"{what} changed what is stored in layer {key[0]}, row {key[1]}")


def check_bytes(cache: Any) -> None:
    """Requires that the bytes of rows are those of all storages that they lie in."""
    for layer in cache.ragged_layers:
        rows = cache.layers[layer].rows
        if rows is None:
            continue
        tensors = [tensor for block in rows.blocks for segment in block.segments for tensor in segment.tensors.values()]
        tensors += [block._positions for block in rows.blocks if block.has_positions]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        counted, held = rows.nbytes, sum(storages.values())
        require(counted == held, f"layer {layer} says {counted} bytes, and holds {held}")
