"""What a scorer or a budget looks at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reread:
    """How to read a context again: behind ``prompt_ids``, in chunks of ``chunk_size`` tokens.

    A chunk sees the first ``sink_size`` tokens, itself as it was, and itself as it is read again.
    """

    prompt_ids: tuple[int, ...] = ()
    chunk_size: int = 2048
    sink_size: int = 4


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a scorer or a budget looks at, beside positions, keys and values; nothing else is prepared or held for it.

    Attributes:
        queries: whether the queries or hidden states of the newest tokens are used
        logsumexp: whether the log-sum-exp of a prefill's attention is used; capturing it costs extra work
        observes: whether it is shown every context that is read, also when nothing is decided, to note what later scores need
        reread: how to read the context a second time, or None
        noted_bytes: bytes that are kept beside the rows, at most, for each token that a row holds
    """

    queries: bool = False
    logsumexp: bool = False
    observes: bool = False
    reread: Reread | None = None
    noted_bytes: int = 0

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            queries=self.queries or other.queries,
            logsumexp=self.logsumexp or other.logsumexp,
            observes=self.observes or other.observes,
            reread=self.reread or other.reread,
            noted_bytes=self.noted_bytes + other.noted_bytes,
        )
