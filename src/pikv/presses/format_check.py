"""How far attention is off, layer by layer, once a model's own tokens are stored in a format: tried before first use."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pikv.attention.partial import attend_part
from pikv.cache.block import RowBlock
from pikv.cache.formats.base import NotFiniteError
from pikv.cache.sealing import Sealing
from pikv.core import AttentionCall, plain_arithmetic
from pikv.hf.hooks import observe
from pikv.hf.shape import num_positions, vocab_size

_LENGTH = 256  # tokens of the probe text
_NUM_QUERIES = 64  # of its last tokens

_known: WeakKeyDictionary[Any, dict[Hashable, Mapping[int, float]]] = WeakKeyDictionary()
_said: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def layer_errors(model: Any, sealings: Mapping[int, Sealing]) -> Mapping[int, float]:
    """The relative error of each layer's attention outputs on a probe text that is stored in the formats, by layer.

    The text are random tokens that come twice; its last quarter attends, and the first tokens stay dense as ``sealings`` say.
    What was found is remembered for as long as the model lives.

    Raises:
        NotFiniteError: for tokens that a format cannot hold, with the layer.
    """
    key = tuple(sealings.items())
    found = _known.setdefault(model, {})
    if key not in found:
        found[key] = _measure(model, sealings)
    return found[key]


def warn_once(model: Any, text: str) -> None:
    """Warns of something that is true of a model, the first time only."""
    said = _said.setdefault(model, set())
    if text not in said:
        said.add(text)
        warnings.warn(text, stacklevel=3)


def _measure(model: Any, sealings: Mapping[int, Sealing]) -> dict[int, float]:
    errors: dict[int, float] = {}

    def compare(call: AttentionCall) -> None:
        if (sealing := sealings.get(call.layer_idx)) is not None:
            try:
                with plain_arithmetic(call.queries.device):
                    errors[call.layer_idx] = _error_of(call, sealing)
            except NotFiniteError as error:
                raise NotFiniteError(f"layer {call.layer_idx}: {error}") from None

    ids = probe_ids(model)
    with torch.no_grad(), observe(model, after_attention=compare):
        model(ids, use_cache=True)
    return errors


def probe_ids(model: Any) -> Tensor:
    """Random tokens that come twice, so that heads which look for what came before find it, ``[1, T]``; always the same."""
    length = min(_LENGTH, num_positions(model.config) or _LENGTH)
    half = torch.randint(vocab_size(model.config), (1, -(-length // 2)), generator=torch.Generator().manual_seed(0))
    return torch.cat([half, half], 1)[:, :length].to(model.device)


def _error_of(call: AttentionCall, sealing: Sealing) -> float:
    heads, device = call.rows.num_kv_heads, call.queries.device
    (block,) = call.rows.blocks
    queries = call.queries[:, :, -_NUM_QUERIES:]
    queries = queries.reshape(heads, -1, *queries.shape[2:]).float()
    keys, values = block.dense()
    params = call.params.for_rows(block.row_ids, heads)
    stored_keys, stored_values = _stored(block, sealing)
    own_start = keys.shape[1] - queries.shape[2]
    exact, _ = attend_part(queries, keys.float(), values.float(), params, own_start)
    found, _ = attend_part(queries, stored_keys.to(device).float(), stored_values.to(device).float(), params, own_start)
    return float((found - exact).norm() / exact.norm())


def _stored(block: RowBlock, sealing: Sealing) -> tuple[Tensor, Tensor]:
    """What the tokens are decoded to, all but the first."""
    keys, values = block.dense()
    first = sealing.sinks
    segment = sealing.format_for(block.row_ids).encode(keys[:, first:], values[:, first:], block.kept_positions()[:, first:])
    decoded_keys, decoded_values = segment.dense()
    return torch.cat([keys[:, :first], decoded_keys], 1), torch.cat([values[:, :first], decoded_values], 1)
