"""Conversations one after the other, and those that fail made shorter."""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import cache as cached
from pathlib import Path

import passes
import torch
from passes import UnusableCacheError, can_be_pickled, can_carry_a_press
from plan import Conversation, plan
from player import Player, compare_alone

# What is known to go wrong and waits for its repair: patterns of the error, and of the conversation. To be empty.
KNOWN: tuple[tuple[str, str], ...] = ()


class ConversationError(Exception):
    """What went wrong in a conversation; ``operation`` is the number of the operation, from 1."""

    def __init__(self, conversation: Conversation, operation: int, error: BaseException) -> None:
        self.conversation, self.operation, self.error = conversation, operation, error
        super().__init__(f"operation {operation}: {type(error).__name__}: {error}")

    @property
    def is_known(self) -> bool:
        return any(re.search(error, str(self)) and re.search(text, str(self.conversation)) for error, text in KNOWN)

    @property
    def kind(self) -> str:
        """What stays the same when the conversation becomes shorter."""
        frames = traceback.extract_tb(self.error.__traceback__)
        frame = frames[-1 if frames[-1].name != "require" else -2]
        return f"{type(self.error).__name__} {Path(frame.filename).name}:{frame.lineno}"


@cached
def abilities() -> dict[str, bool]:
    return {"interruptions": passes.INTERRUPTIONS, "pickles": can_be_pickled(), "carries": can_carry_a_press()}


def conversation_of(seed: int) -> Conversation:
    return plan(seed, **abilities())


def run(conversation: Conversation) -> Counter[str]:
    """Plays a conversation; returns what was refused in it.

    Raises:
        ConversationError: for whatever is neither success nor a clear error.
    """
    number, together = 0, Player(conversation)
    try:
        for operation in conversation.operations:
            number += 1
            together.play(operation)
        number += 1
        together.finish()
        if conversation.compares_alone:
            compare_alone(together, conversation)
    except UnusableCacheError as end:
        return together.refusals + Counter([f"(given up: {end})"])
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and not any(each.kind == "interrupt" for each in conversation.operations):
            raise
        finding = ConversationError(conversation, number, error)
        if finding.is_known:
            return together.refusals + Counter([f"(known: {type(error).__name__}: {error})"])
        raise finding from error
    return together.refusals


def outcome_of(conversation: Conversation) -> tuple[ConversationError | None, Counter[str]]:
    """What went wrong, if something did, and what was refused.

    Nothing is played while an error is handled: that changes which errors come.
    """
    try:
        return None, run(conversation)
    except ConversationError as error:
        return error, Counter()


def shortened(finding: ConversationError) -> ConversationError:
    """Drops operations, sequences and presses as long as the same goes wrong."""

    def fails(candidate: Conversation) -> ConversationError | None:
        found, _ = outcome_of(candidate)
        return found if found and found.kind == finding.kind else None

    progress = True
    while progress:
        progress = False
        current = finding.conversation
        smaller = [current.without(index, index + 1) for index in reversed(range(len(current.operations)))]
        smaller += [replace(current, batch_size=size) for size in range(1, current.batch_size)]
        smaller += [replace(current, compares_alone=False)] * current.compares_alone
        for candidate in smaller:
            if found := fails(candidate):
                finding, progress = found, True
                break
    return finding


def report(finding: ConversationError) -> None:
    print(f"\nFAILED {finding}\n{finding.conversation}")
    shorter = shortened(finding)
    print(f"\nshortened: {shorter}\n{shorter.conversation}\n")
    traceback.print_exception(shorter.error, limit=-8, chain=False, file=sys.stdout)
    print(f"\nreplay: python tests/fuzz/conversations.py --replay {finding.conversation.seed}", flush=True)


def replay(conversation: Conversation) -> int:
    """Plays one conversation; returns the exit status."""
    print(conversation)
    finding, refusals = outcome_of(conversation)
    if finding:
        report(finding)
        return 1
    print(f"nothing found; refused: {dict(refusals)}")
    return 0


def use_strict_memory() -> None:
    """One thread, and uninitialised memory that spoils results, as in all tests."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def go_on(seed: int, minutes: float, most_findings: int) -> int:
    """Plays one conversation after the other; returns the exit status."""
    start = said = time.monotonic()
    refusals: Counter[str] = Counter()
    findings: Counter[str] = Counter()  # by kind: one cause shows in many conversations
    number = 0
    print(f"with {', '.join(name for name, on in abilities().items() if on) or 'no optional operations'}")
    while time.monotonic() - start < 60 * minutes and len(findings) < most_findings:
        finding, refused = outcome_of(conversation_of(seed + number))
        refusals += refused
        if finding:
            findings[finding.kind] += 1
            if findings[finding.kind] == 1:
                report(finding)
        number += 1
        if time.monotonic() - said > 15:
            said = time.monotonic()
            print(
                f"{(said - start) / 60:.1f} of {minutes:g} minutes, {number} conversations, {len(findings)} findings",
                flush=True,
            )
    print("\nrefused:")
    for message, count in refusals.most_common():
        print(f"{count:6d}  {message}")
    for kind, count in findings.most_common():
        print(f"{count:6d}  FAILED {kind}")
    print(f"{number} conversations from seed {seed} on, {len(findings)} findings")
    return 1 if findings else 0
