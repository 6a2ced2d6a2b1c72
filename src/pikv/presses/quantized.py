"""Keys and values as whole numbers of a few bits."""

from collections.abc import Sequence
from typing import Any, Literal

from pikv.cache.formats.int import IntFormat
from pikv.presses.registry import register_press
from pikv.presses.storage import StoragePress


@register_press(
    "int2",
    group="format",
    paper="2402.02750",
    options={"bits": 2},
    number=None,
    description="Stores keys and values as whole numbers of 2 bits (KIVI).",
)
@register_press(
    "int4",
    group="format",
    paper="2402.02750",
    options={"bits": 4},
    number=None,
    description="Stores keys and values as whole numbers of 4 bits (KIVI).",
)
@register_press(
    "int8",
    group="format",
    paper="2402.02750",
    options={"bits": 8},
    number=None,
    description="Stores keys and values as whole numbers of 8 bits (KIVI).",
)
class QuantizedPress(StoragePress):
    """Stores keys and values as whole numbers of a few bits, keys by channel and values by token (KIVI, arXiv 2402.02750).

    Args:
        bits: 8, 4 or 2, of keys and values
        key_bits: of keys, in the place of ``bits``
        value_bits: of values, in the place of ``bits``
        group_size: tokens whose keys share the scale of a channel: 64, or 32 with two bits, if nothing is said
        key_axis: "token" gives keys scales as values have them; channels with large numbers then spoil the others
        symmetric: whether levels lie evenly around zero, without a lowest level of each group
        num_sinks, window_size, skip_layers, check: see ``StoragePress``
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        group_size: int | None = None,
        key_axis: Literal["channel", "token"] = "channel",
        symmetric: bool = False,
        num_sinks: int = 4,
        window_size: int = 64,
        skip_layers: Sequence[int] | Literal["auto"] = (),
        check: bool = True,
    ) -> None:
        super().__init__(num_sinks=num_sinks, window_size=window_size, skip_layers=skip_layers, check=check)
        key_bits = bits if key_bits is None else key_bits
        self.format = IntFormat(
            key_bits=key_bits,
            value_bits=bits if value_bits is None else value_bits,
            group_size=(32 if key_bits == 2 else 64) if group_size is None else group_size,
            key_axis=key_axis,
            symmetric=symmetric,
        )

    @property
    def usual_error(self) -> float:
        """Twice the largest error of 19 random models and the bundled one, but no more than the output itself."""
        return {8: 0.03, 4: 0.4, 2: 1.0}[min(self.format.key_bits, self.format.value_bits)]

    def format_of(self, model: Any, layer_idx: int) -> IntFormat:
        return self.format
