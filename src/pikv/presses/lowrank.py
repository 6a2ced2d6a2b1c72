"""Low rank: keys and values of each KV head as combinations of a few directions."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pikv.cache.coding.lowrank import most_that_saves, saves
from pikv.cache.coding.rope import Rope
from pikv.cache.formats.svd import SvdFormat
from pikv.hf.rotary import rope_of
from pikv.hf.shape import head_dim
from pikv.presses.registry import register_press
from pikv.presses.storage import StoragePress

_DIMS_PER_GROUP = 4


@register_press("svd", group="format", paper="2410.21465", number="rank")
class LowRankPress(StoragePress):
    """Stores keys and values as combinations of a few directions of their head (ShadowKV, arXiv 2410.21465).

    Every layer and KV head gets its own directions, those that hold most of what is to be stored. Keys are turned back to where
    they were before RoPE, which needs fewer directions, and on again when they are read; where a model's rotary embedding is
    not known here, and where it has none, they are stored as they are.

    Args:
        rank: directions of keys and of values; half the size of a head if nothing is said
        energy: in the place of a rank, the share of the sum of squares that the directions of every head are to hold, between
            0 and 1. Keys often have a few large directions that all of them share: a share that looks high, 0.95, can miss
            what tells them apart
        value_rank: directions of values, in the place of ``rank`` or ``energy``
        group_size: tokens that are stored at a time, with directions of their own: four times the size of a head if nothing
            else is said, so that directions take at most a quarter of what the tokens do
        num_sinks: the first tokens of a row, which stay dense
        window_size: the newest tokens of a row, which stay dense
        skip_layers, check: see ``StoragePress``

    Raises:
        ValueError: for a rank and a share of energy at once; when applied, for a rank with which a group takes no fewer bytes
            than dense tokens. (With a share of energy, what would take more is stored dense.)
    """

    alternatives: ClassVar[tuple[str, ...]] = ("rank", "energy")
    made_of_settings: ClassVar[tuple[str, ...]] = ("rank", "energy")

    def __init__(
        self,
        rank: int | None = None,
        *,
        energy: float | None = None,
        value_rank: int | None = None,
        group_size: int | None = None,
        num_sinks: int = 4,
        window_size: int = 64,
        skip_layers: Sequence[int] | Literal["auto"] = (),
        check: bool = True,
    ) -> None:
        super().__init__(num_sinks=num_sinks, window_size=window_size, skip_layers=skip_layers, check=check)
        self.rank, self.energy, self.value_rank, self.group_size = rank, energy, value_rank, group_size
        self._format(1, 1 if group_size is None else group_size)  # refuses wrong settings now

    @property
    def usual_error(self) -> float:
        """Half the directions of the bundled model's heads, which answer as all do, are off by 0.64 in one layer."""
        return 0.8

    def format_of(self, model: Any, layer_idx: int) -> SvdFormat:
        dim = head_dim(model.config)
        group_size = _DIMS_PER_GROUP * dim if self.group_size is None else self.group_size
        found = self._format(max(1, dim // 2), group_size, rope_of(model, layer_idx))
        for name in ("rank", "value_rank"):
            rank = getattr(found, name)
            if rank is not None and not saves(rank, group_size, dim):
                raise ValueError(
                    f"{name} {rank} saves nothing with heads of {dim} elements, in groups of {group_size} tokens; "
                    f"the most that does is {most_that_saves(group_size, dim)}"
                )
        return found

    def _format(self, default_rank: int, group_size: int, rope: Rope | None = None) -> SvdFormat:
        rank = default_rank if self.rank is None and self.energy is None else self.rank
        return SvdFormat(rank=rank, energy=self.energy, value_rank=self.value_rank, rope=rope, group_size=group_size)
