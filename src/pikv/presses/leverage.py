"""Leverage scores: keys that point where few others do stay (Compactor, arXiv 2507.08143)."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.attention.tiles import sum_tokens, tiles
from pikv.budget.amount import Limits
from pikv.checks import check_count
from pikv.core import BlockView, LayerView, Needs
from pikv.hf.rotary import Rotary, rotary_of
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer

_FIRST_JITTER = 1e-2
_NUM_TRIES = 8


class LeverageScorer(Scorer):
    """Scores a token by the statistical leverage of its key before RoPE: how much of its direction the others do not have.

    The row's keys are centred and multiplied by a random matrix with ``sketch_dimension`` columns, the same for every sequence;
    keys that are no longer than that are left as they are.
    """

    needs = Needs()

    def __init__(self, sketch_dimension: int = 48, seed: int = 0) -> None:
        self.sketch_dimension = check_count(sketch_dimension, "sketch_dimension")
        self.seed = seed
        self.rotary: Rotary | None = None

    def bind(self, model: Any) -> "LeverageScorer":
        bound = copy(self)
        bound.rotary = rotary_of(model)
        return bound

    def score(self, view: LayerView) -> Tensor:
        # A word's keys before RoPE are all alike in the first layer, up to rounding; what is done here should add little.
        dtype = torch.float32 if view.kept.device.type == "mps" else torch.float64
        dim = view.queries.shape[3]
        places, sketch = view.key_positions, None
        if dim > self.sketch_dimension:
            sketch = self._sketch(view, dim).to(view.kept.device, dtype)

        def leverage(block: BlockView) -> Tensor:
            its_places = block.of_rows(places)
            size = max(1, block.tile_elements // (32 * dim * len(block.row_ids)))

            def keys_of(tokens: slice) -> Tensor:
                found = block.keys.new_empty((len(block.row_ids), tokens.stop - tokens.start, dim), dtype=dtype)
                for part in tiles(found.shape[1], size):
                    own = slice(tokens.start + part.start, tokens.start + part.stop)
                    keys = block.keys[:, own].float()
                    if self.rotary is not None:
                        keys = self.rotary.rotate(keys, -its_places[:, own], view.layer_idx)
                    found[:, part] = keys
                return found

            mean = sum_tokens(block.length, keys_of) / max(1, block.length)
            matrix = None if sketch is None else sketch[block.heads]

            def points_of(tokens: slice) -> Tensor:
                centred = keys_of(tokens).sub_(mean)
                return centred if matrix is None else centred @ matrix

            width = dim if matrix is None else matrix.shape[2]
            # In this type, points that are not much smaller than keys would take as much as the cache does.
            may_hold = 2 * width * mean.itemsize <= view.kept.bytes_per_token
            gram, held_points = _gram(points_of, block.length, size, may_hold)
            factor = _cholesky(gram)
            found = mean.new_empty((len(block.row_ids), block.length), dtype=torch.float32)
            for part in tiles(block.length, size):
                solved = torch.linalg.solve_triangular(factor, held_points(part).mT, upper=False)
                found[:, part] = solved.square_().sum(1)
            return found

        return view.by_block(leverage, numbers_per_token=8 * dim)

    def _sketch(self, view: LayerView, dim: int) -> Tensor:
        """A random matrix for every KV head, ``[G, D, sketch_dimension]``."""
        generator = torch.Generator().manual_seed(self.seed * 10_007 + view.layer_idx)
        shape = (view.kept.shape[1], dim, self.sketch_dimension)
        sketch: Tensor = torch.randn(shape, generator=generator) / self.sketch_dimension**0.5
        return sketch


def _gram(
    points_of: Callable[[slice], Tensor], length: int, size: int, may_hold: bool
) -> tuple[Tensor, Callable[[slice], Tensor]]:
    """The products of all channels ``[n, k, k]`` of points ``[n, t, k]``, made by ``size`` tokens, and what tells points again.

    Points that may be held are made once. Others are made again when they are asked for, and their products are added up,
    which rounds differently.
    """
    first, *others = tiles(length, size)
    points = points_of(first)
    if may_hold or not others:
        held = points if not others else points.new_empty((len(points), length, points.shape[2]))
        for part in others:
            held[:, part] = points_of(part)
        if others:
            held[:, first] = points
        return held.mT @ held, lambda tokens: held[:, tokens]
    gram = points.mT @ points
    for part in others:
        points = points_of(part)
        gram += points.mT @ points
    return gram, points_of


def _cholesky(gram: Tensor) -> Tensor:
    """The lower factors of ``gram`` ``[..., k, k]`` with as little added to each diagonal as it needs.

    Raises:
        ValueError: for matrices that are not finite.
    """
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    jitter = gram.new_full((*gram.shape[:-2], 1, 1), _FIRST_JITTER)
    for _ in range(_NUM_TRIES):
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(gram + jitter * identity)
        failed = (info != 0)[..., None, None]
        if not bool(failed.any()):
            return factor
        jitter = torch.where(failed, 10 * jitter, jitter)
    raise ValueError("these keys have no leverage: they are not finite, or too large")


@register_press("leverage", group="keys", paper="2507.08143")
class LeverageScorePress(ScorerPress):
    """Keeps tokens whose keys point where few others do, by approximate statistical leverage (Compactor, arXiv 2507.08143).

    ``sketch_dimension`` is to how many dimensions keys are projected. Needs no queries.

    Raises:
        ValueError: when applied, for a model whose rotary embedding is not known or changes with the length.
    """

    def __init__(self, compression_ratio: float = 0.5, *, sketch_dimension: int = 48, **limits: Unpack[Limits]) -> None:
        super().__init__(LeverageScorer(sketch_dimension), compression_ratio, **limits)
