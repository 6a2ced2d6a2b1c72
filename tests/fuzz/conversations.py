"""Random conversations with a PiKVCache, which must end in success or in clear errors.

    python tests/fuzz/conversations.py --minutes 20 --seed 0     # goes on from seed to seed
    python tests/fuzz/conversations.py --replay 1234             # plays one, and shortens it where it fails

Everything about a conversation follows from its seed: ``plan.py`` makes its operations, ``player.py`` carries them out on a
real cache, ``transcript.py`` knows what must come of it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from search import conversation_of, go_on, replay, use_strict_memory


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="the first conversation")
    parser.add_argument("--replay", type=int, metavar="SEED", help="play this conversation only")
    parser.add_argument("--findings", type=int, default=1, help="stop after so many different ones")
    arguments = parser.parse_args()
    use_strict_memory()
    if arguments.replay is not None:
        return replay(conversation_of(arguments.replay))
    return go_on(arguments.seed, arguments.minutes, arguments.findings)


if __name__ == "__main__":
    sys.exit(main())
