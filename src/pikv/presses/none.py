"""No compression: the baseline of every comparison."""

from pikv.presses.base import BasePress
from pikv.presses.registry import register_press


@register_press("none", group="baseline", number=None)
class NoCompressionPress(BasePress):
    """Keeps everything: the full cache on PiKV's storage, the baseline of every comparison."""

    def _set_ratio(self, ratio: float) -> None:
        if ratio:
            raise ValueError(f"{self!r} has no ratio of its own to set")
