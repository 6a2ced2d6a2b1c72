"""Views of one chunk of the true positions at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pikv.core import LayerView


def chunk_views(view: LayerView, size: int) -> Iterator[tuple[int, LayerView, Tensor]]:
    """Shows the layer as if it held nothing but one chunk of ``size`` true positions, for every chunk that holds a token.

    A chunk's queries are those of its own tokens. Where these came in earlier passes and are gone, the first ``size`` queries
    of the present pass stand in. What is given and budgeted is the chunk's share. The running state is that of the view.

    Yields:
        the chunk's first position, its view, and its tokens' numbers in the row, ``[B, G, n]`` (int64; ``L`` for no token)
    """
    columns_by_age = view.query_positions.argsort(dim=1, stable=True)  # padding first
    num_positions = int(view.seen.max())
    for start in range(0, num_positions, size):
        kept, slots = view.kept.within(start, min(start + size, num_positions))
        if slots.shape[2] == 0:
            continue
        columns, is_token, seen = _queries_of(view, columns_by_age, start, size)
        share = kept.lengths.double() / view.kept.lengths.clamp(min=1)
        yield (
            start,
            replace(
                view,
                call=replace(
                    view.call,
                    queries=_columns(view.queries, columns[:, None, :, None]),
                    hidden_states=_columns(view.hidden_states, columns[:, :, None]),
                    arguments=_arguments(view.arguments, columns),
                    is_token=is_token,
                    logsumexp=None,  # it is that of attention to all chunks
                ),
                kept=kept,
                seen=seen,
                num_given=(view.num_given * share).round().long(),
                budget=(view.budget * share).round().long(),
                reread=None if view.reread is None else _at(view.reread, slots).masked_fill(~kept.valid, 0.0),
            ),
            slots,
        )


def _at(values: Tensor, slots: Tensor) -> Tensor:
    """The entries ``[B, G, n]`` of ``values`` ``[B, G, L]``; any for slots that do not exist."""
    index = slots.clamp(max=values.shape[2] - 1)
    return values.gather(2, index)


def _queries_of(view: LayerView, columns_by_age: Tensor, start: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of a chunk's queries and which are real, ``[B, n]``; tokens seen up to the last of them, ``[B]`` (CPU)."""
    first = view.seen - view.is_token.sum(1).cpu()
    begin, end = first.clamp(min=start), view.seen.clamp(max=start + size)
    is_gone = end <= first
    begin = torch.where(is_gone, first, begin)
    end = torch.where(is_gone, torch.minimum(view.seen, first + size), end)
    places = begin.unsqueeze(1) + torch.arange(max(1, int((end - begin).max())))
    is_token = places < end.unsqueeze(1)
    num_columns = columns_by_age.shape[1]
    order = (num_columns - view.seen.unsqueeze(1) + places).clamp(min=0, max=num_columns - 1)
    return columns_by_age.gather(1, order.to(columns_by_age.device)), is_token.to(columns_by_age.device), end


def _columns(values: Tensor, columns: Tensor) -> Tensor:
    """The ``columns`` of ``values``, whose last but one dimension they are."""
    return values.gather(-2, columns.expand(*values.shape[:-2], -1, values.shape[-1]))


def _arguments(arguments: Mapping[str, Any], columns: Tensor) -> Mapping[str, Any]:
    """The arguments with the position embeddings of these columns."""
    embeddings: tuple[Tensor, ...] | None = arguments.get("position_embeddings")
    if not isinstance(embeddings, tuple):
        return arguments
    index = columns.unsqueeze(2)
    picked = tuple(_columns(table.expand(columns.shape[0], -1, -1), index) for table in embeddings)
    return {**arguments, "position_embeddings": picked}
