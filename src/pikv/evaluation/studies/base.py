"""What a study is: presses under a name, measured side by side on one set of data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd

from pikv.calibration.progress import ProgressBar
from pikv.evaluation.methods import FULL_CACHE, Method
from pikv.evaluation.studies.data import Data
from pikv.presses.base import BasePress
from pikv.router_defaults import CAPACITY_FACTOR, NUM_EXPERTS
from pikv.routing.experts import EXPERTS


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """What all routed presses of a study have in common.

    Attributes:
        num_experts: retention experts that routers choose among
        top_k: experts that a token goes to
        capacity_factor: capacity of an expert, over its even share of the tokens
        cache_aware: whether the ``pikv`` router prefers experts whose tokens were really read
        own_amounts: whether an expert alone keeps the amount that its strategy is named for, not the same as the others

    Raises:
        ValueError: for fewer than one expert or more than there are, ``top_k`` beyond them, or no capacity.
    """

    num_experts: int = NUM_EXPERTS
    top_k: int = 2
    capacity_factor: float = CAPACITY_FACTOR
    cache_aware: bool = True
    own_amounts: bool = False

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


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, and the presses that answer it; the full cache is always added.

    Attributes:
        builders: presses by label, asked for when a study runs, so that what was registered until then takes part
        combined: presses that are made of several
        reference_presses: presses that are trained on the model, or told the questions, before anything is measured; they
            answer for quality only
        highlights: sentences that sum up a summary of what was measured
        num_repeats, data, num_new_tokens: what a study takes without being told
        pairs: methods to compare with each other, first the one that is expected to be better
        expected: what others expect, as title, header and cells; shown apart from what was measured
        has_own_amounts: whether its presses know ``RouterSettings.own_amounts``
    """

    name: str
    description: str
    builders: Callable[[], dict[str, Builder]]
    combined: Callable[[], dict[str, Builder]] = dict
    reference_presses: Callable[[Data, RouterSettings, ProgressBar], dict[str, Builder]] | None = None
    highlights: Callable[[pd.DataFrame], list[str]] | None = None
    num_repeats: int = 5
    data: str = "random"
    num_new_tokens: int = 0
    pairs: tuple[tuple[str, str], ...] = ()
    expected: tuple[str, list[str], list[list[str]]] | None = None
    has_own_amounts: bool = False

    def methods(self, settings: RouterSettings) -> list[Method]:
        """The full cache, then every press of the study with these settings."""
        singles, combined = self.builders(), self.combined()
        return [
            FULL_CACHE,
            *(Method(label, partial(build, settings)) for label, build in singles.items()),
            *(Method(label, partial(build, settings), is_combined=True) for label, build in combined.items()),
        ]

    def references(self, data: Data, settings: RouterSettings, progress: ProgressBar) -> list[Method]:
        """The presses that must learn about the model or the data first, where there are answers to be right about."""
        if self.reference_presses is None or data.quality is None:
            return []
        builders = self.reference_presses(data, settings, progress)
        return [Method(label, partial(build, settings)) for label, build in builders.items()]
