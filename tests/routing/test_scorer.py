"""Experts weighed by routers: sequence by sequence, turn by turn, and nothing left in the press."""

import pytest
import torch

from calibrated import random_calibration
from pikv import PiKVCache
from pikv.calibration.targets import CalibrationSample, read_sample
from pikv.presses import DecodingPress, MoERouterPress, NoCompressionPress, PrefillDecodingPress
from pikv.routing import EPLBRouter, PiKVRouter, create_moe_router
from pikv.routing.experts import default_experts
from pikv.routing.factory import ROUTERS
from pikv.routing.mixer import ExpertMixer, expert_weights
from pikv.routing.row_state import Hits, PassWeights, is_stored, load_weights, store_weights
from pikv.routing.scorer import RoutedScorer
from tiny import batch_of, build

HITS = (Hits, PiKVRouter, *default_experts())

every_kind = pytest.mark.parametrize("kind", ROUTERS)


def calibrated_press(model, kind, ratio=0.5, **options):
    return MoERouterPress(ratio, router_type=kind, calibration=random_calibration(model), **options)


def read(model, press, turns, cache=None, seen=None):
    """Reads turns ``(ids, mask)`` onto a cache; ``seen`` is the mask of what was read onto it before."""
    cache = PiKVCache(model.config) if cache is None else cache
    whole = turns[0][1][:, :0] if seen is None else seen
    for ids, mask in turns:
        whole = torch.cat([whole, mask], 1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with press(model), torch.no_grad():
            model(ids, attention_mask=whole, position_ids=positions, past_key_values=cache)
    cache.check_integrity()
    return cache


def kept(cache, sequence=0):
    return [row.tolist() for layer in cache.ragged_layers for row in cache.positions(layer)[sequence]]


def stored_passes(cache, layer=0):
    """The stored weights, pass by pass."""
    return [state for state in cache.state(layer).values() if isinstance(state, PassWeights)]


def weights_of(cache, layer, sequence):
    """The weights stored of a sequence's tokens, of all four experts, by position."""
    return {
        position: torch.zeros(4).scatter(0, experts.long(), weights)
        for state in stored_passes(cache, layer)
        for position, experts, weights in zip(
            state.positions[sequence].tolist(), state.experts[sequence], state.weights[sequence], strict=True
        )
        if position >= 0
    }


def view_of(model, length=50):
    ids = batch_of([length + 1])[0][0].tolist()
    return read_sample(model, CalibrationSample(context_ids=ids[:length], later_ids=ids[length:], counted_queries=[0]))[1].view


@pytest.mark.parametrize("by_head", [False, True])
def test_a_mixer_is_a_weighted_sum_of_adjusted_scores(by_head):
    generator = torch.Generator().manual_seed(0)
    mixer = ExpertMixer(create_moe_router("base", 8, 3), 2)
    torch.nn.init.normal_(mixer.weight, generator=generator)
    torch.nn.init.normal_(mixer.bias, generator=generator)
    votes = torch.rand(2, 2, 5, 3, generator=generator)
    mixture = torch.rand(2, 2, 5, 3, generator=generator) if by_head else torch.rand(2, 5, 3, generator=generator)
    scores = mixer(mixture, votes)
    assert scores.shape == (2, 2, 5)
    for b in range(2):
        for g in range(2):
            for t in range(5):
                weights = mixture[b, g, t] if by_head else mixture[b, t]
                total = sum(weights[e] * (mixer.bias[g, e] + mixer.weight[g, e] * votes[b, g, t, e]) for e in range(3))
                torch.testing.assert_close(scores[b, g, t], total)


def test_a_new_mixer_leaves_scores_as_they_are():
    votes = torch.rand(1, 2, 5, 4)
    torch.testing.assert_close(ExpertMixer(create_moe_router("base", 8), 2)(torch.full((1, 5, 4), 0.25), votes), votes.mean(-1))


def test_an_expert_without_a_slot_for_a_token_has_no_weight():
    router = create_moe_router("base", 8, 4, 2, capacity_factor=0.5).eval()
    torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routing = router.route(torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(1)))
    assert routing.num_dropped > 0
    mixture = expert_weights(routing)
    for token in range(30):
        expected = [0.0] * 4
        for choice in range(2):
            if routing.accepted[0, token, choice]:
                expected[int(routing.experts[0, token, choice])] = float(routing.weights[0, token, choice])
        assert mixture[0, token].tolist() == expected


