"""How much working memory may hold at a time: the one rule for what is computed piece by piece."""

from collections.abc import Callable, Iterator

from torch import Tensor

LEAST_ELEMENTS = 1 << 20
"""Below this many numbers smaller pieces save little memory and take more time."""
MOST_ELEMENTS = 1 << 22
"""Above this many numbers larger pieces save no time."""
_SUMMED_AT_ONCE = 4096


def tile_elements(num_bytes: int) -> int:
    """Elements of the largest temporary tensor beside keys and values of ``num_bytes``: a quarter of these bytes in float32.

    Never fewer than ``LEAST_ELEMENTS`` nor more than ``MOST_ELEMENTS``.

    >>> tile_elements(80 << 20), tile_elements(32 << 20), tile_elements(0)
    (4194304, 2097152, 1048576)
    """
    return min(MOST_ELEMENTS, max(LEAST_ELEMENTS, num_bytes // 16))


def tiles(length: int, size: int) -> Iterator[slice]:
    """Cuts ``length`` tokens into slices of ``size``; the last may be shorter. One empty slice where there are none.

    >>> [(tile.start, tile.stop) for tile in tiles(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, max(1, length), size):
        yield slice(start, min(start + size, length))


def sum_tokens(length: int, tokens: Callable[[slice], Tensor]) -> Tensor:
    """The sum ``[n, 1, ...]`` of ``tokens``, which makes those in a slice of ``length``, ``[n, t, ...]``, over all of them.

    The same to the bit as the sum of one tensor of them all: torch's CPU kernel adds sums of 16 numbers, then 16 of these, and
    so on up to 4,096.
    """
    first, *others = tiles(length, _SUMMED_AT_ONCE)
    total = tokens(first).sum(1, keepdim=True)
    for tile in others:
        total += tokens(tile).sum(1, keepdim=True)
    return total
