"""Scorers that wrap others, against their formulas in plain arithmetic."""

from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D
from views import DIM, HEADS, HIDDEN, KV_HEADS, attention_of, keys_of, ragged_view, rows_of, stored_view, values_of, with_call

from pikv.core import Needs, Reread
from pikv.hf.support import attention_modules
from pikv.presses.chunk import ByChunkScorer
from pikv.presses.chunkkv import WholeChunksScorer
from pikv.presses.criticalkv import CriticalScorer
from pikv.presses.h2o import ObservedAttentionScorer
from pikv.presses.knorm import KeyNormScorer
from pikv.scoring.base import Scorer
from pikv.scoring.output import output_norms
from pikv.scoring.window import WindowScorer
from tiny import FAMILIES, build

GROUP = HEADS // KV_HEADS


class Given(Scorer):
    """Gives scores by true position, and remembers what it was bound to and shown."""

    needs = Needs(logsumexp=True, observes=True, reread=Reread(chunk_size=3))

    def __init__(self, table):
        self.table = table
        self.model = None
        self.shown = []

    def bind(self, model):
        bound = Given(self.table)
        bound.model = model
        return bound

    def score(self, view):
        self.shown.append(view)
        return torch.stack(
            [row.gather(1, place.clamp(min=0).long()) for row, place in zip(self.table, view.kept.positions, strict=True)]
        )