@every_kind
def test_every_sequence_of_a_padded_batch_keeps_what_it_keeps_alone(llama, kind):
    turns = [(50, 23, 38), (30, 41, 1)]
    press = calibrated_press(llama, kind, 0.6)
    batches = [batch_of(list(lengths), seed=seed) for seed, lengths in enumerate(turns)]
    together = read(llama, press, batches)
    differing = set()
    for b, lengths in enumerate(zip(*turns, strict=True)):
        own = [(ids[b : b + 1, -n:], mask[b : b + 1, -n:]) for n, (ids, mask) in zip(lengths, batches, strict=True)]
        if lengths[1] > 1:  # alone, a single token is decoding, which compresses nothing
            assert kept(read(llama, press, own)) == kept(together, b)
        differing.add(str(kept(together, b)[:2]))
    assert len(differing) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_routers_read_what_the_attention_modules_are_given(family):
    model = build(family)
    press = calibrated_press(model, "eplb", head_budgets=False)
    inputs = {}
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    for index, block in enumerate(blocks):
        module = block.self_attn if hasattr(block, "self_attn") else block.attn

        def look(module, args, kwargs, index=index):
            inputs[index] = (args[0] if args else kwargs["hidden_states"]).detach()

        module.register_forward_pre_hook(look, with_kwargs=True)
    cache = read(model, press, [batch_of([40])])
    for layer, hidden in inputs.items():
        expected = expert_weights(press.routers[layer].route(hidden))[0]
        weights = weights_of(cache, layer, 0)
        held = sorted({position for row in cache.positions(layer)[0] for position in row.tolist()})
        assert sorted(weights) == held
        torch.testing.assert_close(torch.stack([weights[position] for position in held]), expected[held])


@every_kind
def test_tokens_of_earlier_turns_keep_the_weights_that_they_had(llama, kind):
    press = calibrated_press(llama, kind)
    cache = read(llama, press, [batch_of([40, 25])])
    before = [[weights_of(cache, layer, b) for b in range(2)] for layer in range(3)]
    read(llama, press, [batch_of([20, 22], seed=1)], cache, seen=batch_of([40, 25])[1])
    for layer in range(3):
        for b, first in enumerate((40, 25)):
            held = {position for row in cache.positions(layer)[b] for position in row.tolist()}
            now, earlier = weights_of(cache, layer, b), before[layer][b]
            assert set(now) == held
            old = set(earlier) & held
            assert old and max(earlier) < first
            for position in old:
                assert torch.equal(now[position], earlier[position])


@every_kind
def test_one_press_on_two_caches_is_as_good_as_two(llama, kind):
    texts = {"a": [batch_of([40], seed=seed) for seed in (0, 1, 2)], "b": [batch_of([55], seed=seed) for seed in (3, 4, 5)]}
    shared, caches, seen = calibrated_press(llama, kind), dict.fromkeys("ab"), dict.fromkeys("ab")
    for number in range(3):
        for name in "ab":
            turn = texts[name][number]
            caches[name] = read(llama, shared, [turn], caches[name], seen[name])
            seen[name] = turn[1] if seen[name] is None else torch.cat([seen[name], turn[1]], 1)
    for name in "ab":
        alone = read(llama, calibrated_press(llama, kind), texts[name])
        assert kept(caches[name]) == kept(alone)
        for layer in range(3):
            for key, note in alone.state(layer).items():
                if isinstance(note, Hits):
                    assert torch.equal(caches[name].state(layer)[key].kept, note.kept)
                    assert torch.equal(caches[name].state(layer)[key].total, note.total)


