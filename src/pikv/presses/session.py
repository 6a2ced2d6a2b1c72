"""Where presses, the cache and the model meet: one press at work on one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pikv.cache.rows import RaggedRows
from pikv.hf.cache import PiKVCache
from pikv.hf.hooks import ObservedCall, observe
from pikv.hf.support import check_supported
from pikv.scheduling.after_prefill import AfterPrefill
from pikv.scoring.base import LayerView

if TYPE_CHECKING:
    from pikv.presses.base import BasePress, Stage


@contextmanager
def apply(press: BasePress, model: Any) -> Iterator[None]:
    """Lets ``press`` compress the caches of ``model`` until the block ends."""
    check_supported(model)  # before a press looks at the model in its own way
    stages = press.bind(model)
    scheduler = AfterPrefill()

    def before_forward(num_new: int, cache: PiKVCache) -> None:
        num_tokens = cache.get_seq_length() + num_new
        if scheduler.should_act(num_new) and press.smallest(num_tokens) < 1:
            raise ValueError(f"{press!r} would keep no token of a context of {num_tokens}; lower the ratio")

    def after_attention(observed: ObservedCall) -> None:
        if scheduler.should_act(observed.call.queries.shape[2]):
            compress_layer(press, stages, observed)

    with observe(
        model,
        before_forward=before_forward,
        after_attention=after_attention,
        wants_logsumexp=press.wants_logsumexp,
    ):
        yield


@torch.no_grad()
def compress_layer(press: BasePress, stages: list[Stage], observed: ObservedCall) -> None:
    """Takes every stage's decision about one layer and carries it out.

    The first stage's ratio refers to all tokens seen, every further one's to what the stage before wants to be left of them.
    So a conversation that is compressed turn by turn ends up with the same share as one that is compressed at once.
    """
    call, rows = observed.call, observed.call.rows
    num_columns = call.queries.shape[0] * call.queries.shape[2] if call.real is None else int(call.real.sum())
    num_new = num_given = num_columns * rows.num_kv_heads
    given = torch.tensor(rows.seen).unsqueeze(1).expand(-1, rows.num_kv_heads)
    for stage in stages:
        before = int(rows.lengths.sum())
        decision = stage.decide(view_of(observed, rows, given))
        if decision.kept is not None:
            rows.keep(decision.kept)
        num_evicted = before - int(rows.lengths.sum())
        stage.press.record(call.layer_idx, num_given, num_evicted)
        num_given -= num_evicted
        given = rows.lengths if decision.wanted is None else decision.wanted
    if all(stage.press is not press for stage in stages):
        press.record(call.layer_idx, num_new, num_new - num_given)


def view_of(observed: ObservedCall, rows: RaggedRows, given: torch.Tensor) -> LayerView:
    """What a stage is shown of a layer."""
    call = observed.call
    batch, _, num_new, _ = call.queries.shape
    real = call.real
    if real is None:
        real = torch.ones((batch, num_new), dtype=torch.bool, device=call.queries.device)
    return LayerView(
        layer_idx=call.layer_idx,
        kept=rows.padded(),
        queries=call.queries.detach(),
        hidden_states=observed.hidden_states.detach(),
        real=real,
        scaling=call.scaling,
        logsumexp=call.logsumexp,
        seen=torch.tensor(rows.seen),
        given=given,
    )
