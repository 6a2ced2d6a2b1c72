"""LoRA: keys and values behind projections that are trained on the model when it is first used."""

from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

from pikv.cache.coding.lowrank import most_that_saves, saves
from pikv.cache.formats.lora import LoraFormat, LoraMaps
from pikv.calibration.projections import METHODS, Method, Projections, find_projections
from pikv.checks import check_count
from pikv.hf.shape import head_dim
from pikv.presses.registry import register_press
from pikv.presses.storage import StoragePress
from pikv.registry import unknown

_formats: WeakKeyDictionary[Projections, dict[int, LoraMaps]] = WeakKeyDictionary()


@register_press(
    "distill",
    group="format",
    paper="1503.02531",
    options={"method": "distill"},
    number="rank",
    description="Stores few numbers a token, by projections that learned to give attention's output",
)
@register_press(
    "loraplus",
    group="format",
    paper="2402.12354",
    options={"method": "loraplus"},
    number="rank",
    description="Stores few numbers a token, by projections whose way up was trained at a higher rate (LoRA+)",
)
@register_press(
    "lora",
    group="format",
    paper="2106.09685",
    options={"method": "lora"},
    number="rank",
    description="Stores few numbers a token, by projections that were trained to lose little of keys and values",
)
class LoRAPress(StoragePress):
    """Stores keys and values as few numbers each, by projections that all texts share (LoRA's form, arXiv 2106.09685).

    Every layer and KV head has its own. They are trained on the model when the press is first applied to it, on texts with
    questions (random tokens for a model without a tokenizer), and remembered for the model object. Keys are projected as they
    were before RoPE, where it is known. The matrices that read the numbers lie beside them in the cache, and are counted.

    Args:
        rank: numbers that stand for a key, and for a value; half the size of a head if nothing is said
        method: "lora" trains on the error of keys and values, "loraplus" so with a higher learning rate for the way up
            (arXiv 2402.12354), "distill" on the error of attention's output for what comes after a text
        steps: of training
        group_size: tokens that are stored at a time
        num_sinks: the first tokens of a row, which stay dense
        window_size: the newest tokens of a row, which stay dense
        skip_layers, check: see ``StoragePress``

    Raises:
        ValueError: for an unknown method and numbers below 1; when applied, for a rank with which a group of tokens takes no
            fewer bytes than dense ones.
    """

    def __init__(
        self,
        rank: int | None = None,
        *,
        method: Method = "lora",
        steps: int = 100,
        group_size: int = 128,
        num_sinks: int = 4,
        window_size: int = 64,
        skip_layers: Sequence[int] | Literal["auto"] = (),
        check: bool = True,
    ) -> None:
        super().__init__(num_sinks=num_sinks, window_size=window_size, skip_layers=skip_layers, check=check)
        self.rank = None if rank is None else check_count(rank, "rank")
        if method not in METHODS:
            raise unknown("method", str(method), METHODS)
        self.method = method
        self.steps = check_count(steps, "steps")
        self.group_size = check_count(group_size, "group_size")

    @property
    def usual_error(self) -> float:
        """The bundled model is right with half the numbers of a head (off by 0.38), and often wrong with a quarter (0.73)."""
        return 0.6

    def format_of(self, model: Any, layer_idx: int) -> LoraMaps:
        dim = head_dim(model.config)
        rank = max(1, dim // 2) if self.rank is None else self.rank
        if not saves(rank, self.group_size, dim):
            raise ValueError(
                f"rank {rank} saves nothing with heads of {dim} elements, in groups of {self.group_size} tokens; "
                f"the most that does is {most_that_saves(self.group_size, dim)}"
            )
        return _format(find_projections(model, rank, self.method, steps=self.steps)[layer_idx], self.group_size)


def _format(found: Projections, group_size: int) -> LoraMaps:
    """The format of a layer: the same object for the same projections, by which what is known of it is found again."""
    known = _formats.setdefault(found, {})
    if group_size not in known:
        known[group_size] = LoraMaps(
            settings=LoraFormat(rope=found.rope, group_size=group_size),
            key_down=found.keys.down.detach(),
            key_up=found.keys.up.detach(),
            value_down=found.values.down.detach(),
            value_up=found.values.up.detach(),
        )
    return known[group_size]