def test_hit_rates_are_measured_by_sequence_and_decide_with_the_pikv_router(llama, monkeypatch):
    given = []
    route = PiKVRouter.route

    def spy(self, hidden_states, info=None, *, allowed=None):
        given.append(None if info is None else info["hit_rates"])
        return route(self, hidden_states, info, allowed=allowed)

    monkeypatch.setattr(PiKVRouter, "route", spy)
    press = calibrated_press(llama, "pikv", head_budgets=False, capacity_factor=4.0)  # no token goes without an expert
    cache = read(llama, press, [batch_of([40, 25])])
    assert given == [None] * 6  # nothing was measured yet
    hits = [cache.state(layer)[HITS] for layer in range(3)]
    rates = [note.kept / note.total for note in hits]
    for note in hits:
        # The mean attention of 32 queries, or of 25, adds up to 1 in each of four heads.
        torch.testing.assert_close(note.total.sum(1), torch.full((2,), 4.0))
        assert bool((note.kept < note.total).all())
    given.clear()
    read(llama, press, [batch_of([20, 22], seed=1)], cache, seen=batch_of([40, 25])[1])
    assert len(given) == 6
    for number, found in enumerate(given):
        assert torch.equal(found, rates[number // 2][number % 2])
    assert not torch.allclose(rates[0][0], rates[0][1])
    for layer, before in enumerate(hits):
        now = cache.state(layer)[HITS]
        torch.testing.assert_close(now.total.sum(1), torch.full((2,), 8.0))
        assert bool((now.kept >= before.kept).all())


def test_hit_rates_change_what_is_kept(llama):
    turns = [batch_of([60], seed=0), batch_of([40], seed=1)]
    aware = read(llama, calibrated_press(llama, "pikv"), turns)
    unaware = read(llama, calibrated_press(llama, "pikv", cache_aware=False), turns)
    assert kept(aware) != kept(unaware)


def test_going_back_drops_what_was_stored_since(llama):
    press = calibrated_press(llama, "eplb", head_budgets=False, budget=20, recent_size=2)
    ids, mask = batch_of([50, 10])
    cache = read(llama, press, [(ids, mask)])
    (first,) = stored_passes(cache)
    assert cache.lengths(0).tolist() == [[20] * 4, [10] * 4]
    # Decoding stores nothing of its own, and taking its tokens back leaves the state.
    mark = cache.mark()
    read(llama, press, [(ids[:, -1:], mask[:, -1:])], cache, seen=mask)
    assert stored_passes(cache) == [first]
    cache.rewind(mark)
    assert stored_passes(cache) == [first]
    # A narrower press shortens the first sequence, which gets nothing new, while the second one just grows.
    narrow = calibrated_press(llama, "eplb", head_budgets=False, budget=12, recent_size=2)
    further = (ids[:, -2:], torch.tensor([[0, 0], [1, 1]]))
    mark = cache.mark()
    read(llama, narrow, [further], cache, seen=mask)
    assert cache.lengths(0).tolist() == [[12] * 4, [12] * 4]
    assert [state.seen for state in stored_passes(cache)] == [[50, 10], [50, 12]]
    with pytest.raises(ValueError, match="tokens were evicted since then"):
        cache.rewind(mark)
    for b in range(2):  # what is there is known
        assert set(weights_of(cache, 0, b)) == {position for row in cache.positions(0)[b] for position in row.tolist()}
    read(llama, press, [batch_of([9, 30], seed=1)], cache, seen=torch.cat([mask, further[1]], 1))
    assert cache.lengths(0).tolist() == [[20] * 4, [20] * 4]


def test_cropping_drops_what_was_stored_since(llama):
    press = calibrated_press(llama, "pikv")
    ids, mask = batch_of([40])
    cache = read(llama, press, [(ids, mask)])
    (noted,) = stored_passes(cache)
    with pytest.raises(ValueError, match="tokens were evicted"):
        cache.crop(38)
    read(llama, press, [(ids[:, :1], mask[:, :1])], cache, seen=mask)
    cache.crop(40)
    assert stored_passes(cache) == [noted]


def test_what_is_read_while_nothing_is_evicted_is_routed_all_the_same(llama):
    """The first turn stays below the budget; in the second, its tokens compete with weights of their own."""
    press = calibrated_press(llama, "eplb", head_budgets=False, budget=45)
    first, second = batch_of([40]), batch_of([30], seed=1)
    cache = read(llama, press, [first])
    assert cache.lengths(0).tolist() == [[40] * 4]
    assert sorted(weights_of(cache, 0, 0)) == list(range(40))
    noted = weights_of(cache, 0, 0)
    read(llama, press, [second], cache, seen=first[1])
    assert cache.lengths(0).tolist() == [[45] * 4]
    assert all(torch.equal(noted[position], weights) for position, weights in weights_of(cache, 0, 0).items() if position < 40)


def test_a_context_is_routed_once_for_two_stages_and_old_state_goes(llama, monkeypatch):
    """One press for reading and decoding: what the one routed the other need not; state without tokens are dropped."""
    routed = []
    route = EPLBRouter.route
    monkeypatch.setattr(EPLBRouter, "route", lambda self, hidden, info=None: routed.append(1) or route(self, hidden, info))
    inner = calibrated_press(llama, "eplb", head_budgets=False, recent_size=2)
    press = PrefillDecodingPress(inner, DecodingPress(inner, target_size=8, compression_interval=4))
    ids, mask = batch_of([40])
    cache = read(llama, press, [(ids, mask)])
    assert len(routed) == 3  # once a layer
    for _ in range(24):
        mask = torch.cat([mask, mask[:, :1]], 1)
        read(llama, press, [(ids[:, :1], mask[:, :1])], cache, seen=mask[:, :-1])
    assert cache.lengths(0).max() <= 12
    assert len(stored_passes(cache)) <= 8
    assert all(bool((note.positions >= 0).any()) for note in stored_passes(cache))


def test_tokens_that_were_never_routed_weigh_experts_as_the_others_do(llama):
    press = calibrated_press(llama, "base", head_budgets=False)
    ids, mask = batch_of([30])
    cache = read(llama, NoCompressionPress(), [(ids, mask)])
    all_scored = []
    score = RoutedScorer.score

    def spy(self, view):
        scores = score(self, view)
        all_scored.append(view.scratch[RoutedScorer][-1])
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoutedScorer, "score", spy)
        read(llama, press, [batch_of([20], seed=1)], cache, seen=mask)
    for scored in all_scored:
        routed = expert_weights(scored.routings[0])[0]
        torch.testing.assert_close(scored.weights[0, 0, 30:50], routed)
        torch.testing.assert_close(scored.weights[0, 0, :30], routed.mean(0).expand(30, -1))


@every_kind
def test_state_beside_the_rows_takes_few_bytes_and_has_sequences_first(llama, kind):
    """A position of 4 bytes, and of the two experts that a token goes to a number of 1 byte and a weight of 4."""
    cache = read(llama, calibrated_press(llama, kind), [batch_of([40, 25])])
    for layer in range(3):
        (state,) = stored_passes(cache, layer)
        tensors = [state.positions, state.experts, state.weights]
        assert sum(tensor.nbytes for tensor in tensors) == state.positions.numel() * (4 + 2 * (1 + 4))
        hits = [entry for entry in cache.state(layer).values() if isinstance(entry, Hits)]
        assert len(hits) == (kind == "pikv")
        tensors += [tensor for entry in hits for tensor in (entry.kept, entry.total)]
        assert all(len(tensor) == 2 for tensor in tensors)
        held = [{position for row in rows for position in row.tolist()} for rows in cache.positions(layer)]
        assert [set(row.tolist()) - {-1} for row in state.positions] == held


def test_weights_of_more_experts_than_a_byte_can_number(llama):
    view = view_of(llama)
    weights = torch.zeros(1, 50, 300)
    experts = torch.randint(300, (1, 50, 1), generator=torch.Generator().manual_seed(0))
    weights.scatter_(2, experts, 0.5)
    store_weights(view, ("key",), weights, top_k=2)
    assert is_stored(view, ("key",)) and not is_stored(view, ("other",))
    loaded = torch.full((1, 50, 300), float("nan"))
    load_weights(view, ("key",), loaded)
    assert torch.equal(loaded, weights)


@pytest.mark.parametrize("kind", ["eplb", "pikv", "adaptive"])
def test_sequences_that_are_joined_and_picked_go_on_as_alone(llama, kind):
    """One that was read in two turns, and one that was read in one, as one batch; then each of them by itself again."""
    press = calibrated_press(llama, kind, head_budgets=False)
    first = read(llama, press, [batch_of([40]), batch_of([20], seed=1)])
    second = read(llama, press, [batch_of([25], seed=2)])
    joined = PiKVCache.concat([first, second])
    ids, mask = batch_of([30, 30], seed=3)
    read(llama, press, [(ids, mask)], joined, seen=joined.attention_mask())
    swapped = joined.select([1, 0])
    further, ones = batch_of([20, 20], seed=4)
    read(llama, press, [(further, ones)], swapped, seen=swapped.attention_mask())
    for number, alone in enumerate((first, second)):
        read(llama, press, [(ids[number : number + 1], mask[:1])], alone, seen=alone.attention_mask())
        assert kept(joined, number) == kept(alone)
        assert weights_are_equal(joined, alone, number)
        own = (further[1 - number : 2 - number], ones[:1])
        read(llama, press, [own], alone, seen=alone.attention_mask())
        assert kept(swapped, 1 - number) == kept(alone)


def weights_are_equal(cache, alone, number):
    pairs = [(weights_of(cache, layer, number), weights_of(alone, layer, 0)) for layer in range(3)]
    return all(one.keys() == two.keys() and all(torch.allclose(one[at], two[at]) for at in one) for one, two in pairs)


def test_hits_are_counted_for_sequences_that_lost_tokens(llama):
    """Beside a long one, a short sequence that fits decides nothing, as it would alone."""
    press = calibrated_press(llama, "pikv", head_budgets=False, budget=30)
    cache = read(llama, press, [batch_of([20, 50])])
    hits = cache.state(0)[HITS]
    assert not bool(hits.total[0].any())
    assert bool(hits.total[1].any())
    assert bool(hits.rates(0).isnan().all())


@every_kind
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
def test_sinks_come_first_then_the_newest(llama, kind, calibrated):
    calibration = random_calibration(llama) if calibrated else None
    for budget, expected in ((3, [0, 1, 2]), (6, [0, 1, 2, 3, 38, 39]), (9, [0, 1, 2, 3, *range(35, 40)])):
        press = MoERouterPress(
            budget=budget, router_type=kind, calibration=calibration, head_budgets=False, sink_size=4, recent_size=5
        )
        assert kept(read(llama, press, [batch_of([40])])) == [expected] * 12
    press = MoERouterPress(0.5, router_type=kind, calibration=calibration, head_budgets=False, sink_size=4, recent_size=5)
    rows = kept(read(llama, press, [batch_of([40])]))
    assert all(set(row) >= {0, 1, 2, 3, *range(35, 40)} for row in rows)
    assert len({str(row) for row in rows}) > 1 or not calibrated


@every_kind
def test_an_uncalibrated_mixer_mixes_evenly(llama, kind):
    view = view_of(llama)
    experts = default_experts()
    mixers = {layer: ExpertMixer(create_moe_router(kind, 64), 4).eval() for layer in range(3)}
    scores = RoutedScorer(experts, mixers, sink_size=0, recent_size=0).score(view)
    expected = torch.stack([expert.rank_scores(view) for expert in experts.values()]).mean(0)
    torch.testing.assert_close(scores, expected)
    (scored,) = view.scratch.pop(RoutedScorer)
    assert scored.experts == tuple(experts)
    assert scored.routings == []
    assert bool((scored.weights == 0.25).all())


@every_kind
def test_a_calibrated_mixer_weighs_scores_by_the_hidden_states(llama, kind):
    view, experts = view_of(llama), default_experts()
    mixers = random_calibration(llama).build(llama, kind, 2)
    scores = RoutedScorer(experts, mixers, sink_size=0, recent_size=0).score(view)
    view.scratch.clear()
    mixer = mixers[view.layer_idx]
    routing = mixer.router.route(view.hidden_states)
    votes = [expert.rank_scores(view) for expert in experts.values()]
    expected = torch.zeros(1, 4, 50)
    for token in range(50):
        for choice in range(2):
            if routing.accepted[0, token, choice]:
                expert = int(routing.experts[0, token, choice])
                adjusted = mixer.bias[:, expert] + mixer.weight[:, expert] * votes[expert][0, :, token]
                expected[0, :, token] += routing.weights[0, token, choice] * adjusted
    torch.testing.assert_close(scores, expected.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(-1, 0), (0, -1)])
def test_negative_ends(sizes):
    with pytest.raises(ValueError, match="sink_size and recent_size must be at least 0"):
        RoutedScorer(default_experts(), {}, *sizes)


def test_a_chunk_of_nothing_but_padding(llama):
    ids, mask = batch_of([8])
    for spec in ("topk_balanced", "pikv"):
        padded = read(llama, calibrated_press(llama, spec, 0.3), [(ids, torch.zeros_like(mask)), (ids, mask)])
        assert kept(padded) == kept(read(llama, calibrated_press(llama, spec, 0.3), [(ids, mask)]))
