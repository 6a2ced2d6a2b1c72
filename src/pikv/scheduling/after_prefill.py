"""When to act: after every forward pass that brings more than one token."""


class AfterPrefill:
    """Compresses once a context, or a further turn, has been read; never while tokens are generated one by one."""

    def should_act(self, num_new: int) -> bool:
        """``num_new`` is the number of input columns of the forward pass."""
        return num_new > 1
