"""Keys and values as codes of rotated vectors."""

from collections.abc import Sequence
from typing import Any, Literal

from pikv.cache.formats.turbo import BITS, TurboFormat
from pikv.checks import check_choice
from pikv.presses.registry import register_press
from pikv.presses.storage import StoragePress


@register_press(
    "turbo",
    group="format",
    paper="2504.19874",
    number="bits",
    description="Stores rotated keys and values as codes of 1 to 4 bits (TurboQuant).",
)
class TurboQuantPress(StoragePress):
    """Stores rotated keys and values as codes of a few bits, with a scale for each (TurboQuant, arXiv 2504.19874).

    A rotation spreads channels with large numbers over all coordinates, which then follow a known distribution: one codebook
    serves every model, nothing is calibrated, and a token takes ``bits / 8`` bytes a coordinate and two for a scale. This is
    the paper's variant for the least squared error; its further bit for unbiased products is left out.

    Args:
        bits: 4, 3, 2 or 1 for each coordinate of keys and values
        key_bits: of keys, in the place of ``bits``
        value_bits: of values, in the place of ``bits``
        seed: of the rotation
        num_sinks, window_size, skip_layers, check: see ``StoragePress``

    Raises:
        ValueError: for other numbers of bits.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        seed: int = 0,
        num_sinks: int = 4,
        window_size: int = 64,
        skip_layers: Sequence[int] | Literal["auto"] = (),
        check: bool = True,
    ) -> None:
        super().__init__(num_sinks=num_sinks, window_size=window_size, skip_layers=skip_layers, check=check)
        check_choice(bits, "bits", BITS)
        self.format = TurboFormat(
            key_bits=bits if key_bits is None else key_bits,
            value_bits=bits if value_bits is None else value_bits,
            seed=seed,
        )

    @property
    def usual_error(self) -> float:
        """Twice the largest error of 19 random models and the bundled one."""
        return {4: 0.3, 3: 0.65, 2: 1.2, 1: 2.0}[min(self.format.key_bits, self.format.value_bits)]

    def format_of(self, model: Any, layer_idx: int) -> TurboFormat:
        return self.format
