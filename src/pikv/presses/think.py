"""ThinK: the key channels that queries read least are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pikv.cache.formats.channels import ChannelsFormat, ChosenChannels
from pikv.cache.row_state import RowState
from pikv.cache.sealing import Sealing
from pikv.checks import check_count, check_ratio
from pikv.core import BlockView, Decision, LayerView, Needs
from pikv.presses.registry import register_press
from pikv.presses.stage import Stage
from pikv.presses.storage import SealingStage, StoragePress
from pikv.scoring.window import LastQueries


@register_press("think", group="format", paper="2407.21018", number="key_channel_compression_ratio")
class ThinKPress(StoragePress):
    """Removes the key channels that queries read least, of every token; values stay whole (ThinK, arXiv 2407.21018).

    A channel counts as the norm of the newest queries' channel times that of the keys' channel, by layer and KV head. Whenever
    a text was read, its keys and last queries choose, for all that is stored until the next one is read. A cache out of a file
    has no such choice: then the query of the newest token chooses, with all keys. ``compression_ratio`` stays 0: no token is
    removed.

    Args:
        key_channel_compression_ratio: the share of key channels that leave; at least 0, less than 1
        window_size: the newest tokens of a row, which stay dense, and whose queries choose
        group_size: tokens that are stored at a time
        num_sinks: the first tokens of a row, which stay dense
        skip_layers: layers of the model that stay dense
    """

    made_of_settings: ClassVar[tuple[str, ...]] = ("format",)

    def __init__(
        self,
        key_channel_compression_ratio: float = 0.5,
        *,
        window_size: int = 32,
        group_size: int = 32,
        num_sinks: int = 4,
        skip_layers: Sequence[int] = (),
    ) -> None:
        # Which channels queries read is known once they come: there is nothing to be tried beforehand.
        super().__init__(num_sinks=num_sinks, window_size=window_size, skip_layers=skip_layers, check=False)
        check_count(window_size, "window_size")
        ratio = check_ratio(key_channel_compression_ratio, "key_channel_compression_ratio")
        self.key_channel_compression_ratio = ratio
        self.format = ChannelsFormat(ratio=ratio, group_size=group_size)

    def format_of(self, model: Any, layer_idx: int) -> ChannelsFormat:
        return self.format

    def bind(self, model: Any) -> Sequence[Stage]:
        return [
            _ChannelStage(presses=stage.presses, trigger=stage.trigger, sealings=stage.sealings, window_size=self.window_size)
            for stage in super().bind(model)
            if isinstance(stage, SealingStage)
        ]


@dataclass
class ChannelChoice(RowState):
    """The key channels that rows keep, ``[B, G, Dk]`` (int16), as each sequence's last text had them chosen; -1 without one."""

    channels: Tensor

    @classmethod
    def fill(cls, name: str) -> float:
        return -1


@dataclass(frozen=True, kw_only=True, eq=False)
class _ChannelStage(SealingStage):
    """Chooses channels before tokens are stored."""

    window_size: int

    @property
    def needs(self) -> Needs:
        return Needs(queries=True)

    def decide(self, view: LayerView) -> Decision:
        decision = super().decide(view)
        sealing = decision.sealing
        if sealing is None:
            return decision
        assert isinstance(sealing.format, ChannelsFormat)
        channels = self._choice(view, sealing, sealing.format).channels.flatten(0, 1)
        return replace(decision, sealing=replace(sealing, format=ChosenChannels(sealing.format, channels)))

    def _choice(self, view: LayerView, sealing: Sealing, format: ChannelsFormat) -> ChannelChoice:
        """The choice as it is now: a new one for sequences that read a text, and for those that need one and have none."""
        key, batch_size = (ChannelChoice, self.press), view.kept.shape[0]
        choice = view.state.get(key)
        if not isinstance(choice, ChannelChoice):
            nothing = torch.full((*view.kept.shape, format.num_kept(view.queries.shape[-1])), -1, dtype=torch.int16)
            choice = ChannelChoice(seen=[0] * batch_size, channels=nothing.to(view.queries.device))
        lacking = (choice.channels[:, 0, 0] < 0).cpu() & torch.tensor(view.call.rows.sequences_to_seal(sealing))
        wanted = lacking | (_num_read(view).cpu() > 1)
        if bool(wanted.any()):
            channels = format.choose(channel_scores(view, self.window_size))
            seen = [now if new else old for now, new, old in zip(view.call.seen, wanted.tolist(), choice.seen, strict=True)]
            is_new = wanted.view(-1, 1, 1).to(channels.device)
            choice = ChannelChoice(seen=seen, channels=torch.where(is_new, channels, choice.channels))
            view.state[key] = choice
        return choice


def _num_read(view: LayerView) -> Tensor:
    """Tokens that each sequence read in this pass, ``[B]``; 0 for those that came one by one."""
    counts = view.is_token.sum(1)
    return counts if view.call.num_new > 1 else torch.zeros_like(counts)


def channel_scores(view: LayerView, window_size: int) -> Tensor:
    """How much each key channel is read, ``[B, G, D]`` (float32): sums of squares of queries times sums of squares of keys.

    Queries are the last ``window_size`` of every sequence, of all heads that read a row. Keys are those of the text that came
    with them, since older ones may have lost channels already; where a row keeps none of these, or there is no text, all.
    """
    last = LastQueries(view, window_size)
    are_queries = (last.positions >= 0).repeat_interleave(view.kept.shape[1], 0)
    queries = last.queries.float().square().masked_fill(~are_queries[:, None, :, None], 0.0).sum((1, 2))
    num_read = _num_read(view)
    starts = torch.where(num_read > 1, view.seen.to(num_read.device) - num_read, 0)
    keys = torch.zeros_like(queries)
    for block in view.kept.blocks:
        for piece in BlockView(view, block).pieces(2 * queries.shape[-1]):
            keys[list(piece.row_ids)] = _squares_since(piece, piece.of_sequences(starts))
    scores: Tensor = (queries * keys).unflatten(0, view.kept.shape)
    return scores


def _squares_since(block: BlockView, starts: Tensor) -> Tensor:
    """Sums of the squares of each key channel over a row's tokens from position ``starts`` ``[n]`` on, ``[n, D]``."""
    is_counted = block.positions >= starts.unsqueeze(1)
    is_counted |= ~is_counted.any(1, keepdim=True)
    sums: Tensor = (block.keys.float().square() * is_counted.unsqueeze(2)).sum(1)
    return sums
