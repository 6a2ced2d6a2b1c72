"""Presses made of one scorer and one budget."""

import inspect
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Amount, Limits
from pikv.budget.base import Budget
from pikv.budget.uniform import UniformBudget
from pikv.checks import check_ratio, plain
from pikv.core import LayerView, Needs
from pikv.presses.base import BasePress
from pikv.presses.kvpress.scorer import KvpressScorer
from pikv.presses.kvpress.style import check_hooks, takes_tensors
from pikv.presses.stage import ScoredStage, Stage
from pikv.scoring.base import Scorer


class ScorerPress(BasePress):
    """Keeps the tokens that a scorer ranks highest, as many per row as a budget allows: ``ScorerPress(scorer, 0.75)``.

    A subclass with a method ``score(view)`` of its own, which returns ``[B, G, L]``, needs no scorer: ``MyPress(0.75)``. It may
    also be ``score(module, hidden_states, keys, values, attentions, kwargs)``, as in kvpress, and the class a ``dataclass``.

    ``compression_ratio`` is the share of the tokens to remove (0 <= ratio < 1). In its place, ``budget`` is the number of
    tokens to keep per KV head, ``max_bytes`` what the whole cache may hold after compression. ``sharing`` is how the amount
    is shared out; by default every row gets the same.

    Raises:
        ValueError: without a scorer, for a ratio outside of [0, 1), and for limits that are no whole numbers of at least 1.
    """

    needs = Needs(queries=True)
    """What a ``score`` of its own looks at beside positions, keys and values."""

    def __init__(
        self,
        scorer: Scorer | float | None = None,
        compression_ratio: float = 0.5,
        *,
        sharing: Budget | None = None,
        **limits: Unpack[Limits],
    ) -> None:
        super().__init__()
        if not isinstance(scorer, Scorer):
            if type(self).score is ScorerPress.score:
                raise ValueError(f"{type(self).__name__} needs a scorer, or a method score(view) of its own")
            compression_ratio = compression_ratio if scorer is None else scorer
            scorer = _own_scorer(self)
        self.scorer = scorer
        amount = Amount.of(compression_ratio, limits)
        self.budget = UniformBudget(amount) if sharing is None else sharing.with_amount(amount)

    def score(self, view: LayerView) -> Tensor:
        """How important each cached token is, ``[B, G, L]``, higher for more; anything behind a row's end."""
        return self.scorer.score(view)

    def _get_ratio(self) -> float:
        """The ratio set; with a limit in its place the share that was removed since the last reset of the statistics."""
        amount = self.budget.amount
        return amount.ratio if amount.is_ratio else float(self.get_stats()["compression_ratio"])

    def _set_ratio(self, ratio: float) -> None:
        vars(self)["budget"] = self.budget.with_amount(Amount(ratio))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Limits.__annotations__ and not isinstance(value, Budget):
            value = plain(value)
            ratio = self.budget.amount.ratio
            tokens, max_bytes = (value if name == limit else None for limit in Limits.__annotations__)
            vars(self)["budget"] = self.budget.with_amount(Amount(ratio, tokens, max_bytes))
            self._note(*(("compression_ratio", ratio) if value is None else (name, value)))
            return
        if name == "compression_ratio" and not isinstance(getattr(type(self), name), property):  # a data class has its own
            check_ratio(value)
        super().__setattr__(name, value)

    def _adjust(self, name: str, value: Any) -> None:
        settings = vars(self)["_settings"]
        if "scorer" in settings and not isinstance(settings["scorer"], Scorer):  # a score of its own, perhaps behind a ratio
            own = {"scorer": self.scorer, "compression_ratio": self.budget.amount.ratio}
            vars(self)["_settings"] = {**settings, **own}
        super()._adjust(name, value)

    def __getattr__(self, name: str) -> Any:
        # The constructor of a data class does not call the one above.
        if name in ("scorer", "budget") and "_making" not in vars(self):
            ScorerPress.__init__(self)
            return vars(self)[name]
        return super().__getattr__(name)

    def __post_init__(self) -> None:
        """What data classes written for kvpress expect of the class above them."""

    def bind(self, model: Any) -> Sequence[Stage]:
        if takes_tensors(type(self).compress):
            return super().bind(model)
        return [ScoredStage(presses=(self,), scorer=self.scorer.bind(model), budget=self._present_budget())]

    def _present_budget(self) -> Budget:
        """The budget; that of the ratio in which a data class has an attribute of its own."""
        amount = self.budget.amount
        if not amount.is_ratio or self.compression_ratio == amount.ratio:
            return self.budget
        return self.budget.with_amount(Amount(self.compression_ratio))

    def min_kept(self, num_tokens: int) -> int:
        if takes_tensors(type(self).compress):
            return super().min_kept(num_tokens)
        return self._present_budget().min_kept(num_tokens)

    def __repr__(self) -> str:
        amount = self._present_budget().amount
        said = f"compression_ratio={amount.ratio:g}"
        if amount.tokens is not None:
            said = f"budget={amount.tokens}"
        elif amount.max_bytes is not None:
            said = f"max_bytes={amount.max_bytes}"
        scorer = f"{type(self.scorer).__name__}(), " if type(self) is ScorerPress else ""
        return f"{type(self).__name__}({scorer}{said}{self._further_settings()})"


class _OwnScorer(Scorer):
    """The ``score`` of a press."""

    def __init__(self, press: ScorerPress) -> None:
        self.press = press
        self.needs = press.needs

    @property
    def is_own(self) -> bool:
        return True

    def described(self) -> str:
        return repr(self.press)

    def score(self, view: LayerView) -> Tensor:
        return self.press.score(view)


def _own_scorer(press: ScorerPress) -> Scorer:
    """The scorer of a press with a ``score`` of its own."""
    if takes_tensors(type(press).score):
        check_hooks(type(press), BasePress)
        return KvpressScorer(press, type(press).__name__, is_peer=False)
    return _OwnScorer(press)


def own_scorer_press(kind: type[Scorer]) -> type[ScorerPress]:
    """A class of presses that keep what scorers of this class rank highest, and take their arguments by name."""

    def build(
        self: ScorerPress,
        compression_ratio: float = 0.5,
        *,
        sharing: Budget | None = None,
        budget: int | None = None,
        max_bytes: int | None = None,
        **options: Any,
    ) -> None:
        ScorerPress.__init__(self, kind(**options), compression_ratio, sharing=sharing, budget=budget, max_bytes=max_bytes)

    own = [each for each in inspect.signature(build).parameters.values() if each.name != "options"]
    of_kind = list(inspect.signature(kind).parameters.values())
    if all(each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) for each in of_kind):
        by_name = [each.replace(kind=each.KEYWORD_ONLY) for each in of_kind]
        build.__signature__ = inspect.Signature([*own, *by_name])  # type: ignore[attr-defined]
    about = {"__init__": build, "__doc__": kind.__doc__, "__module__": kind.__module__, "made_by_package": True}
    return type(kind.__name__, (ScorerPress,), about)


# What `@dataclass` finds in a class above: the ratio comes first in the constructors that it makes.
for _name, _value in vars(make_dataclass("_Fields", [("compression_ratio", float, 0.5)])).items():
    if _name in ("__dataclass_fields__", "__dataclass_params__"):
        setattr(ScorerPress, _name, _value)
