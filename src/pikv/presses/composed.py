"""Several presses, one after the other."""

from collections.abc import Sequence
from math import prod
from typing import Any

from pikv.presses.base import BasePress
from pikv.presses.stage import Stage, joined


class ComposedPress(BasePress):
    """Applies presses from left to right in every layer; each ratio refers to what the press before left."""

    def __init__(self, presses: Sequence[BasePress]) -> None:
        super().__init__()
        if not presses:
            raise ValueError("ComposedPress needs at least one press")
        for press in presses:
            if not isinstance(press, BasePress):
                raise ValueError(f"ComposedPress needs presses, not {press!r}")
        self.presses = list(presses)

    def _get_ratio(self) -> float:
        return 1 - prod(1 - press.compression_ratio for press in self.presses)

    def _set_ratio(self, ratio: float) -> None:
        raise ValueError(f"{self!r} has no ratio of its own to set; set those of its presses")

    def bind(self, model: Any) -> Sequence[Stage]:
        return joined([stage for press in self.presses for stage in press.bind(model)], self)

    def min_kept(self, num_tokens: int) -> int:
        for press in self.presses:
            num_tokens = press.min_kept(num_tokens)
        return num_tokens

    def get_stats(self) -> dict[str, Any]:
        """As for one press, and under ``presses`` what each of them says of itself."""
        return {**super().get_stats(), "presses": [press.get_stats() for press in self.presses]}

    def reset_stats(self) -> None:
        super().reset_stats()
        for press in self.presses:
            press.reset_stats()

    def __repr__(self) -> str:
        return f"ComposedPress([{', '.join(map(repr, self.presses))}])"
