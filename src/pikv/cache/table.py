"""Where the tokens of every row lie, for kernels that serve rows of any length in one launch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv.cache.block import RowBlock


@dataclass(frozen=True, eq=False)
class RowTable:
    """The segments of every row, first to last; entries behind a row's last segment are 0. Valid until the rows change.

    Attributes:
        addresses: ``[R, S, A]`` (int64), of the row's part of each tensor that a segment stores (dense: keys, values), in the
            order of ``Segment.tensors``
        lengths: ``[R, S]`` (int32), tokens
        formats: ``[R, S]`` (int32), numbers in ``format_names``
        tails: ``[R]`` (int64), the number of each row's last segment, which grows
        format_names: the formats that occur
    """

    addresses: Tensor
    lengths: Tensor
    formats: Tensor
    tails: Tensor
    format_names: tuple[str, ...]

    @classmethod
    def of(cls, blocks: Sequence[RowBlock], num_rows: int) -> "RowTable":
        """The table of rows that lie in these blocks."""
        names = tuple(dict.fromkeys(segment.format for block in blocks for segment in block.segments))
        num_segments = max(len(block.segments) for block in blocks)
        num_tensors = max(len(segment.tensors) for block in blocks for segment in block.segments)
        addresses = torch.zeros((num_rows, num_segments, num_tensors), dtype=torch.long)
        lengths = torch.zeros((num_rows, num_segments), dtype=torch.int32)
        formats = torch.zeros((num_rows, num_segments), dtype=torch.int32)
        tails = torch.zeros(num_rows, dtype=torch.long)
        for block in blocks:
            rows = torch.tensor(block.row_ids)
            tails[rows] = len(block.segments) - 1
            for number, segment in enumerate(block.segments):
                lengths[rows, number] = segment.length
                formats[rows, number] = names.index(segment.format)
                members = torch.arange(len(rows))
                for place, tensor in enumerate(segment.tensors.values()):
                    stride = tensor.stride(0) * tensor.element_size()
                    addresses[rows, number, place] = tensor.data_ptr() + members * stride
        device = blocks[0].tail.location
        return cls(addresses.to(device), lengths.to(device), formats.to(device), tails.to(device), names)

    def grow(self, num_tokens: int) -> None:
        """Notes that every row got ``num_tokens`` tokens within its capacity."""
        rows = torch.arange(len(self.tails), device=self.tails.device)
        self.lengths[rows, self.tails] += num_tokens

    def check_integrity(self, expected: "RowTable") -> None:
        """Raises AssertionError unless this says what ``expected`` does."""
        for name in ("addresses", "lengths", "formats", "tails"):
            assert torch.equal(getattr(self, name), getattr(expected, name)), f"the table's {name} are out of date"
