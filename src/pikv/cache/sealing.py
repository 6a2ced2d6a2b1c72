"""Which tokens are brought into a format: all, or those between the first ones and the newest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pikv.cache.formats.base import FORMATS, Format


@runtime_checkable
class FormatByRow(Protocol):
    """A format with something of its own for every row of a layer, such as which channels stay."""

    def of_rows(self, row_ids: Sequence[int]) -> Format:
        """The format as it is for rows ``r = b * G + g`` that are encoded together."""


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

    @classmethod
    def whole(cls, name: str) -> "Sealing":
        """All tokens, in a format without settings.

        Raises:
            ValueError: for an unknown name.
        """
        segments = FORMATS[name]
        if not hasattr(segments, "encode"):
            raise ValueError(f"the format {name!r} has settings: give those, an object, in the place of its name")
        return cls(format=segments)

    def format_of(self, row_ids: Sequence[int]) -> Format:
        """The format that these rows of the layer are brought into."""
        return self.format.of_rows(row_ids) if isinstance(self.format, FormatByRow) else self.format

    def span(self, num_sealed: int, num_dense: int) -> tuple[int, int]:
        """Of the ``num_dense`` tokens behind ``num_sealed`` ones: how many are passed over as sinks, and how many to seal."""
        first = 0 if num_sealed else self.sinks
        count = max(0, num_dense - first - self.window)
        return first, count - count % self.format.group_size
