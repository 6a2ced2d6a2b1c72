"""When do we act?"""

from abc import ABC, abstractmethod


class Trigger(ABC):
    """Says after which forward passes a layer is compressed."""

    queries_while_decoding = 0
    """Of how many of the newest tokens a decision needs the queries and hidden states while tokens come one by one."""

    @abstractmethod
    def should_act(self, num_new: int, num_pending: int) -> bool:
        """Whether to act after a pass of ``num_new`` columns, the last of ``num_pending`` single ones since the last action."""
