"""Distillation: a small projection learns what attention makes of the full keys and values; on a cache, ``distill``."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv.calibration.lowrank import LowRankMap, attend
from pikv.compression.lora import LoRACompressor
from pikv.compression.tokens import Tokens, join_heads, split_heads

_MOST_QUERIES = 256  # of each sequence that are learned from


class DistillationCompressor(LoRACompressor):
    """As ``LoRACompressor``, but the projection is the student of attention itself (arXiv 1503.02531): ``fit`` makes outputs of
    attention to what comes back from storage those of attention to the full keys and values.
    """

    method = "distillation"
    press_name = "distill"

    @torch.inference_mode(False)
    def fit(
        self,
        keys: Tensor,
        values: Tensor,
        importance: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        scaling: float | None = None,
        steps: int = 200,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> dict[str, float]:
        """Trains the matrices by gradient descent (Adam) on the error of attention's output.

        It goes on from what the matrices are, and ends with the best that it saw.

        Args:
            keys: samples, ``[B, T, hidden]`` or ``[B, G, T, D]``
            values: of the same shape
            importance: of no use here: queries say what counts
            queries: that attend to all of the tokens, ``[B, t, hidden]`` or ``[B, H, t, D]``, ``H`` a multiple of ``G``; None
                takes the keys themselves. Of more than 256 some are taken, evenly spaced
            scaling: of the products of queries and keys; one over the root of ``D`` if nothing is said
            steps: of the optimizer, each on all samples
            learning_rate: at the first step; it falls to zero in a straight line
            seed: of the dropout

        Returns:
            ``error_before`` and ``error_after`` on the samples, without dropout: the share of the sum of squares of attention's
            output that is lost

        Raises:
            ValueError: for samples that could not be compressed, none at all, and queries that do not fit the keys.
        """
        tokens = self._samples(keys, values, None)
        heads = tokens.keys.shape[1]
        asked = _checked_queries(tokens, keys if queries is None else queries, keys.dim())
        scaling = tokens.keys.shape[3] ** -0.5 if scaling is None else scaling
        full = [split_heads(join_heads(each).detach().to(self.key_map.down), heads) for each in (tokens.keys, tokens.values)]
        asked = asked.detach().to(self.key_map.down)
        taught = attend(asked, full[0], full[1], scaling)

        def loss(codes_dropout: float) -> Tensor:
            found = [self._restored(*pair, codes_dropout) for pair in zip((self.key_map, self.value_map), full, strict=True)]
            off = (attend(asked, found[0], found[1], scaling) - taught).square().sum()
            return off / taught.square().sum().clamp(min=torch.finfo(taught.dtype).tiny)

        return self._train(loss, steps, learning_rate, seed)

    def _restored(self, to_few: LowRankMap, vectors: Tensor, codes_dropout: float) -> Tensor:
        """Vectors ``[B, G, T, D]`` as they come back from storage."""
        return split_heads(self._through(to_few, join_heads(vectors), codes_dropout), vectors.shape[1])


def _checked_queries(tokens: Tokens, queries: Tensor, num_dims: int) -> Tensor:
    """Queries ``[B, G, H / G * t, D]``, some of them."""
    batch, heads, _, dim = tokens.keys.shape
    whole = queries.unsqueeze(1) if queries.dim() == 3 else queries
    fits = queries.dim() == num_dims and whole.shape[0] == batch and whole.shape[3] == dim and whole.shape[1] % heads == 0
    if not fits or whole.numel() == 0:
        raise ValueError(f"queries of shape {list(queries.shape)} do not fit keys [{batch}, {heads}, T, {dim}]")
    if not bool(whole.isfinite().all()):
        raise ValueError("there are queries that are infinite or not a number")
    some: Tensor = whole[:, :, :: -(-whole.shape[2] // _MOST_QUERIES)].unflatten(1, (heads, -1))
    return some.flatten(2, 3).clone()
