"""Random conversations with a PiKVCache, which must end in success or in clear errors.

    python tests/fuzz/conversations.py --minutes 20 --seed 0     # goes on from seed to seed
    python tests/fuzz/conversations.py --replay 1234             # plays one, and shortens it where it fails

Everything about a conversation follows from its seed: ``plan.py`` makes its operations, ``player.py`` carries them out on a real
cache, ``transcript.py`` knows what must come of it.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import cache as cached
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import player
import torch
from plan import Conversation, plan
from player import Player, Unusable, can_be_pickled, can_carry_a_press, compare_alone


class Finding(Exception):
    """What went wrong in a conversation; ``operation`` is the number of the operation, from 1."""

    def __init__(self, conversation: Conversation, operation: int, error: BaseException) -> None:
        self.conversation, self.operation, self.error = conversation, operation, error
        super().__init__(f"operation {operation}: {type(error).__name__}: {error}")

    @property
    def kind(self) -> str:
        """What stays the same when the conversation becomes shorter."""
        frame = traceback.extract_tb(self.error.__traceback__)[-1]
        return f"{type(self.error).__name__} {Path(frame.filename).name}:{frame.lineno}"


@cached
def abilities() -> dict[str, bool]:
    return {"interruptions": player.INTERRUPTIONS, "pickles": can_be_pickled(), "carries": can_carry_a_press()}


def conversation_of(seed: int) -> Conversation:
    return plan(seed, **abilities())


def run(conversation: Conversation) -> Counter[str]:
    """Plays a conversation; returns what was refused in it.

    Raises:
        Finding: for whatever is neither success nor a clear error.
    """
    number = 0
    try:
        together = Player(conversation)
        for number, operation in enumerate(conversation.operations, 1):
            together.play(operation)
        number += 1
        together.finish()
        if conversation.compares_alone:
            compare_alone(together, conversation)
    except Unusable as end:
        return together.refusals + Counter([f"(given up: {end})"])
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and not any(each.kind == "interrupt" for each in conversation.operations):
            raise
        raise Finding(conversation, number, error) from error
    return together.refusals


def shortened(finding: Finding) -> Finding:
    """Drops operations, sequences and presses as long as the same goes wrong."""

    def fails(candidate: Conversation) -> Finding | None:
        try:
            run(candidate)
        except Finding as found:
            return found if found.kind == finding.kind else None
        return None

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


def report(finding: Finding) -> None:
    print(f"\nFAILED {finding}\n{finding.conversation}")
    shorter = shortened(finding)
    print(f"\nshortened: {shorter}\n{shorter.conversation}\n")
    traceback.print_exception(shorter.error, limit=-8, chain=False, file=sys.stdout)
    print(f"\nreplay: python tests/fuzz/conversations.py --replay {finding.conversation.seed}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="the first conversation")
    parser.add_argument("--replay", type=int, help="play this conversation only")
    parser.add_argument("--findings", type=int, default=1, help="stop after so many different ones")
    arguments = parser.parse_args()
    use_strict_memory()
    if arguments.replay is not None:
        print(conversation_of(arguments.replay))
        try:
            refusals = run(conversation_of(arguments.replay))
        except Finding as finding:
            report(finding)
            return 1
        print(f"nothing found; refused: {dict(refusals)}")
        return 0
    return go_on(arguments.seed, arguments.minutes, arguments.findings)


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
        try:
            refusals += run(conversation_of(seed + number))
        except Finding as finding:
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


if __name__ == "__main__":
    sys.exit(main())
