"""Compression while tokens are generated."""

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pikv.budget.amount import Amount
from pikv.checks import check_count
from pikv.presses.base import BasePress
from pikv.presses.none import NoCompressionPress
from pikv.presses.stage import ScoredStage, Stage, joined
from pikv.presses.trigger import EveryTokens
from pikv.presses.wrapper import WrapperPress


class DecodingPress(WrapperPress):
    """Lets another press cut every KV head down to ``target_size`` tokens after each ``compression_interval`` generated ones.

    It does not act when a context is read, but every action cuts context and generated tokens alike; see
    ``PrefillDecodingPress`` for the time before. Scores see the queries of the last ``buffer_size`` generated tokens. From
    the first action on, a head holds up to ``target_size + compression_interval`` tokens, and what further turns bring
    until the next. Where a press gives heads budgets of their own, all that is said of a head holds for the mean.

    ``buffer_size`` 0 is 1, the newest token alone.
    """

    further_names = MappingProxyType({"base_press": "press", "hidden_states_buffer_size": "buffer_size"})

    def __init__(
        self, press: BasePress, target_size: int = 2048, compression_interval: int = 512, buffer_size: int = 256
    ) -> None:
        super().__init__(press)
        self.amount = Amount(tokens=target_size)
        num_queries = max(1, check_count(buffer_size, "buffer_size", least=0))
        interval = check_count(compression_interval, "compression_interval")
        self.trigger = EveryTokens(interval, min(num_queries, interval))

    def _get_ratio(self) -> float:
        """The share that was removed since the last reset of the statistics."""
        return float(self.get_stats()["compression_ratio"])

    def _set_ratio(self, ratio: float) -> None:
        raise ValueError(f"{self!r} has no ratio of its own to set")

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        if stage.needs.reread:
            raise ValueError(f"{stage.press!r} reads the context again, which it cannot while decoding")
        return replace(stage, trigger=self.trigger, budget=stage.budget.with_amount(self.amount))

    def min_kept(self, num_tokens: int) -> int:
        return num_tokens


class PrefillDecodingPress(BasePress):
    """One press for contexts (None for none), another while decoding."""

    def __init__(self, prefilling_press: BasePress | None = None, decoding_press: DecodingPress | None = None) -> None:
        super().__init__()
        prefilling_press = NoCompressionPress() if prefilling_press is None else prefilling_press
        if not isinstance(prefilling_press, BasePress):
            raise ValueError(f"prefilling_press must be a press or None, not {prefilling_press!r}")
        if not isinstance(decoding_press, DecodingPress):
            raise ValueError(f"decoding_press must be a DecodingPress, not {decoding_press!r}")
        self.prefilling_press = prefilling_press
        self.decoding_press = decoding_press

    def _get_ratio(self) -> float:
        return self.prefilling_press.compression_ratio

    def _set_ratio(self, ratio: float) -> None:
        self.prefilling_press.compression_ratio = ratio

    def bind(self, model: Any) -> Sequence[Stage]:
        # They never act together, so each may share out over layers.
        parts = (self.prefilling_press, self.decoding_press)
        return [stage for press in parts for stage in joined(press.bind(model), self)]

    def min_kept(self, num_tokens: int) -> int:
        return self.prefilling_press.min_kept(num_tokens)

    def get_stats(self) -> dict[str, Any]:
        """As for every press, and what each of the two says of itself."""
        presses = {"prefilling": self.prefilling_press.get_stats(), "decoding": self.decoding_press.get_stats()}
        return {**super().get_stats(), **presses}

    def reset_stats(self) -> None:
        super().reset_stats()
        self.prefilling_press.reset_stats()
        self.decoding_press.reset_stats()

    def __repr__(self) -> str:
        return f"PrefillDecodingPress({self.prefilling_press!r}, {self.decoding_press!r})"
