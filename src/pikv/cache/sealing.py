"""Which tokens are brought into a format: all, or those between the first ones and the newest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pikv.cache.formats.base import Format


@runtime_checkable
class PerRowFormat(Protocol):
    """A format with something of its own for every row of a layer, such as which channels stay."""

    def for_rows(self, row_ids: Sequence[int]) -> Format:
        """The format for the rows ``r = b * G + g`` that are encoded together, in this order."""


@dataclass(frozen=True, kw_only=True)
class Sealing:
    """How the dense tokens of rows are sealed.

    Attributes:
        format: the format that they are brought into
        sinks: the first tokens of a row, which stay dense: attention looks at them whatever they say
        window: the newest tokens of a row, which stay dense
    """

    format: Format
    sinks: int = 0
    window: int = 0

    def format_for(self, row_ids: Sequence[int]) -> Format:
        """The format for some rows ``r = b * G + g`` of the layer."""
        return self.format.for_rows(row_ids) if isinstance(self.format, PerRowFormat) else self.format

    def span(self, num_sealed: int, num_dense: int) -> tuple[int, int]:
        """How many of the ``num_dense`` tokens behind ``num_sealed`` ones stay as sinks, and how many of the next to seal."""
        first = 0 if num_sealed else self.sinks
        count = max(0, num_dense - first - self.window)
        return first, count - count % self.format.group_size
