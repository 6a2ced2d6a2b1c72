"""What asking a compressed context gives back."""

from dataclasses import dataclass

from pikv.hf.cache import PiKVCache


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer.

    Attributes:
        question: as it was asked; empty where the context was continued
        text: without special tokens and white space around it
        token_ids: as they were generated, the end token included
        seconds: from reading the question to the last token
    """

    question: str
    text: str
    token_ids: list[int]
    seconds: float

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class ContextStats:
    """What reading a context took and left.

    Attributes:
        num_tokens: read, the chat template's included
        kept_tokens: per KV head, mean over the layers that were compressed
        nbytes: that the cache held when the context was read
        dense_nbytes: that an uncompressed cache would have held
        read_seconds: of reading and compressing; 0 for a cache that had been read before. What a press finds out about a
            model beforehand, such as which heads retrieve, is not in it
    """

    num_tokens: int
    kept_tokens: float
    nbytes: int
    dense_nbytes: int
    read_seconds: float

    @property
    def compression_ratio(self) -> float:
        """The share of the bytes that was saved."""
        return 1 - self.nbytes / self.dense_nbytes if self.dense_nbytes else 0.0

    def __str__(self) -> str:
        read = f"read in {self.read_seconds:.2f} s" if self.read_seconds else "read before"
        saved = f"{self.compression_ratio:.0%}" if self.compression_ratio > 0 else "nothing"  # room to grow counts, too
        return (
            f"{self.nbytes:,} of {self.dense_nbytes:,} bytes ({saved} saved), "
            f"{self.kept_tokens:,.0f} of {self.num_tokens:,} tokens kept per KV head, {read}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Answers to questions about one context.

    Attributes:
        details: an ``Answer`` to each question, in their order
        cache: the compressed context, without questions and answers: to be asked again, or saved
        stats: what reading the context took and left
    """

    details: list[Answer]
    cache: PiKVCache
    stats: ContextStats

    @property
    def answers(self) -> list[str]:
        """The answers' texts."""
        return [answer.text for answer in self.details]

    @property
    def seconds(self) -> list[float]:
        """Seconds that each answer took."""
        return [answer.seconds for answer in self.details]

    def __str__(self) -> str:
        said = [f"{answer.question}\n  {answer.text}" for answer in self.details]
        return "\n".join([*said, f"({self.stats}, answered in {sum(self.seconds):.2f} s)"])

    def __repr__(self) -> str:
        return f"Answers({self.answers!r}, {self.stats})"