def random_table(seed=0):
    return torch.rand((2, KV_HEADS, 40), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wrap", [CriticalScorer, WholeChunksScorer, ByChunkScorer])
def test_wrappers_bind_what_they_wrap_and_ask_for_what_it_needs(wrap):
    scorer = wrap(Given(random_table()))
    bound = scorer.bind("model")
    assert (scorer.inner.model, bound.inner.model) == (None, "model")
    # The log-sum-exp of attention to the whole context is of no use within a chunk.
    assert bound.needs == scorer.needs == replace(Given.needs, logsumexp=wrap is not ByChunkScorer)


class Attention(torch.nn.Module):
    def __init__(self, name, layer):
        super().__init__()
        setattr(self, name, layer)


def output_layer(name):
    torch.manual_seed(0)
    return Conv1D(HIDDEN, HEADS * DIM) if name == "c_proj" else torch.nn.Linear(HEADS * DIM, HIDDEN)


@pytest.mark.parametrize("name", ["o_proj", "out_proj", "c_proj", "dense"])
@pytest.mark.parametrize("inner", ["given", "negative"])
def test_critical(name, inner):
    layer = output_layer(name)
    view = with_call(ragged_view(), module=Attention(name, layer))
    scorer = Given(random_table()) if inner == "given" else KeyNormScorer()
    scores = CriticalScorer(scorer, epsilon=0.1, first_stage_ratio=0.4).score(view)
    num_given = scorer.score(view)
    layer.requires_grad_(False)
    nothing = layer(torch.zeros(HEADS * DIM))
    for b, g, valid in rows_of(view):
        row = num_given[b, g, valid].tolist()
        first = sorted(range(len(row)), key=lambda slot: -row[slot])[: int(0.4 * int(view.budget[b, g]))]
        for slot, score in enumerate(row):
            norm = 0.0
            for head in range(g * GROUP, (g + 1) * GROUP):
                attended = torch.zeros(HEADS * DIM)
                attended[head * DIM : (head + 1) * DIM] = values_of(view, b, g)[slot]
                norm += float((layer(attended) - nothing).abs().sum()) / GROUP
            expected = (score - min(0.0, *row) + 0.1) * norm
            assert scores[b, g, slot] == (float("inf") if slot in first else pytest.approx(expected, rel=1e-4))


def test_critical_leaves_what_its_scorer_insists_on_and_is_never_nan():
    def edit(keys, values):
        values[0] = 0.0

    view = with_call(ragged_view(edit=edit), module=Attention("dense", output_layer("dense")))
    scores = CriticalScorer(ObservedAttentionScorer(recent_ratio=0.5), first_stage_ratio=0.0).score(view)
    assert not scores.isnan().any()
    for b, g, valid in rows_of(view):
        recent = int(view.budget[b, g]) // 2
        assert scores[b, g, valid].isposinf().sum() == recent
        assert scores[b, g, valid][valid.stop - recent :].isposinf().all()


def test_critical_needs_an_output_projection():
    with pytest.raises(ValueError, match="Identity has no output projection of 32 inputs"):
        CriticalScorer(KeyNormScorer()).score(ragged_view())
    with pytest.raises(ValueError, match="Attention has no output projection"):
        CriticalScorer(KeyNormScorer()).score(with_call(ragged_view(), module=Attention("o_proj", torch.nn.Linear(7, HIDDEN))))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_projection_of_every_family_is_found(family):
    model = build(family)
    config = model.config
    module = attention_modules(model)[0]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = torch.randn(2, heads, 5, dim)
    view = with_call(stored_view(values, values, num_heads=config.num_attention_heads), module=module)
    layer = next(getattr(module, n) for n in ("o_proj", "out_proj", "c_proj", "dense") if hasattr(module, n))
    group = config.num_attention_heads // heads
    expected = 0.0
    with torch.no_grad():
        for head in range(group):
            attended = torch.zeros(config.num_attention_heads * dim)
            attended[head * dim : (head + 1) * dim] = values[1, 0, 3]
            expected += float((layer(attended) - layer(torch.zeros_like(attended))).abs().sum()) / group
    assert output_norms(view).mean(2)[1, 0, 3] == pytest.approx(expected, rel=1e-3)


def chunk_order(view, b, num_given, length):
    """Chunks, the best first: those with the largest share of infinite scores, then by their mean."""
    chunks = {}
    for g in range(KV_HEADS):
        for slot in range(int(view.kept.lengths[b, g])):
            chunks.setdefault(int(view.kept.positions[b, g, slot]) // length, []).append(float(num_given[b, g, slot]))

    def value(chunk):
        finite = [0.0 if score == float("inf") else score for score in chunks[chunk]]
        return (-chunks[chunk].count(float("inf")) / len(finite), -sum(finite) / len(finite))

    return sorted(chunks, key=value)


@pytest.mark.parametrize("length", [1, 7, 20, 64])
@pytest.mark.parametrize("inner", ["given", "infinite", "negative"])
def test_whole_chunks_come_in_one_order_for_all_heads(length, inner):
    view = ragged_view()
    scorers = {"given": Given(random_table()), "infinite": ObservedAttentionScorer(0.5), "negative": KeyNormScorer()}
    num_given = scorers[inner].score(view)
    scores = WholeChunksScorer(scorers[inner], length).score(view)
    for b, g, valid in rows_of(view):
        order = chunk_order(view, b, num_given, length)
        row = num_given[b, g, valid].tolist()
        chunk = [position // length for position in view.kept.positions[b, g, valid].tolist()]
        expected = sorted(range(len(row)), key=lambda slot: (order.index(chunk[slot]), -row[slot], slot))
        assert scores[b, g, valid].argsort(descending=True, stable=True).tolist() == expected


@pytest.mark.parametrize("length", [6, 16, 100])
def test_by_chunk_gives_evenly_spaced_places_within_each_chunk(length):
    view, inner = ragged_view(), Given(random_table())
    scores = ByChunkScorer(inner, length).score(view)
    for b, g, valid in rows_of(view):
        place = view.kept.positions[b, g, valid].tolist()
        for chunk in {position // length for position in place}:
            slots = [slot for slot, position in enumerate(place) if position // length == chunk]
            ranked = sorted(slots, key=lambda slot: -float(inner.table[b, g, place[slot]]))
            expected = [1 - (rank + 0.5) / len(slots) for rank in range(len(slots))]
            assert scores[b, g, ranked].tolist() == pytest.approx(expected)


def test_by_chunk_shows_a_chunks_tokens_and_queries_only():
    view, inner, length = replace(ragged_view(), reread=random_table()[..., :30]), Given(random_table()), 10
    ByChunkScorer(inner, length).score(view)
    assert len(inner.shown) == 4
    for start, shown in zip(range(0, 40, length), inner.shown, strict=True):
        stop = start + length
        for b, g, valid in rows_of(view):
            inside = (view.kept.positions[b, g, valid] >= start) & (view.kept.positions[b, g, valid] < stop)
            num = int(shown.kept.lengths[b, g])
            assert num == int(inside.sum())
            assert torch.equal(shown.kept.positions[b, g, :num], view.kept.positions[b, g, valid][inside])
            assert (shown.kept.positions[b, g, num:] == -1).all()
            if num:
                assert torch.equal(keys_of(shown, b, g), keys_of(view, b, g)[inside])
                assert torch.equal(values_of(shown, b, g), values_of(view, b, g)[inside])
            torch.testing.assert_close(shown.reread[b, g, :num], view.reread[b, g, valid][inside])
        for b in range(2):
            present = view.query_positions[b][view.is_token[b]]
            own = present[(present >= start) & (present < stop)]
            if len(own) == 0 and stop <= int(present[0]):
                own = present[:length]  # an earlier turn's chunk
            assert shown.query_positions[b][shown.is_token[b]].tolist() == own.tolist()
            columns = [view.query_positions[b].tolist().index(position) for position in own.tolist()]
            torch.testing.assert_close(shown.queries[b][:, shown.is_token[b]], view.queries[b][:, columns])
            torch.testing.assert_close(shown.hidden_states[b][shown.is_token[b]], view.hidden_states[b][columns])


def test_by_chunk_judges_each_chunk_as_if_it_stood_alone():
    view = ragged_view(lengths=(16, 16, 9, 9), seen=(16, 9))
    scores = ByChunkScorer(WindowScorer(window_size=2, kernel_size=1), 8).score(view)
    for b, g, valid in rows_of(view):
        first = slice(0, min(8, valid.stop))
        attention = sum(attention_of(view, b, g, g * GROUP + member)[first, first] for member in range(GROUP)) / GROUP
        attention = attention / attention.sum(1, keepdim=True)
        last = first.stop - 2
        ranked = sorted(range(last), key=lambda slot: -float(attention[last : first.stop, slot].mean()))
        assert scores[b, g, :last].argsort(descending=True).tolist() == ranked


def test_by_chunk_keeps_the_inner_scorers_notes_by_chunk():
    class Noting(KeyNormScorer):
        def score(self, view):
            view.state.setdefault("marks", []).append(int(view.kept.positions.max()) // 10)
            return super().score(view)

    view = ragged_view()
    scorer = ByChunkScorer(Noting(), 10)
    scorer.score(view)
    scorer.score(view)
    (note,) = view.state.values()
    assert note.seen == [40, 33]
    assert {start: state["marks"] for start, state in note.by_chunk.items()} == {s: [s // 10] * 2 for s in (0, 10, 20, 30)}


@pytest.mark.parametrize("wrap", [WholeChunksScorer, ByChunkScorer])
def test_chunks_must_hold_a_token(wrap):
    with pytest.raises(ValueError, match="chunk_length must be a whole number of at least 1, not 0"):
        wrap(KeyNormScorer(), 0)
