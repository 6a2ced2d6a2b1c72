"""When to act: every so many tokens while decoding."""

from pikv.scheduling.base import Trigger


class EveryTokens(Trigger):
    """Compresses after every ``interval`` tokens that were generated one by one.

    Decisions see the queries of the newest ``window_size`` of them.
    """

    def __init__(self, interval: int, window_size: int) -> None:
        if interval < 1 or window_size < 1:
            raise ValueError("the interval and the number of queries must be at least 1")
        self.interval = interval
        self.queries_while_decoding = window_size

    def should_act(self, num_new: int, num_pending: int) -> bool:
        return num_new == 1 and num_pending >= self.interval
