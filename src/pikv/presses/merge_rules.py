"""How evicted tokens are folded into kept ones: the rules of CaM and of D2O."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from pikv.attention.mass import attention_mass
from pikv.attention.tiles import tiles
from pikv.checks import check_count, check_share
from pikv.core import BlockView, Needs
from pikv.scoring.draws import draws


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a rule made of the kept tokens of ``n`` rows, ``k`` in each.

    Attributes:
        keys: ``[n, k, D]``; None where they stay as they are
        values: ``[n, k, Dv]``
        num_merged: evicted tokens that went into kept ones, of each row ``[n]`` (int64)
        noted: a number for each row that the rule is given back when tokens of it are next evicted, ``[n]``
    """

    keys: Tensor | None
    values: Tensor
    num_merged: Tensor
    noted: Tensor


class MergeRule(ABC):
    """Folds evicted tokens into kept ones, row by row."""

    needs = Needs()
    """What it looks at beside positions, keys and values."""

    @abstractmethod
    def merge(self, block: BlockView, kept: Tensor, evicted: Tensor, noted: Tensor) -> Merged:
        """The kept tokens with what they take over of the evicted ones.

        ``block`` shows the rows as they were; ``kept`` ``[n, k]`` and ``evicted`` ``[n, e]`` number their tokens, ascending, at
        least one each. ``noted`` ``[n]`` (float32) is what was noted of the rows the last time; NaN for those of which nothing
        was evicted before. Tokens into which nothing goes stay as they are, to the bit.
        """


class CaMRule(MergeRule):
    """Adds the value of an evicted token, in equal parts, to those of the next ``merge_budget`` kept tokens (CaM, ICML 2024).

    It is added with a probability: the attention mass that the evicted token got, over the mean of those ``merge_budget``
    tokens, at most 1. So the kept tokens bring, on average, what queries that attend to them alike would have got from the
    evicted one. Masses are those of the queries that the decision is shown: of the text that was just read, or of the newest
    generated tokens. Where fewer kept tokens follow, these share it; where none does, the token is dropped. Keys stay.

    Whether a token is added is decided by a number in [0, 1) that depends on ``seed``, layer, KV head and true position alone:
    neither padding nor the batch changes it. With ``seed`` None the probability itself is the share that is added.
    """

    needs = Needs(queries=True, logsumexp=True)

    def __init__(self, merge_budget: int, seed: int | None) -> None:
        self.merge_budget = check_count(merge_budget, "merge_budget")
        self.seed = None if seed is None else check_count(seed, "seed", least=0)

    def merge(self, block: BlockView, kept: Tensor, evicted: Tensor, noted: Tensor) -> Merged:
        num_rows, num_kept = kept.shape
        mass = attention_mass(block.queries, block.keys, block.positions, block.query_positions, block.params, block.logsumexp)
        first = torch.searchsorted(kept, evicted)  # the first kept token behind each evicted one, num_kept for none
        taker_mass = pad(mass.gather(1, kept), (0, self.merge_budget)).unfold(1, self.merge_budget, 1).sum(2)
        num_takers = (num_kept - torch.arange(num_kept + 1, device=mass.device)).clamp(max=self.merge_budget)
        mean_mass = (taker_mass / num_takers.clamp(min=1)).gather(1, first)
        share = (mass.gather(1, evicted) / mean_mass).nan_to_num(nan=0.0, posinf=1.0).clamp(0, 1)
        share = share.masked_fill(first == num_kept, 0.0)
        if self.seed is not None:
            share = (self._draws(self.seed, block, evicted) < share).float()
        part = share / num_takers[first].clamp(min=1)
        # Evicted tokens between the same two kept ones go into the same ones, so they are added up first.
        values = block.values
        added = values.new_zeros((num_rows, num_kept + 1, values.shape[2]), dtype=torch.float32)
        for tile in tiles(evicted.shape[1], _tile_size(block, values)):
            parts = taken(values, evicted[:, tile]).float() * part[:, tile].unsqueeze(2)
            added.scatter_add_(1, _wide(first[:, tile], values), parts)
        total = taken(values, kept).float()
        for offset in range(min(self.merge_budget, num_kept)):
            total[:, offset:] += added[:, : num_kept - offset]
        return Merged(keys=None, values=total.to(values.dtype), num_merged=(share > 0).sum(1), noted=noted)

    @staticmethod
    def _draws(seed: int, block: BlockView, evicted: Tensor) -> Tensor:
        positions = block.positions.long().gather(1, evicted)
        heads = torch.tensor(block.heads, device=positions.device).unsqueeze(1)
        layer = torch.full_like(heads, block.view.layer_idx)
        # One counter more than RandomPress has, whose numbers say which tokens are evicted: these must not depend on them.
        return draws(seed, layer, heads, positions, torch.ones_like(heads))


