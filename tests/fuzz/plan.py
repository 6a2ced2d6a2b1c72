"""A conversation as a list of operations, all of which follows from one integer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from grammar import any_press, has_amount_in_bytes, stores

from pikv import PiKVCache

FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "gpt_oss", "mixtral", "gpt_neox")
_PADDING = ("none", "none", "left", "left", "right", "both", "inside", "empty")
# What a cache may not have yet.
HAS = {name: hasattr(PiKVCache, name) for name in ("select", "repeat", "concat")}


@dataclass(frozen=True)
class Operation:
    """One call of a method of the player; ``seed`` decides about what the options leave open."""

    kind: str
    seed: int
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


@dataclass(frozen=True)
class Conversation:
    """What happens to one cache.

    Attributes:
        seed: what all of it follows from
        family: of the model (``tiny.build``)
        batch_size: sequences at the beginning
        repeats: whether the text is a few words again and again
        presses: expressions that build them
        carries: whether the cache brings the first press itself
        compares_alone: whether each sequence is played alone as well
    """

    seed: int
    family: str
    batch_size: int
    repeats: bool
    presses: tuple[str, ...]
    carries: bool
    compares_alone: bool
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.family}, {self.batch_size} sequences{', repeated text' * self.repeats}"]
        lines += [f"  press {index}: {press}" for index, press in enumerate(self.presses)]
        lines += ["  the cache carries press 0"] * self.carries + ["  each sequence alone as well"] * self.compares_alone
        lines += [f"  {number}. {operation}" for number, operation in enumerate(self.operations, 1)]
        return "\n".join(lines)

    def without(self, start: int, stop: int) -> Conversation:
        return replace(self, operations=self.operations[:start] + self.operations[stop:])


def plan(seed: int, *, interruptions: bool, pickles: bool, carries: bool) -> Conversation:
    """The conversation of a seed, with what the cache at hand can do."""
    rng = Random(seed)
    presses = tuple(any_press(rng) for _ in range(rng.choice((1, 1, 2, 3))))
    # How often a DecodingPress acts is counted for the whole batch, as is an amount in bytes.
    # Numbers between two levels of a format are rounded by the order of sums, which is another one in a batch.
    shared = any(has_amount_in_bytes(press) or "DecodingPress" in press or stores(press) for press in presses)
    compares_alone = rng.random() < 0.3 and not shared
    batch_size = rng.choice((2, 3)) if compares_alone else rng.choice((1, 1, 2, 3, 4))
    weights = {
        "turn": 30,
        "decode": 16,
        "generate": 5,
        "crop": 7,
        "mark": 5,
        "rewind": 6,
        "save_and_load": 5,
        "copy": 5,
        "pickle": 4 * pickles,
        "interrupt": 7 * interruptions,
        "compare": 6,
        "detour": 4,
        "abuse": 8,
        "reset": 1,
        "select": 6 * HAS["select"] * (not compares_alone),
        "repeat": 4 * HAS["repeat"] * (not compares_alone),
        "concat": 5 * HAS["concat"] * HAS["select"] * (not compares_alone),
    }
    kinds = rng.choices(list(weights), weights=list(weights.values()), k=rng.randint(2, 12))
    operations = [_operation(kind, rng, len(presses)) for kind in ["turn", *kinds]]
    return Conversation(
        seed=seed,
        family=rng.choice(FAMILIES),
        batch_size=batch_size,
        repeats=not compares_alone and rng.random() < 0.15,
        presses=presses,
        carries=carries and rng.random() < 0.15,
        compares_alone=compares_alone,
        operations=tuple(operations),
    )


def _operation(kind: str, rng: Random, num_presses: int) -> Operation:
    press = rng.choice((*range(num_presses), *range(num_presses), None))
    options: dict[str, Any] = {}
    if kind in ("turn", "detour", "concat", "interrupt"):
        options = {"columns": rng.choice((1, 2, 3, 5, 9, 16, 17, 24, 40)), "padding": rng.choice(_PADDING), "press": press}
    if kind in ("turn", "detour"):
        options["how"] = rng.choice(("whole", "whole", "chunks", "prefill"))
        options["chunk_size"] = rng.choice((2, 5, 7, 16)) if options["how"] != "whole" else None
    if kind == "turn" and rng.random() < 0.1:
        options["outer"] = rng.randrange(num_presses)
    if kind == "decode":
        options = {"steps": rng.randint(1, 7), "padding": rng.random() < 0.15, "press": press}
    if kind == "generate":
        options = {
            "columns": rng.randint(1, 9),
            "padding": rng.choice(("none", "left")),
            "steps": rng.randint(1, 6),
            "press": press,
        }
    if kind == "interrupt":
        options["layer"] = rng.randrange(3)
    if kind == "crop":
        options = {"columns": rng.choice((1, 1, 2, 3, 8)), "from_end": rng.random() < 0.5}
    if kind == "rewind":
        options = {"mark": rng.randrange(4)}
    if kind == "repeat":
        options = {"times": rng.choice((1, 2, 2, 3))}
    if kind == "abuse":
        options = {"how": rng.choice(ABUSES)}
    return Operation(kind, rng.getrandbits(32), options)


ABUSES = (
    "another batch size",
    "crop of more than there is",
    "mark of another cache",
    "file of another model",
    "file in a missing folder",
    "empty input",
    "mask that is too short",
    "chunks of one column",
    "beam search",
    "4D mask",
    "full cache of transformers",
    "press that keeps nothing",
)
