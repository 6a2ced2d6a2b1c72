"""What decisions make on their way does not grow with rows times the longest row."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from views import HIDDEN, view_of, with_call

from pikv.budget.adaptive import AdaptiveHeadBudget
from pikv.budget.amount import Amount
from pikv.budget.uniform import UniformBudget
from pikv.cache.rows import RaggedRows
from pikv.presses.cake import CAKEScorer, LayerPreferenceBudget
from pikv.presses.chunk import ByChunkScorer
from pikv.presses.chunkkv import WholeChunksScorer
from pikv.presses.criticalkv import CriticalScorer
from pikv.presses.expected import ExpectedAttentionScorer
from pikv.presses.h2o import ObservedAttentionScorer
from pikv.presses.knorm import KeyNormScorer
from pikv.presses.lagkv import LagScorer
from pikv.presses.leverage import LeverageScorer
from pikv.presses.noncausal import NonCausalAttentionScorer
from pikv.presses.qfilters import QueryFilterScorer
from pikv.presses.random import RandomScorer
from pikv.presses.tova import LastQueryScorer
from pikv.routing.experts import EXPERTS, get_expert
from pikv.scoring.key_difference import KeyDifferenceScorer
from pikv.scoring.position import PositionScorer
from pikv.scoring.window import WindowScorer

LONGEST, KV_HEADS, GROUP, DIM, NUM_NEW = 32_768, 8, 4, 64, 48
MOST = LONGEST * DIM  # as many numbers as the longest row's keys: half a block
SCORERS = {
    "position": PositionScorer(),
    "knorm": KeyNormScorer(),
    "keydiff": KeyDifferenceScorer(),
    "snapkv": WindowScorer(),
    "cake": CAKEScorer(),
    "tova": LastQueryScorer(),
    "h2o": ObservedAttentionScorer(0.5),
    "expected": ExpectedAttentionScorer(),
    "lagkv": LagScorer(),
    "leverage": LeverageScorer(),
    "noncausal": NonCausalAttentionScorer(),
    "qfilters": QueryFilterScorer(lambda model: torch.ones(2, KV_HEADS, DIM)).bind(None),
    "random": RandomScorer(),
    "criticalkv": CriticalScorer(WindowScorer()),
    "chunkkv": WholeChunksScorer(KeyNormScorer()),
    "chunk": ByChunkScorer(WindowScorer(), 4096),
}


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that is made while it is active."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor):
                # What is expanded or cut out of another one takes no memory of its own.
                self.numel = max(self.numel, min(made.numel(), made.untyped_storage().nbytes() // made.element_size()))
        return result


@pytest.fixture(scope="module")
def skewed():
    """One head holds everything, the others 20 tokens: a rectangle of all keys would hold four times what is allowed."""
    rows = RaggedRows(1, KV_HEADS, torch.empty(0, DIM), torch.empty(0, DIM))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 1, LONGEST, DIM, generator=generator).expand(-1, KV_HEADS, -1, -1)
    rows.append(tokens, tokens.flip(2))
    rows.keep([torch.arange(0 if head == 3 else LONGEST - 20, LONGEST) for head in range(KV_HEADS)])
    queries = torch.randn(1, KV_HEADS * GROUP, NUM_NEW, DIM, generator=generator)
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(KV_HEADS * GROUP * DIM, HIDDEN)
    return with_call(view_of(rows, queries, torch.randn(1, NUM_NEW, HIDDEN), budget=rows.lengths // 2), module=module)


def largest_while(work):
    with torch.no_grad(), LargestTensor() as largest:
        work()
    return largest.numel


def test_a_rectangle_would_show(skewed):
    assert largest_while(lambda: torch.zeros(KV_HEADS, LONGEST, DIM)) > 3 * MOST


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_made_block_by_block(skewed, name):
    assert largest_while(lambda: SCORERS[name].score(skewed)) <= MOST


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_scores_are_made_block_by_block(skewed, name):
    assert largest_while(lambda: get_expert(name).rank_scores(skewed)) <= MOST


def test_shares_are_found_block_by_block(skewed):
    assert largest_while(lambda: LayerPreferenceBudget(Amount()).preference(skewed)) <= MOST
    budget, scores = AdaptiveHeadBudget(UniformBudget(Amount(0.5))), KeyNormScorer().score(skewed)
    assert largest_while(lambda: budget.counts(skewed, scores, budget.target_lengths(skewed))) <= MOST


@pytest.mark.parametrize("name", ["snapkv", "cake", "tova", "expected", "keydiff", "leverage", "noncausal", "lagkv", "h2o"])
def test_pieces_of_rows_score_as_all_rows_together(monkeypatch, name):
    generator = torch.Generator().manual_seed(1)
    rows = RaggedRows(2, KV_HEADS, torch.empty(0, DIM), torch.empty(0, DIM))
    rows.append(*torch.randn(2, 2, KV_HEADS, 300, DIM, generator=generator))
    queries = torch.randn(2, KV_HEADS * GROUP, 40, DIM, generator=generator)
    expected = SCORERS[name].score(view_of(rows, queries, torch.randn(2, 40, HIDDEN, generator=generator)))
    monkeypatch.setattr("pikv.core.views.tile_elements", lambda num_bytes: 1)
    monkeypatch.setattr("pikv.attention.mass.tile_elements", lambda num_bytes: 1)
    found = SCORERS[name].score(view_of(rows, queries, torch.randn(2, 40, HIDDEN, generator=generator)))
    torch.testing.assert_close(found, expected)