class D2ORule(MergeRule):
    """Averages an evicted token with the kept one whose key is most like it, if it is like enough (D2O, arXiv 2406.13035).

    The likeness of two tokens is the cosine of their keys, as they are cached, after RoPE. An evicted token whose likeness to
    its nearest kept one reaches the row's threshold is merged, others are dropped. The threshold is the mean of these
    likenesses when tokens of the row are evicted for the first time; later it moves on to ``beta`` times their mean plus
    ``1 - beta`` times what it was. Keys and values of a kept token become the mean of its own, of weight e, and of those merged
    into it, each with exp(likeness) as its weight: e is the weight of a token's likeness to itself.

    The paper evicts single tokens while decoding and writes the likeness of that token for the mean. Each KV head has a
    threshold of its own, since each may evict other tokens.
    """

    def __init__(self, beta: float) -> None:
        self.beta = check_share(beta, "beta")

    def merge(self, block: BlockView, kept: Tensor, evicted: Tensor, noted: Tensor) -> Merged:
        keys, values = block.keys, block.values
        likeness, nearest = self._nearest(block, kept, evicted)
        mean = likeness.mean(1)
        threshold = torch.where(noted.isnan(), mean, self.beta * mean + (1 - self.beta) * noted)
        is_merged = likeness >= threshold.unsqueeze(1)
        weights = likeness.exp() * is_merged
        total = torch.full(kept.shape, math.e, device=keys.device).scatter_add_(1, nearest, weights)
        num_takers = torch.zeros_like(total).scatter_add_(1, nearest, is_merged.float())
        merged = []
        for tokens in (keys, values):
            own = taken(tokens, kept)
            sums = own.float() * math.e
            for tile in tiles(evicted.shape[1], _tile_size(block, tokens)):
                parts = taken(tokens, evicted[:, tile]).float() * weights[:, tile].unsqueeze(2)
                sums.scatter_add_(1, _wide(nearest[:, tile], tokens), parts)
            means = (sums / total.unsqueeze(2)).to(tokens.dtype)
            merged.append(torch.where((num_takers > 0).unsqueeze(2), means, own))
        return Merged(keys=merged[0], values=merged[1], num_merged=is_merged.sum(1), noted=threshold)

    @staticmethod
    def _nearest(block: BlockView, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
        """The likeness of each evicted token to the kept one most like it, ``[n, e]``, and the number of that one."""
        directions = normalize(taken(block.keys, kept).float(), dim=2).transpose(1, 2)
        found = []
        for tile in tiles(evicted.shape[1], max(1, block.tile_elements // kept.numel())):
            asked = normalize(taken(block.keys, evicted[:, tile]).float(), dim=2)
            found.append((asked @ directions).max(2))
        likeness, nearest = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
        return likeness, nearest


def taken(tokens: Tensor, numbers: Tensor) -> Tensor:
    """The tokens of ``[n, L, D]`` with the given numbers ``[n, l]``."""
    return tokens.gather(1, _wide(numbers, tokens))


def _wide(numbers: Tensor, tokens: Tensor) -> Tensor:
    """Numbers ``[n, l]`` of whole tokens, for ``gather`` and its like."""
    return numbers.unsqueeze(2).expand(-1, -1, tokens.shape[2])


def _tile_size(block: BlockView, tokens: Tensor) -> int:
    """How many tokens of every row may be worked on at a time."""
    return max(1, block.tile_elements // (tokens.shape[0] * tokens.shape[2]))
