"""Codes of rotated vectors."""

from collections.abc import Sequence
from typing import Any, ClassVar

from pikv.cache.formats.turbo import BITS, TurboFormat
from pikv.checks import check_choice
from pikv.presses.registry import register_press
from pikv.presses.storage import StoragePress


@register_press(
    "turbo", group="format", paper="2504.19874", number="bits", description="Stores rotated vectors in codes of 1 to 4 bits"
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
        num_sinks: the first tokens of a row, which stay dense
        window_size: the newest tokens of a row, which stay dense
        skip_layers: layers of the model that stay dense

    Raises:
        ValueError: for other numbers of bits.
    """

    made_of_settings: ClassVar[tuple[str, ...]] = (*StoragePress.made_of_settings, "format")

    def __init__(
        self,
        bits: int = 4,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        seed: int = 0,
        num_sinks: int = 4,
        window_size: int = 64,
        skip_layers: Sequence[int] = (),
    ) -> None:
        super().__init__(num_sinks=num_sinks, window_size=window_size, skip_layers=skip_layers)
        check_choice(bits, "bits", BITS)
        self.format = TurboFormat(
            key_bits=bits if key_bits is None else key_bits,
            value_bits=bits if value_bits is None else value_bits,
            seed=seed,
        )

    def format_of(self, model: Any, layer_idx: int) -> TurboFormat:
        return self.format
