"""What a study is: presses under a name, measured side by side on one set of data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pikv.calibration.progress import ProgressBar
from pikv.experiments.methods import FULL, Method
from pikv.experiments.studies.data import Data
from pikv.experiments.studies.expectations import Expectation
from pikv.presses.base import BasePress
from pikv.presses.none import NoCompressionPress
from pikv.routing.experts import EXPERTS


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """What all routed presses of a study have in common.

    Raises:
        ValueError: for fewer than one expert or more than there are, ``top_k`` beyond them, or no capacity.
    """

    num_experts: int = 4
    top_k: int = 2
    capacity_factor: float = 1.5
    cache_aware: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= len(EXPERTS):
            known = ", ".join(EXPERTS)
            raise ValueError(f"num-experts must lie between 1 and {len(EXPERTS)} ({known}), not {self.num_experts}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top-k must lie between 1 and num-experts={self.num_experts}, not {self.top_k}")
        if not 0 < self.capacity_factor < float("inf"):
            raise ValueError(f"capacity-factor must be positive, not {self.capacity_factor}")


Builder = Callable[[RouterSettings], BasePress]
"""Makes a press; those without a router need not look at the settings."""


@dataclass(frozen=True)
class Configuration(Method):
    """A press under a label (``spec``), built anew for every use; ``is_combined`` where it is made of several."""

    build: Callable[[], BasePress]
    is_combined: bool = False

    def press(self) -> BasePress:
        return self.build()


FULL_CACHE = Configuration(FULL, NoCompressionPress)
"""What every study compares with: nothing evicted, on the same storage."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the presses that answer it (the full cache is always added), and what was expected of them.

    ``builders`` and ``combined`` are asked when a study runs, so that what was registered until then takes part.
    ``num_repeats`` and ``data`` are what it takes without being told. ``knowing`` makes presses that are trained on the
    model, or told the questions, before anything is measured; they answer for quality only.
    """

    name: str
    description: str
    builders: Callable[[], dict[str, Builder]]
    combined: Callable[[], dict[str, Builder]] = dict
    knowing: Callable[[Data, RouterSettings, ProgressBar], dict[str, Builder]] | None = None
    expectations: Sequence[Expectation] = ()
    num_repeats: int = 5
    data: str = "random"

    def configurations(self, settings: RouterSettings) -> list[Configuration]:
        """The full cache, then every press of the study with these settings."""
        singles, combined = self.builders(), self.combined()
        return [
            FULL_CACHE,
            *(Configuration(label, partial(build, settings)) for label, build in singles.items()),
            *(Configuration(label, partial(build, settings), is_combined=True) for label, build in combined.items()),
        ]

    def with_knowledge(self, data: Data, settings: RouterSettings, progress: ProgressBar) -> list[Configuration]:
        """The presses that had to learn about the model or the data first, if there are answers to be right about."""
        if self.knowing is None or data.quality is None:
            return []
        builders = self.knowing(data, settings, progress)
        return [Configuration(label, partial(build, settings)) for label, build in builders.items()]
