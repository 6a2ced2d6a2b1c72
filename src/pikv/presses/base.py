"""The contract of a press: what users apply to a model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pikv.presses.session import apply
from pikv.scoring.base import LayerView


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """Which tokens of every row ``b * G + g`` to keep; None leaves the layer as it is.

    ``wanted`` ``[B, G]`` is how many tokens the rows would hold had all of the given ones been there; None: as many as they do.
    A further stage's ratio refers to it.
    """

    kept: Sequence[Tensor] | None
    wanted: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """A press and how it decides about a layer of the model that it is bound to."""

    press: "BasePress"
    decide: Callable[[LayerView], Decision]


def check_ratio(ratio: float, name: str = "compression_ratio") -> float:
    """Returns the ratio if it lies in [0, 1), else raises ValueError."""
    if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, not {ratio!r}")
    return float(ratio)


class BasePress:
    """Compresses the cache of a model for the time of a ``with`` block.

    A press holds settings and statistics only. What belongs to a model is made by ``bind`` when the press is applied, so one
    press used on two models, or twice, gives the same answer. Of nested blocks the innermost acts.

    A press of one's own overrides ``compress`` and ``smallest``.
    """

    wants_logsumexp = False
    """Whether views should carry the log-sum-exp of a prefill's attention, which takes a moment to get hold of."""

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[int, int]]] = {}

    @property
    def compression_ratio(self) -> float:
        """The share of the cached tokens, over all rows of the model, that the press is set to remove."""
        return 0.0

    def __call__(self, model: Any) -> AbstractContextManager[None]:
        """Applies the press to a transformers causal language model.

        Raises:
            ValueError: if the architecture is not supported; inside the block, if a context is so short that no token would
                be kept, and for caches that are neither a PiKVCache nor empty.
        """
        return apply(self, model)

    def bind(self, model: Any) -> list[Stage]:
        """The decisions to take, one after the other, in every layer of ``model``."""
        return [Stage(press=self, decide=self.decide)]

    def decide(self, view: LayerView) -> Decision:
        """Decides about one layer."""
        return Decision(kept=self.compress(view))

    def compress(self, view: LayerView) -> Sequence[Tensor] | None:
        """Returns the tokens of one layer to keep, for every row ``b * G + g`` ascending token numbers; None keeps all."""
        return None

    def smallest(self, num_tokens: int) -> int:
        """Tokens that the smallest row would keep of a context of ``num_tokens``."""
        return num_tokens

    def record(self, layer_idx: int, num_given: int, num_evicted: int) -> None:
        """Notes how many tokens, over all its rows, were newly given to a layer, and how many this press evicted from it."""
        self._kept.setdefault(layer_idx, []).append((num_given, num_given - num_evicted))

    def get_stats(self) -> dict[str, Any]:
        """What the press did since the last reset: compressions, and the share removed, by layer and in all."""
        given = {layer: sum(pair[0] for pair in pairs) for layer, pairs in self._kept.items()}
        kept = {layer: sum(pair[1] for pair in pairs) for layer, pairs in self._kept.items()}
        return {
            "compression_count": max((len(pairs) for pairs in self._kept.values()), default=0),
            "compression_ratio": 1 - sum(kept.values()) / sum(given.values()) if given else 0.0,
            "layer_stats": {
                layer: {"num_given": given[layer], "num_kept": kept[layer], "compression_ratio": 1 - kept[layer] / given[layer]}
                for layer in sorted(given)
            },
        }

    def reset_stats(self) -> None:
        self._kept.clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(compression_ratio={self.compression_ratio:g})"


class NoCompressionPress(BasePress):
    """Keeps everything: the full cache on PiKV's storage, the baseline of every comparison."""
