"""Where presses, the cache and the model meet: one press at work on one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from pikv.budget.select import values_of
from pikv.cache.formats.base import NotFiniteError
from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows
from pikv.core import AttentionCall, LayerView, Needs, plain_arithmetic
from pikv.hf.cache import CacheMark, PiKVCache
from pikv.hf.first_use import when_called
from pikv.hf.hooks import follow, follow_cache, uncompiled
from pikv.hf.reread import check_num_positions, read_again
from pikv.hf.sessions import ForwardInputs, ListenerFactory
from pikv.hf.support import check_supported, ragged_layers
from pikv.presses.stage import Stage, StageSource, without_sequences
from pikv.presses.stats import LastLength, StatsRecorder
from pikv.presses.steps import DecodingHistory, state_of
from pikv.scoring.token_state import token_states_of


@contextmanager
def apply(press: StageSource, model: Any) -> Iterator[None]:
    """Lets ``press`` compress the caches of ``model`` that the context fills which entered the block, until it ends."""
    with follow(model, listener_factory(press, uncompiled(model))):
        yield


def apply_to_cache(press: StageSource, cache: PiKVCache) -> None:
    """Lets ``press`` compress ``cache``, whichever model of its configuration it is used with, for as long as it lives.

    The press is bound to the model at first use.
    """

    def on_call(model: Any) -> None:
        if held := reference():
            follow_cache(model, held, bind)

    def bind(model: Any) -> ListenerFactory:
        stop_waiting()
        return listener_factory(press, model)

    reference = ref(cache)  # what waits for the cache's model must not keep the cache
    stop_waiting = when_called(cache, cache.config, on_call)


def listener_factory(press: StageSource, model: Any) -> ListenerFactory:
    """Binds ``press`` to ``model``; returns what makes a session for a forward pass."""
    check_supported(model)  # before a press looks at the model in its own way
    return _Sessions(press, model).begin


class _Sessions:
    """Makes the sessions of a block, in which several threads may take part and settings of the press may change."""

    def __init__(self, press: StageSource, model: Any) -> None:
        self.press = press
        self.model = model
        self.bound = Session(press, model, press.bind(model))

    def begin(self, inputs: ForwardInputs) -> Session:
        """The session of a forward pass that is about to begin."""
        bound = self.bound
        if self.press.last_change() != bound.bound_at:
            # Only a session that is complete takes the place of the one that other threads copy.
            self.bound = bound = Session(self.press, self.model, self.press.bind(self.model))
        session = copy(bound)
        session.waiting = {}
        session.before = None
        session.before_forward(inputs)
        return session


class Session:
    """The stages of a press, asked layer by layer; or, where one wants the context read again, after the forward pass.

    Each forward pass has a session of its own: several threads may take part in one block.
    """

    def __init__(self, press: StageSource, model: Any, stages: Sequence[Stage]) -> None:
        self.press = press
        self.model = model
        self.stages = stages
        self.bound_at = press.last_change()
        self.ranks = {layer: rank for rank, layer in enumerate(ragged_layers(model.config))}
        self.num_kept_steps = max((stage.trigger.queries_while_decoding for stage in stages), default=0)
        self.needs = Needs()
        for stage in stages:
            self.needs |= stage.needs if stage.merger is None else stage.needs | stage.merger.needs
        self.reread = self.needs.reread
        self.wants_logsumexp = self.needs.logsumexp
        self.waits = False  # with all decisions, for a second reading
        self.before: CacheMark | None = None  # where the cache stood, if it waits
        self.waiting: dict[int, AttentionCall] = {}
        self.scratch: dict[Stage, dict[Any, Any]] = {}
        self.inputs: ForwardInputs | None = None

    def before_forward(self, inputs: ForwardInputs) -> None:
        """Checks that what is to be done can be done, before anything is computed."""
        self.inputs = inputs
        self.scratch = {stage: {} for stage in self.stages}
        num_seen = inputs.cache.get_seq_length() + inputs.num_new
        num_tokens = self._min_kept(num_seen)
        if num_tokens < 1:
            raise ValueError(f"{self.press!r} would keep no token of a context of {num_seen}; lower the ratio")
        self.waits = self.reread is not None and inputs.num_new > 1 and num_tokens < num_seen
        self.before = inputs.cache.mark() if self.waits else None
        if self.reread and self.waits:
            if inputs.input_ids is None:
                raise ValueError(f"{self.press!r} reads the context twice and needs its input_ids")
            check_num_positions(self.model, inputs, self.reread)

    def _min_kept(self, num_tokens: int) -> int:
        """Tokens that the smallest row would keep of ``num_tokens`` after the forward pass at hand."""
        assert self.inputs is not None
        for stage in self.stages:
            if stage.trigger.should_act(self.inputs.num_new, 0):
                num_tokens = stage.min_kept(num_tokens)
        return num_tokens

    def after_attention(self, call: AttentionCall) -> None:
        """Lets the stages whose time has come decide about the layer that was just computed."""
        if self.waits:
            if not self.needs.queries:
                call = call.newest_column()
            self.waiting[call.layer_idx] = call
        else:
            self.act(call)

    def after_forward(self, inputs: ForwardInputs) -> None:
        """Has the context read again, and lets the stages decide with what that shows."""
        if self.reread and self.waiting:
            try:
                # Padding counts as columns, but alone a sequence that loses nothing would not be read again.
                seen = next(iter(self.waiting.values())).seen
                loses_nothing = torch.tensor([not tokens or self._min_kept(tokens) >= tokens for tokens in seen])
                is_needed = not bool(loses_nothing.all())
                attention = read_again(self.model, inputs, self.reread) if is_needed else {}
                for layer, call in self.waiting.items():
                    self.act(call, without_sequences(attention.get(layer), loses_nothing))
                    call.rows.fit()  # the second reading needed capacity
            except BaseException:
                assert self.before is not None
                inputs.cache.drop_since(self.before)  # the pass is not over yet, and leaves nothing if it fails
                raise
        self.waiting.clear()
        self.scratch.clear()
        self.inputs = None

    def act(self, call: AttentionCall, reread: Tensor | None = None) -> None:
        """Takes the decision of every stage that is due about one layer, and carries it out.

        The first stage's ratio refers to all tokens seen, every further one's to what the stage before wants to be left of
        them. So a conversation that is compressed turn by turn ends up with the same share as one that is compressed at
        once.
        """
        with plain_arithmetic(call.queries.device):
            self._act(call, reread)

    def _act(self, call: AttentionCall, reread: Tensor | None) -> None:
        rows = call.rows
        steps = state_of(DecodingHistory, call, self.press)
        steps.add(call, self.num_kept_steps)
        due = [stage for stage in self.stages if stage.trigger.should_act(call.num_new, steps.num_single)]
        observing = [stage for stage in self.stages if stage.needs.observes and stage not in due] if call.num_new > 1 else []
        if due:
            if any(stage.changes_tokens for stage in due):
                assert self.inputs is not None
                self.inputs.cache.remember_rows(call.layer_idx, self.before)
            self._decide(due, steps.joined(call) if call.num_new == 1 else call, reread)
            if any(stage.ends_history for stage in due):
                call.state[DecodingHistory, self.press] = DecodingHistory(seen=steps.seen)
        for stage in observing:
            stage.observe(self._view(stage, call, rows.lengths, None, is_first=not due))

    def _decide(self, due: Sequence[Stage], call: AttentionCall, reread: Tensor | None) -> None:
        """Takes the decisions of the stages that are due, one after the other."""
        rows = call.rows
        recorder = StatsRecorder(call)
        num_given = torch.tensor(rows.seen).unsqueeze(1).expand(-1, rows.num_kv_heads)
        for stage in due:
            num_before = int(rows.lengths.sum())
            view = self._view(stage, call, num_given, reread, is_first=stage is due[0])
            decision = stage.decide(view)
            try:
                rows.apply(decision)
            except NotFiniteError as error:
                raise ValueError(f"{stage.press!r}, layer {call.layer_idx}: {error}") from None
            if decision.kept is not None:
                _forget_evicted(call.state, rows)
                if stage.merger:
                    stage.merger.merge(view, decision.kept, rows)
                stage.after_keep(view, decision.kept, rows)
                reread = None if reread is None else values_of(decision.kept, reread)
            recorder.enter(stage.presses, num_before)
            num_given = rows.lengths if decision.target_lengths is None else decision.target_lengths
            for layer, kept in decision.earlier.items():
                self._revise(stage, layer, kept)
        if any(stage.is_bounded_in_bytes for stage in due):
            rows.fit()
        recorder.close()

    def _revise(self, stage: Stage, layer: int, kept: Sequence[Tensor]) -> None:
        """Takes from a layer that was decided about before."""
        assert self.inputs is not None
        cache = self.inputs.cache
        rows = cache.rows(layer)
        num_evicted = int(rows.lengths.sum()) - sum(len(row) for row in kept)
        rows.keep(kept)
        state = cache.state(layer)
        _forget_evicted(state, rows)
        for press in stage.presses:
            press.record(layer, 0, num_evicted)
            held = state[LastLength, press]
            state[LastLength, press] = LastLength(seen=held.seen, num_tokens=rows.lengths.sum(1).tolist())

    def _view(
        self, stage: Stage, call: AttentionCall, num_given: Tensor, reread: Tensor | None, *, is_first: bool
    ) -> LayerView:
        """What a stage is shown of a layer."""
        assert self.inputs is not None
        return LayerView.of(
            call,
            rank=self.ranks[call.layer_idx],
            num_layers=len(self.ranks),
            num_given=num_given,
            is_first_stage=is_first,
            reserved_bytes=self.inputs.cache.reserved_nbytes,
            noted_bytes=self.needs.noted_bytes,
            reread=reread,
            scratch=self.scratch[stage],
        )


def _forget_evicted(state: Mapping[Any, RowState], rows: RaggedRows) -> None:
    """What is noted of tokens that were evicted goes with them."""
    token_states = [each for held in state.values() for each in token_states_of(held)]
    if token_states:
        positions = rows.kept().positions
        for each in token_states:
            each.keep_only(positions)
