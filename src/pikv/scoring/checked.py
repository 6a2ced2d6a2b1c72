"""What scorers return, looked at before tokens are chosen by it."""

from typing import Any

from torch import Tensor

from pikv.core import LayerView
from pikv.scoring.base import Scorer


def scores_of(scorer: Scorer, view: LayerView, press: str = "") -> Tensor:
    """The scores ``[B, G, L]`` that a scorer, of a ``press`` that errors name, gives the tokens of a layer.

    Raises:
        ValueError: if they are none, not one for each token, or, where the scorer is a user's own, NaN for a token of a
            sequence that loses some.
    """
    scores: Any = scorer.score(view)
    name = scorer.described()
    name = f"{name} of {press}" if press not in ("", name) else name
    expected = tuple(view.kept.positions.shape)
    if not isinstance(scores, Tensor) or scores.shape != expected:
        raise ValueError(f"{name} must return scores {list(expected)}, one for each token; it returned {described(scores)}")
    if scorer.is_own and bool((missing := scores.isnan()).any()):
        loses_some = (view.budget < view.kept.lengths).any(1).view(-1, 1, 1)
        count = int((missing & view.kept.valid & loses_some.to(missing.device)).sum())
        if count:
            tokens = f"{count:,} of {int(view.kept.lengths.sum()):,} tokens"
            raise ValueError(f"{name} gave {tokens} of layer {view.layer_idx} the score NaN, which is no rank")
    return scores


def described(found: Any) -> str:
    """A returned object in a few words."""
    if isinstance(found, Tensor):
        return f"a tensor {list(found.shape)} of {str(found.dtype).removeprefix('torch.')}"
    return f"{len(found)} of them" if isinstance(found, list | tuple) else f"an object of type {type(found).__name__}"
