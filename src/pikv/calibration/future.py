"""What later queries really read from a context, measured on the model itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pikv.core import AttentionCall, LayerView
from pikv.hf.cache import PiKVCache
from pikv.hf.hooks import observe
from pikv.hf.support import ragged_layers
from pikv.scoring.base import norms
from pikv.scoring.output import output_norms

_BLOCK_ELEMENTS = 1 << 22  # attention weights that exist at a time


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A context as tokens, what comes after it, and the tokens of the latter, by number, whose queries count."""

    context_ids: Sequence[int]
    later_ids: Sequence[int]
    asking: Sequence[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerReading:
    """One layer: the view of it when the context had been read, and what later queries took from each token, ``[G, T]``."""

    view: LayerView
    taken: Tensor


@torch.no_grad()
def read_lesson(model: Any, lesson: Lesson) -> list[LayerReading]:
    """Reads a context, then what comes after it, with the full cache.

    What a query takes from a token is its attention times the norm of what the token's value adds to the output of attention;
    of all queries that count, and of all query heads of a KV head, the most is taken. So nothing that is asked later is known
    to the view, and everything that was asked shows in ``taken``.
    """
    layers = ragged_layers(model.config)
    cache = PiKVCache(model.config)
    views: dict[int, LayerView] = {}
    taken: dict[int, Tensor] = {}

    def after_context(call: AttentionCall) -> None:
        layer = call.layer_idx
        views[layer] = LayerView.of(replace(call, state={}), rank=layers.index(layer), num_layers=len(layers))

    def after_questions(call: AttentionCall) -> None:
        taken[call.layer_idx] = _taken(views[call.layer_idx], call, lesson.asking)

    for token_ids, after_attention in ((lesson.context_ids, after_context), (lesson.later_ids, after_questions)):
        with observe(model, after_attention=after_attention):
            inputs = torch.tensor([list(token_ids)], device=model.device)
            model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [LayerReading(view=views[layer], taken=taken[layer]) for layer in layers]


def _taken(view: LayerView, call: AttentionCall, asking: Sequence[int]) -> Tensor:
    """The most that any of the ``asking`` queries took from each token of the context, ``[G, T]``."""
    keys = call.rows.kept().keys
    num_tokens = int(view.seen)
    carried = _norms_of_values(view)[0, :, :, :num_tokens]
    queries = call.queries[:, :, list(asking)]
    positions = torch.tensor(list(asking), device=keys.device) + num_tokens
    most = torch.zeros((keys.shape[1], num_tokens), device=keys.device)
    size = max(1, _BLOCK_ELEMENTS // (queries.shape[1] * keys.shape[2]))
    for start in range(0, len(asking), size):
        visible = torch.arange(keys.shape[2], device=keys.device) <= positions[start : start + size, None]
        weights = call.params.weights(queries[:, :, start : start + size], keys, visible[None, None])[0, ..., :num_tokens]
        most = torch.maximum(most, (weights.amax(2) * carried).amax(1))
    return most


def _norms_of_values(view: LayerView) -> Tensor:
    """What each value adds to the output, ``[B, G, H / G, L]``; its own norm where the output projection is not known."""
    try:
        return output_norms(view)
    except ValueError:
        return norms(view.kept.values).unsqueeze(2).expand(-1, -1, view.group_size, -1)
