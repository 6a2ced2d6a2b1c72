"""When to act: after every forward pass that brings more than one token."""

from pikv.scheduling.base import Trigger


class AfterPrefill(Trigger):
    """Compresses once a context, or a further turn, has been read; never while tokens are generated one by one."""

    def should_act(self, num_new: int, num_pending: int) -> bool:
        return num_new > 1
