"""KVzip: what reading the context again takes stays."""

from typing_extensions import Unpack

from pikv.budget.across_layers import AcrossLayersBudget
from pikv.budget.adaptive import AdaptiveHeadBudget
from pikv.budget.amount import Amount, Limits
from pikv.budget.base import Budget
from pikv.budget.uniform import UniformBudget
from pikv.presses.scorer import ScorerPress
from pikv.scoring.reconstruction import ReconstructionScorer


class KVzipPress(ScorerPress):
    """Keeps what the model attends to when it reads the context a second time (KVzip, arXiv 2505.23416).

    Good for questions that come later, at the price of a second prefill. Tokens are shared out over all layers and heads by
    score, or with ``layerwise`` over the heads of each layer; for equal shares use a ``ScorerPress``. Needs ``input_ids``.
    """

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
