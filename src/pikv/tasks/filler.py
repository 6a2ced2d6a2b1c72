"""Filler text: a word-level Markov chain over the frequent words of Python's own documentation strings.

``filler.json`` holds the words and, per word, its most frequent successors with counts. It was made by
``python -m pikv.tasks.filler`` from the docstrings of the CPython 3.11 standard library (PSF licence).
"""

import ast
import json
import random
import re
import sysconfig
from collections import Counter
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

from pikv.tasks.words import ADJECTIVES, NOUNS

NUM_WORDS = 278
NUM_SUCCESSORS = 12
_PATH = Path(__file__).with_name("filler.json")


@cache
def _chain() -> tuple[tuple[str, ...], dict[str, tuple[list[str], list[int]]]]:
    table = json.loads(_PATH.read_text())
    chain = {word: (list(nexts), list(accumulate(nexts.values()))) for word, nexts in table.items()}
    return tuple(table), chain


def filler_words() -> tuple[str, ...]:
    """All words that filler text can contain, most frequent first."""
    return _chain()[0]


def make_filler(rng: random.Random, num_words: int) -> list[str]:
    """Returns ``num_words`` words of filler text."""
    words, chain = _chain()
    current = rng.choice(words)
    text = []
    for _ in range(num_words):
        text.append(current)
        nexts, cumulative = chain[current]
        # A fresh start now and then keeps the chain from circling through its most frequent loop.
        current = rng.choice(words) if rng.random() < 0.1 else rng.choices(nexts, cum_weights=cumulative)[0]
    return text


def _docstrings(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(ast.get_docstring(node) or "")
    return found


def _count_standard_library() -> dict[str, dict[str, int]]:
    """Counts words and pairs of words in the docstrings of the running Python's standard library."""
    reserved = {*ADJECTIVES, *NOUNS}
    texts = [re.findall(r"[a-z]{2,}|\ba\b", text.lower()) for text in _docstrings(Path(sysconfig.get_path("stdlib")))]
    counts = Counter(word for text in texts for word in text if word not in reserved)
    words = [word for word, _ in counts.most_common(NUM_WORDS)]
    successors: dict[str, Counter[str]] = {word: Counter() for word in words}
    for text in texts:
        for first, second in pairwise(word for word in text if word in successors):
            successors[first][second] += 1
    return {word: dict(nexts.most_common(NUM_SUCCESSORS)) for word, nexts in successors.items()}


if __name__ == "__main__":
    _PATH.write_text(json.dumps(_count_standard_library(), separators=(",", ":")) + "\n")
    print(f"wrote {_PATH}")
