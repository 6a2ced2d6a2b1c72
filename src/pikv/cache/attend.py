"""Attention of new tokens over ragged rows that already hold their keys and values."""

from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.cache.block import RowBlock
from pikv.cache.rows import RaggedRows
from pikv.cache.tokens import TokenMask


def attend_rows(queries: Tensor, rows: RaggedRows, params: AttentionParams, mask: TokenMask | None = None) -> Tensor:
    """Attends from the newest tokens to everything that their rows hold.

    ``queries`` is ``[B, H, T, D]``, after RoPE; their own keys and values were appended to ``rows`` before, so the last of
    a row's tokens are the queries' own and the causal order is theirs. Padding, by ``mask``, gets zeros. KV heads are never
    expanded.

    Returns:
        ``[B, H, T, Dv]``
    """
    batch, num_heads, num_new, dim = queries.shape
    heads = rows.num_kv_heads
    queries = queries.reshape(batch * heads, num_heads // heads, num_new, dim)
    if len(rows.blocks) == 1 and mask is None:
        (block,) = rows.blocks
        return block.attend(queries, params.for_rows(block.row_ids, heads)).reshape(batch, num_heads, num_new, -1)
    parts: list[tuple[RowBlock, Tensor]] = []
    for block in rows.blocks:
        its_params = params.for_rows(block.row_ids, heads)
        if mask is None:
            parts.append((block, block.attend(queries[block.selector], its_params)))
            continue
        # Rows of one block have equally many tokens, though perhaps in different columns.
        sequences = [row // heads for row in block.row_ids]
        if count := mask.counts[sequences[0]]:
            columns = mask.columns_of(sequences, count)[:, None, :, None].expand(-1, queries.shape[1], -1, -1)
            picked = queries[block.selector].gather(2, columns.expand(-1, -1, -1, dim))
            attended = block.attend(picked, its_params)
            laid_out = attended.new_zeros((*attended.shape[:2], num_new, attended.shape[3]))
            parts.append((block, laid_out.scatter_(2, columns.expand(-1, -1, -1, attended.shape[3]), attended)))
    # Under torch.autocast attention has another data type than the queries.
    dtype = parts[0][1].dtype if parts else queries.dtype
    output = queries.new_zeros((*queries.shape[:3], rows.value_dim), dtype=dtype)
    for block, attended in parts:
        output[block.selector] = attended
    return output.view(batch, num_heads, num_new, -1)
