"""KVzip: what reading the context again takes stays (arXiv 2505.23416)."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Unpack

from pikv.budget.adaptive import AdaptiveHeadBudget, share_by_score
from pikv.budget.amount import Amount, Limits
from pikv.budget.base import Budget, JointBudget, ScoredLayer
from pikv.budget.uniform import UniformBudget
from pikv.checks import check_count
from pikv.core import LayerView, Needs, Reread
from pikv.hf.tokenizer import tokenizer_of
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer
from pikv.scoring.token_state import TokenState

_NOTED_BYTES = 8  # of a token in a row: its position and its score


class ReconstructionScorer(Scorer):
    """Scores a token by the most attention that any query pays it while the model reads the context a second time.

    ``prompt`` introduces the second reading; words that the model's tokenizer does not know are left out of it, and all of
    it where there is no tokenizer beside the model. The first ``sink_size`` tokens come first. Tokens of earlier turns keep
    the score that they had then, noted beside the rows (8 bytes for each token that stays); those that were never read again,
    such as generated ones, come right after the sinks: no attention is more than 1.
    """

    def __init__(self, prompt: str, chunk_size: int = 2048, sink_size: int = 4) -> None:
        self.prompt = prompt
        self.reread = Reread(
            chunk_size=check_count(chunk_size, "chunk_size"), sink_size=check_count(sink_size, "sink_size", least=0)
        )
        self.needs = Needs(reread=self.reread, noted_bytes=_NOTED_BYTES)

    def bind(self, model: Any) -> "ReconstructionScorer":
        tokenizer = tokenizer_of(model)
        ids = tokenizer(self.prompt, add_special_tokens=False)["input_ids"] if tokenizer and self.prompt else []
        bound = copy(self)
        bound.reread = replace(self.reread, prompt_ids=tuple(token for token in ids if token != tokenizer.unk_token_id))
        bound.needs = Needs(reread=bound.reread, noted_bytes=_NOTED_BYTES)
        return bound

    def score(self, view: LayerView) -> Tensor:
        positions = view.kept.positions
        noted = view.state.get(self.reread)
        remembered = torch.ones(positions.shape, device=positions.device)
        if isinstance(noted, TokenState):
            remembered = noted.at(positions, missing=1.0)
        scores = remembered
        if view.reread is not None:  # else all stays, and there was nothing to read again for
            scores = torch.where(view.reread.isnan(), remembered, view.reread)
            # Under what was asked, not under this object: another one that asks the same goes on from here.
            view.state[self.reread] = TokenState.of(view.call.seen, positions, scores)
        return torch.where(positions < self.reread.sink_size, 2.0, scores)


class AcrossLayersBudget(JointBudget):
    """Keeps the tokens of the highest score over all layers and heads together, at least ``sink_size`` (or 1) per head.

    Nothing is evicted before the last layer is known.
    """

    def __init__(self, amount: Amount, sink_size: int = 4) -> None:
        self.amount = amount
        self.sink_size = check_count(sink_size, "sink_size", least=0)

    def target_lengths(self, view: LayerView) -> Tensor:
        return self.amount.per_row(view)

    def share(self, layers: Sequence[ScoredLayer], num_layers: int) -> list[Tensor]:
        lengths = torch.cat([layer.lengths for layer in layers], dim=1)
        if len(layers) < num_layers:
            return [layer.lengths for layer in layers]
        longest = max(layer.scores.shape[2] for layer in layers)
        device = layers[-1].scores.device  # layers may be spread over several
        padded = [pad(layer.scores.float(), (0, longest - layer.scores.shape[2])).to(device) for layer in layers]
        scores = torch.cat(padded, dim=1)
        target_lengths = torch.cat([layer.target_lengths for layer in layers], dim=1)
        safe = torch.minimum(target_lengths, lengths).clamp(max=max(1, self.sink_size))
        counts = share_by_score(scores, lengths, safe, target_lengths.sum(1))
        return list(counts.split([layer.lengths.shape[1] for layer in layers], dim=1))

    def with_amount(self, amount: Amount) -> "AcrossLayersBudget":
        return AcrossLayersBudget(amount, self.sink_size)


@register_press("kvzip", group="attention", paper="2505.23416")
class KVzipPress(ScorerPress):
    """Keeps what the model attends to when it reads the context a second time (KVzip, arXiv 2505.23416).

    Good for questions that come later, at the price of reading the context twice, the second time against all of the cache.
    Tokens are shared out over all layers and heads by score, or with ``layerwise`` over the heads of each layer; for equal
    shares use a ``ScorerPress``. Needs ``input_ids``.
    """

    further_names = MappingProxyType({"n_sink": "sink_size"})

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        layerwise: bool = False,
        prompt: str = "\n\nRepeat the previous context exactly.",
        chunk_size: int = 2048,
        sink_size: int = 4,
        **limits: Unpack[Limits],
    ) -> None:
        sharing: Budget = AcrossLayersBudget(Amount(), sink_size)
        if layerwise:
            sharing = AdaptiveHeadBudget(UniformBudget(Amount()), safeguard=0.0)
        super().__init__(ReconstructionScorer(prompt, chunk_size, sink_size), compression_ratio, sharing=sharing, **limits)
