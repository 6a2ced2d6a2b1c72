"""What routers are trained on: how much later queries really read each token of a context, measured on the model itself."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pikv.attention.tiles import tile_elements
from pikv.calibration.samples import CalibrationSample
from pikv.core import AttentionCall, LayerView
from pikv.hf.cache import PiKVCache
from pikv.hf.hooks import observe
from pikv.hf.support import ragged_layers
from pikv.scoring.base import norms
from pikv.scoring.output import output_norms


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerReading:
    """One layer: the view of it when the context had been read, and what later queries read of each token, ``[G, T]``."""

    view: LayerView
    future_attention: Tensor


@torch.no_grad()
def read_sample(model: Any, sample: CalibrationSample) -> list[LayerReading]:
    """Reads a context, then what comes after it, with the full cache.

    Nothing that comes after the context is known to the views; ``future_attention`` holds what it reads of the context.
    """
    layers = ragged_layers(model.config)
    cache = PiKVCache(model.config)
    views: dict[int, LayerView] = {}
    found: dict[int, Tensor] = {}

    def after_context(call: AttentionCall) -> None:
        view = LayerView.of(replace(call, state={}), rank=layers.index(call.layer_idx), num_layers=len(layers))
        views[call.layer_idx] = view

    def after_later(call: AttentionCall) -> None:
        found[call.layer_idx] = future_attention(views[call.layer_idx], call, sample.counted_queries)

    for token_ids, after_attention in ((sample.context_ids, after_context), (sample.later_ids, after_later)):
        with observe(model, after_attention=after_attention):
            inputs = torch.tensor([list(token_ids)], device=model.device)
            model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [LayerReading(view=views[layer], future_attention=found[layer]) for layer in layers]


def future_attention(view: LayerView, call: AttentionCall, counted_queries: Sequence[int]) -> Tensor:
    """What later queries read of each token of a context of one sequence, ``[G, T]``.

    A query reads of a token its attention times the norm of what the token's value adds to the output of attention. Of the
    ``counted_queries`` of ``call``, and of all query heads of a KV head, the most counts.
    """
    num_tokens = int(view.seen)
    value_norms = _value_norms(view)[0, :, :, :num_tokens]
    queries = call.queries[0].unflatten(0, (call.rows.num_kv_heads, -1))[:, :, list(counted_queries)]
    positions = torch.tensor(list(counted_queries), device=queries.device) + num_tokens
    most = torch.zeros((call.rows.num_kv_heads, num_tokens), device=queries.device)
    for block in call.rows.kept().blocks:
        keys = block.load()[0]
        params = call.params.for_rows(block.row_ids, call.rows.num_kv_heads)
        size = max(1, tile_elements(2 * keys.nbytes) // (len(block.row_ids) * queries.shape[1] * block.length))
        for start in range(0, len(counted_queries), size):
            visible = block.positions[:, None, :] <= positions[start : start + size, None]
            asked = queries[block.selector, :, start : start + size]
            weights = params.weights_of_rows(asked, keys, visible)[..., :num_tokens]
            found = (weights.amax(2) * value_norms[block.selector]).amax(1)
            most[block.selector] = torch.maximum(most[block.selector], found)
    return most


def _value_norms(view: LayerView) -> Tensor:
    """What each value adds to the output, ``[B, G, H / G, L]``; its own norm where the output projection is not known."""
    try:
        return output_norms(view)
    except ValueError:
        return view.by_block(lambda block: norms(block.values)).unsqueeze(2).expand(-1, -1, view.group_size, -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetStatistics:
    """How much each head's tokens are read, in logarithms, over several samples.

    Attributes:
        offset: what is added before the logarithm, ``[num_layers, G, 1]``
        mean: of the logarithms, ``[num_layers, G, 1]``
        spread: their standard deviation, ``[num_layers, G, 1]``
        scale: the root mean square of hidden states, ``[num_layers]``
    """

    offset: Tensor
    mean: Tensor
    spread: Tensor
    scale: Tensor

    @classmethod
    def of(cls, samples: Iterable[Sequence[LayerReading]]) -> "TargetStatistics":
        """From the readings of several samples, of which one is held at a time."""
        attention: list[list[Tensor]] = []
        squares: list[Tensor] = []
        for readings in samples:
            attention.append([reading.future_attention.cpu() for reading in readings])
            squares.append(torch.stack([reading.view.hidden_states.float().square().mean().cpu() for reading in readings]))
        by_layer = [torch.cat(layer, dim=1) for layer in zip(*attention, strict=True)]
        offset = torch.stack([1e-3 * layer.amax(1, keepdim=True).clamp(min=1e-9) for layer in by_layer])
        logs = [(layer + added).log() for layer, added in zip(by_layer, offset, strict=True)]
        return cls(
            offset=offset,
            mean=torch.stack([layer.mean(1, keepdim=True) for layer in logs]),
            spread=torch.stack([layer.std(1, keepdim=True).clamp(min=1e-3) for layer in logs]),
            scale=torch.stack(squares).mean(0).sqrt(),
        )

    def target(self, rank: int, attention: Tensor) -> Tensor:
        """What a head's scores should be, ``[G, T]``: the logarithm of ``future_attention``, with mean 0 and spread 1."""
        offset, mean, spread = (part[rank].to(attention.device) for part in (self.offset, self.mean, self.spread))
        return ((attention + offset).log() - mean) / spread
