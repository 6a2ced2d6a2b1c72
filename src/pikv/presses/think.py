"""ThinK: the key channels that queries read least are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pikv.cache.formats.channels import ChannelsFormat, ChosenChannels
from pikv.cache.row_state import RowState
from pikv.checks import check_count, check_ratio
from pikv.core import BlockView, Decision, LayerView, Needs
from pikv.presses.registry import register_press
from pikv.presses.stage import Stage
from pikv.presses.storage import SealingStage, StoragePress
from pikv.scoring.window import LastQueries


@register_press("think", group="format", paper="2407.21018", number="key_channel_compression_ratio")
class ThinKPress(StoragePress):
    """Removes the key channels that queries read least, of every token; values stay whole (ThinK, arXiv 2407.21018).

    A channel counts as the norm of the newest queries' channel times that of the keys' channel, by layer and KV head. When a
    text was read its keys and last queries choose; what is stored while tokens are generated goes by the last such choice (a
    cache out of a file has none, and the newest query chooses). ``compression_ratio`` stays 0: no token is removed.

    Args:
        key_channel_compression_ratio: the share of key channels that leave; at least 0, less than 1
        window_size: the newest tokens of a row, which stay dense, and whose queries choose
        group_size: tokens that are stored at a time
        num_sinks: the first tokens of a row, which stay dense
        skip_layers: layers of the model that stay dense
    """

    def __init__(
        self,
        key_channel_compression_ratio: float = 0.5,
        *,
        window_size: int = 32,
        group_size: int = 32,
        num_sinks: int = 4,
        skip_layers: Sequence[int] = (),
    ) -> None:
        super().__init__(num_sinks=num_sinks, window_size=window_size, skip_layers=skip_layers)
        check_count(window_size, "window_size")
        ratio = check_ratio(key_channel_compression_ratio, "key_channel_compression_ratio")
        self.key_channel_compression_ratio = ratio
        self.format = ChannelsFormat(ratio=ratio, group_size=group_size)

    def format_of(self, model: Any, layer_idx: int) -> ChannelsFormat:
        return self.format

    def bind(self, model: Any) -> Sequence[Stage]:
        return [
            _ChannelStage(
                presses=stage.presses, trigger=stage.trigger, sealings=stage.sealings, window_size=self.window_size
            )
            for stage in super().bind(model)
            if isinstance(stage, SealingStage)
        ]


@dataclass
class ChannelChoice(RowState):
    """The key channels that rows keep, ``[B, G, Dk]`` (int16), as the last text that was read had them chosen."""

    channels: Tensor

    @classmethod
    def concat(cls, states: Sequence[ChannelChoice | None], batch_sizes: Sequence[int]) -> ChannelChoice | None:
        """None, and so chosen anew, where some sequences have no choice."""
        return None if None in states else super().concat(states, batch_sizes)


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
        if sealing is None or not view.call.rows.would_seal(sealing):
            return replace(decision, sealing=None)
        assert isinstance(sealing.format, ChannelsFormat)
        key = ChannelChoice, self.press
        choice = view.state.get(key)
        if not isinstance(choice, ChannelChoice) or view.call.num_new > 1:
            channels = sealing.format.choose(channel_scores(view, self.window_size))
            view.state[key] = choice = ChannelChoice(seen=view.call.seen, channels=channels)
        chosen = ChosenChannels(sealing.format, choice.channels.flatten(0, 1))
        return replace(decision, sealing=replace(sealing, format=chosen))


def channel_scores(view: LayerView, window_size: int) -> Tensor:
    """How much each key channel is read, ``[B, G, D]`` (float32): sums of squares of queries times sums of squares of keys.

    Queries are the last ``window_size`` of every sequence, of all heads that read a row. Keys are those that came with the
    queries, since older ones may have lost channels already; where a row keeps none of these, or a single token came, all.
    """
    last = LastQueries(view, window_size)
    are_queries = (last.positions >= 0).repeat_interleave(view.kept.shape[1], 0)
    queries = last.queries.float().square().masked_fill(~are_queries[:, None, :, None], 0.0).sum((1, 2))
    counts = view.is_token.sum(1) if view.call.num_new > 1 else view.seen.to(queries.device)
    keys = torch.zeros_like(queries)
    for block in view.kept.blocks:
        for piece in BlockView(view, block).pieces(2 * queries.shape[-1]):
            keys[list(piece.row_ids)] = _squares_since(piece, piece.seen - piece.of_sequences(counts).to(piece.seen.device))
    return (queries * keys).unflatten(0, view.kept.shape)


def _squares_since(block: BlockView, starts: Tensor) -> Tensor:
    """Sums of the squares of each key channel over a row's tokens from position ``starts`` ``[n]`` on, ``[n, D]``."""
    is_counted = block.positions >= starts.unsqueeze(1)
    is_counted |= ~is_counted.any(1, keepdim=True)
    return (block.keys.float().square() * is_counted.unsqueeze(2)).sum(1)
