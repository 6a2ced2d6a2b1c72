"""What must hold for the blocks of ragged rows."""

from collections.abc import Sequence

import torch

from pikv.cache.block import RowBlock


def check_blocks(blocks: Sequence[RowBlock], seen: Sequence[int], num_kv_heads: int, *, with_values: bool = True) -> None:
    """Raises AssertionError unless every row lies in one block, within its capacity, with ascending positions.

    ``seen`` says how many tokens each sequence of the batch has seen, ``with_values`` whether keys and values are read, too.
    """
    row_ids = sorted(row for block in blocks for row in block.row_ids)
    assert row_ids == list(range(len(seen) * num_kv_heads)), f"rows lost or shared: {row_ids}"
    assert len({(block.tail.dtype, block.tail.key_dim, block.tail.value_dim) for block in blocks}) == 1, "unlike rows"
    for block in blocks:
        block.check_integrity(with_values=with_values)
        seen_by_row = [seen[row // num_kv_heads] for row in block.row_ids]
        assert block.has_positions or all(block.length == number for number in seen_by_row), (
            "tokens are missing, and nothing says which"
        )
        if block.length == 0:
            continue
        positions = block.kept_positions()
        limit = torch.tensor(seen_by_row, device=positions.device)
        assert bool((positions[:, 0] >= 0).all() and (positions[:, -1] < limit).all()), "positions beyond what was seen"
