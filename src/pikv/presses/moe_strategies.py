"""Which retention experts a ``MoERouterPress`` mixes: those of its strategies, and compressions of a subclass's own."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from pikv.core import LayerView
from pikv.routing.experts import EXPERTS, RetentionExpert, get_expert
from pikv.routing.experts.compression import Compress, CompressionExpert
from pikv.routing.scorer import mean_weights


def experts_of_strategies(
    names: Sequence[str], given: Mapping[str, RetentionExpert], compress: Compress | None
) -> dict[str, RetentionExpert]:
    """The experts of the strategies ``names``: ``given`` ones, or registered ones.

    ``compress`` is a subclass's own way to carry out strategies; it is asked first, and about names that nobody else knows.

    Raises:
        ValueError: for a name that nothing has, or one that occurs twice.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"expert_strategies names an expert twice: {', '.join(names)}")
    experts: dict[str, RetentionExpert] = {}
    for name in names:
        known = given.get(name)
        if known is None and (compress is None or name in EXPERTS):
            known = get_expert(name)
        if compress is not None:
            known = OwnStrategy(partial(compress, strategy=name), known)
        assert known is not None
        experts[name] = known
    return experts


class OwnStrategy(CompressionExpert):
    """A strategy that a subclass of the press brings, which is told the experts' weights."""

    def compress_in(self, view: LayerView) -> Compress:
        weights: Tensor = mean_weights(view)
        return partial(self.compress, router_probs=weights)
