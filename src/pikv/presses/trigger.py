"""When does a press act?"""

from abc import ABC, abstractmethod

from pikv.checks import check_count


class Trigger(ABC):
    """Says after which forward passes a layer is compressed."""

    queries_while_decoding = 0
    """Of how many of the newest tokens a decision needs the queries and hidden states while tokens come one by one."""

    @abstractmethod
    def should_act(self, num_new: int, num_pending: int) -> bool:
        """Whether to act after a pass of ``num_new`` columns, the last of ``num_pending`` single ones since the last action."""


class AfterPrefill(Trigger):
    """Compresses once a context, or a further turn, has been read; never while tokens are generated one by one."""

    def should_act(self, num_new: int, num_pending: int) -> bool:
        return num_new > 1


class EveryTokens(Trigger):
    """Compresses after every ``interval`` tokens that were generated one by one.

    Decisions see the queries of the newest ``window_size`` of them.
    """

    def __init__(self, interval: int, window_size: int) -> None:
        self.interval = check_count(interval, "compression_interval")
        self.queries_while_decoding = check_count(window_size, "buffer_size")

    def should_act(self, num_new: int, num_pending: int) -> bool:
        return num_new == 1 and num_pending >= self.interval


class AfterGroups(Trigger):
    """Acts once a context, or a further turn, has been read, and after every ``group_size`` tokens that come one by one."""

    def __init__(self, group_size: int) -> None:
        self.group_size = check_count(group_size, "group_size")

    def should_act(self, num_new: int, num_pending: int) -> bool:
        return num_new > 1 or num_pending % self.group_size == 0
