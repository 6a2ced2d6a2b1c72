"""How many tokens may each layer and head keep?"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pikv.budget.amount import Amount
from pikv.core import LayerView, Needs


class Budget(ABC):
    """Turns a layer's view, and then its scores, into token counts; whole tokens throughout, ratios end here."""

    amount: Amount
    """How much the budget shares out."""

    needs = Needs()
    """What it looks at, beside lengths and scores."""

    shares_among_heads = False
    """Whether it says by itself what each head of a layer gets, so that nothing else can share out among heads."""

    @abstractmethod
    def target_lengths(self, view: LayerView) -> Tensor:
        """Returns how many of the tokens given to it every row should hold, ``[B, G]`` (int64, CPU), at least 1."""

    def has_room(self, view: LayerView, target_lengths: Tensor) -> Tensor:
        """Returns which sequences keep all that they hold, whatever the scores, ``[B]`` (bool, CPU)."""
        return (target_lengths >= view.kept.lengths).all(1)

    def counts(self, view: LayerView, scores: Tensor, target_lengths: Tensor) -> Tensor:
        """Returns how many tokens every row keeps now that ``scores`` ``[B, G, L]`` are known, ``[B, G]``."""
        return view.budget

    @abstractmethod
    def with_amount(self, amount: Amount) -> "Budget":
        """The same way of sharing, with another amount to share."""

    def min_kept(self, num_tokens: int) -> int:
        """Tokens that the smallest row would keep of ``num_tokens``; 0 where the budget cannot work."""
        return self.amount.min_kept(num_tokens)


@dataclass(kw_only=True, eq=False)
class ScoredLayer:
    """A layer that was scored in the present pass: what budgets that span layers share out by.

    Attributes:
        layer_idx: its number in the model
        scores: of the tokens that the layer holds now, ``[B, G, L]``
        lengths: how many each row holds, ``[B, G]``
        target_lengths: how many each row would hold by equal shares, ``[B, G]``
        num_protected: how many must stay, ``[B, G]``
        preference: what the budget made of the layer's view, ``[B]``
    """

    layer_idx: int
    scores: Tensor
    lengths: Tensor
    target_lengths: Tensor
    num_protected: Tensor
    preference: Tensor | None


class JointBudget(Budget):
    """A budget that shares out over layers: as later ones become known, earlier ones may have to give tokens away."""

    shares_among_heads = True

    def has_room(self, view: LayerView, target_lengths: Tensor) -> Tensor:
        # All layers or none: after another stage, what one layer was given says nothing about the next.
        return (target_lengths >= view.num_given).all(1) & view.is_first_stage

    def preference(self, view: LayerView) -> Tensor | None:
        """How much this layer needs, ``[B]``, read off its view."""
        return None

    @abstractmethod
    def share(self, layers: Sequence[ScoredLayer], num_layers: int) -> list[Tensor]:
        """Returns counts ``[B, G]`` for each layer known so far, of ``num_layers`` in all; never more than they hold."""
