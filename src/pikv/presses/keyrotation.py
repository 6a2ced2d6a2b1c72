"""Positions without gaps: keys are turned so that the kept tokens stand side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pikv.cache.row_state import ContiguousPositions
from pikv.cache.rows import RaggedRows
from pikv.core import Decision, Kept, LayerView
from pikv.hf.rotary import Rotary
from pikv.presses.registry import register_press
from pikv.presses.stage import ScoredStage, Stage
from pikv.presses.wrapper import WrapperPress


@register_press("keyrotation", group="wrapper", paper="2408.00167", wraps="snapkv")
class KeyRerotationPress(WrapperPress):
    """Turns the keys that another press keeps to positions without gaps, as StreamingLLM and FINCH do (arXiv 2408.00167).

    The kept tokens of every row then stand right before whatever comes next, at the distances they would have if the text had
    never held the others. ``cache.positions`` goes on telling where they came from. What a layer held before a later turn is
    copied, and the copy held until the turn was read: keys cannot be turned back exactly.

    Raises:
        ValueError: when applied, if the model has no rotary position embedding, or for presses that share out over layers;
            inside the block, for a cache that another press evicted tokens from.
    """

    def bind(self, model: Any) -> list[Stage]:
        rotary = Rotary(model)
        stages = [self.wrap(self._scored(stage), model) for stage in self.press.bind(model)]
        for stage in stages:
            if stage.revises_earlier_layers:
                raise ValueError(
                    f"{stage.press!r} shares tokens out over the layers; its keys cannot be turned one layer at a time"
                )
        return [stage if isinstance(stage, _RotatingStage) else _RotatingStage.of(stage, rotary) for stage in stages]

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return stage


@dataclass(frozen=True, kw_only=True, eq=False)
class _RotatingStage(ScoredStage):
    """A stage that turns keys; ``inner``, which it was made from, is told what was kept as it would be alone."""

    rotary: Rotary
    inner: ScoredStage

    @classmethod
    def of(cls, stage: ScoredStage, rotary: Rotary) -> "_RotatingStage":
        return cls(**{each.name: getattr(stage, each.name) for each in fields(ScoredStage)}, rotary=rotary, inner=stage)

    @property
    def changes_tokens(self) -> bool:
        return True

    def decide(self, view: LayerView) -> Decision:
        self._check(view)  # before anything is evicted
        return super().decide(view)

    def after_keep(self, view: LayerView, kept: Kept, rows: RaggedRows) -> None:
        self.inner.after_keep(view, kept, rows)
        before, heads = view.key_positions, rows.num_kv_heads

        def turn(row_ids: Sequence[int], keys: Tensor, values: Tensor, numbers: Tensor) -> tuple[Tensor, None]:
            old = torch.stack([before[row // heads, row % heads, kept[row].to(before.device)] for row in row_ids])
            ends = torch.tensor([int(view.seen[row // heads]) for row in row_ids], device=old.device).unsqueeze(1)
            return self.rotary.rotate(keys, ends - old.shape[1] + numbers - old[:, numbers], view.layer_idx), None

        rows.rewrite(turn)
        view.state[ContiguousPositions] = ContiguousPositions(seen=view.call.seen, lengths=rows.lengths)

    def _check(self, view: LayerView) -> None:
        has_gaps = ContiguousPositions not in view.state and bool((view.kept.lengths != view.seen.view(-1, 1)).any())
        if has_gaps:
            raise ValueError(
                "another press evicted tokens from this cache, or it comes from a file: its keys may stand with gaps"
            )
        _ = view.key_positions  # raises where they are not known
