"""Merging against slow references of the published rules: plain loops over single tokens."""

import pytest
import torch
from cases import PRESSES
from merge_reference import cam_reference, d2o_reference
from stored import compare_attention

from formats import FormatPress
from oracle import run_turns
from pikv import PiKVCache, prefill
from pikv.presses import (
    AdaKVPress,
    BasePress,
    ComposedPress,
    DecodingPress,
    DuoAttentionPress,
    H2OPress,
    KeyRerotationPress,
    KnormPress,
    MergingPress,
    MoERouterPress,
    NoCompressionPress,
    PrefillDecodingPress,
    QuantizedPress,
    RandomPress,
    SnapKVPress,
    get_press,
)
from pikv.presses.merger import Merger
from tiny import batch_of, build

RULES = {
    "cam": {"method": "cam", "merge_budget": 4},
    "cam-expected": {"method": "cam", "merge_budget": 7, "seed": None},
    "d2o": {"method": "d2o", "beta": 0.6},
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_method = pytest.mark.parametrize("rule", [RULES["cam"], RULES["d2o"]], ids=["cam", "d2o"])
OVER_LAYERS = {"cake", "kvzip"}  # share out over layers


@pytest.fixture
def checked(monkeypatch):
    """Has every merging compared with the reference, row by row; counts tokens merged, by layer, rows, and tokens changed."""
    merge, thresholds = Merger.merge, {}
    checked = {"merged": {}, "rows": 0, "changed": 0}

    def check(self, view, kept, rows):
        before = by_row(view.kept.blocks, lambda block: block.load())
        positions = view.kept.positions.flatten(0, 1)
        untouched = by_row(rows.blocks, lambda block: block.dense())
        merge(self, view, kept, rows)
        after = by_row(rows.blocks, lambda block: block.dense())
        found_positions = [head for sequence in rows.positions() for head in sequence]
        for row, chosen in enumerate(kept):
            chosen = chosen.tolist()
            if row not in before:  # nothing but padding came so far
                assert chosen == []
                continue
            assert found_positions[row].tolist() == positions[row][chosen].tolist()
            keys, values = (tensor.float() for tensor in before[row])
            expected, count = (keys[chosen], values[chosen]), 0
            if 0 < len(chosen) < len(keys):
                if hasattr(self.rule, "beta"):
                    place = (id(view.call.state), id(self.owner), view.layer_idx, row)
                    *expected, count = d2o_reference(self.rule, thresholds, place, keys, values, chosen)
                else:
                    *expected, count = cam_reference(self.rule, view, row, keys, values, chosen)
                checked["rows"] += 1
            for one, other, was in zip(after[row], expected, untouched[row], strict=True):
                torch.testing.assert_close(one.float(), other, atol=1e-5, rtol=1e-5)
                same = (other - was.float()).abs().amax(1) == 0
                assert torch.equal(one[same], was[same])  # what takes nothing over stays as it is, to the bit
                checked["changed"] += int((~same).sum())
            checked["merged"][view.layer_idx] = checked["merged"].get(view.layer_idx, 0) + count

    monkeypatch.setattr(Merger, "merge", check)
    return checked


def by_row(blocks, load):
    """Copies of keys and values by row."""
    found = {}
    for block in blocks:
        found |= zip(block.row_ids, ([t.clone() for t in pair] for pair in zip(*load(block), strict=True)), strict=True)
    return found


def read(model, press, lengths=(40,), seed=0, cache=None, **options):
    ids, mask = batch_of(list(lengths), seed)
    cache = PiKVCache(model.config) if cache is None else cache
    prefill(model, ids, cache, press, attention_mask=mask if len(lengths) > 1 else None, **options)
    cache.check_integrity()
    return cache


def tokens_of(cache):
    return {layer: by_row(cache.rows(layer).blocks, lambda block: block.dense()) for layer in cache.ragged_layers}


def assert_alike(one, other, atol=1e-4):
    one, other = tokens_of(one), tokens_of(other)
    for layer, rows in one.items():
        for row, tensors in rows.items():
            for pair in zip(tensors, other[layer][row], strict=True):
                torch.testing.assert_close(*pair, atol=atol, rtol=0)


INNER = {
    "h2o": lambda: H2OPress(0.5),
    "snapkv": lambda: SnapKVPress(0.6, window_size=6),
    "adakv": lambda: AdaKVPress(SnapKVPress(0.6, window_size=6)),
    "duo": lambda: DuoAttentionPress(0.5, sink_size=2, recent_size=5),
    "eplb": lambda: MoERouterPress(0.5, router_type="eplb"),
    "two": lambda: ComposedPress([KnormPress(0.3), DuoAttentionPress(0.3, sink_size=2, recent_size=5)]),
}


@every_rule
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_conversations_follow_the_published_rule(llama, rule, inner, checked):
    """A padded batch in chunks, two turns, ragged budgets."""
    press = MergingPress(inner(), **rule)
    *_, cache = run_turns(llama, press, [batch_of([30, 17, 24]), batch_of([12, 9, 5], seed=1)], steps=2, chunk_size=10)
    assert checked["rows"] > 50 and checked["changed"] > 100
    stats = press.get_stats()
    assert {layer: each["num_merged"] for layer, each in stats["layer_stats"].items()} == checked["merged"]
    assert stats["num_merged"] == sum(checked["merged"].values()) > 0
    assert stats["layer_stats"][0]["num_kept"] == int(cache.lengths(0).sum()) - 2 * 3 * 4  # the steps came after it
    press.reset_stats()
    assert press.get_stats()["num_merged"] == 0


@each_method
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_oss", "phi"])
def test_families_follow_the_published_rule(family, rule, checked):
    """Soft-capping, learned sinks, and no rotary embedding."""
    read(build(family), MergingPress(KnormPress(0.5), **rule), (30, 21))
    assert checked["changed"] > 50


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_merged_in_float32(rule, dtype):
    model = build("llama", dtype)
    plain, merged = (read(model, press) for press in (RandomPress(0.5), MergingPress(RandomPress(0.5), **rule)))
    exact = read(build("llama"), MergingPress(RandomPress(0.5), **rule))
    for row, (_, values) in tokens_of(exact)[0].items():
        found = tokens_of(merged)[0][row][1]
        assert found.dtype == dtype
        distance = (found.float() - values).abs().mean()
        assert distance < 0.3 * (tokens_of(plain)[0][row][1].float() - values).abs().mean()


@pytest.mark.parametrize("name", [name for name in PRESSES if name not in OVER_LAYERS])
def test_what_is_kept_is_the_wrapped_press_s_choice(llama, name):
    cache, expected = (read(llama, press, (40, 29)) for press in (MergingPress(PRESSES[name](), "cam"), PRESSES[name]()))
    for layer in range(3):
        for pair in zip(cache.positions(layer), expected.positions(layer), strict=True):
            assert all(torch.equal(*heads) for heads in zip(*pair, strict=True))


@each_method
@pytest.mark.parametrize("where", ["inside", "around", "beside"])
def test_tokens_are_merged_while_decoding(llama, rule, where, checked):
    cut = KnormPress(0.5)
    press = {
        "inside": lambda: DecodingPress(MergingPress(cut, **rule), target_size=12, compression_interval=3),
        "around": lambda: MergingPress(DecodingPress(cut, target_size=12, compression_interval=3), **rule),
        "beside": lambda: PrefillDecodingPress(
            MergingPress(cut, **rule), DecodingPress(MergingPress(cut, **rule), target_size=12, compression_interval=3)
        ),
    }[where]()
    *_, cache = run_turns(llama, press, [batch_of([20, 13])], steps=8, decode_under_press=True)
    assert checked["rows"] >= 2 * 3 * 8 and checked["changed"]
    if where == "around":
        inside = DecodingPress(MergingPress(cut, **rule), target_size=12, compression_interval=3)
        assert_alike(cache, run_turns(llama, inside, [batch_of([20, 13])], steps=8, decode_under_press=True)[-1], atol=0)


@every_rule
def test_a_sequence_in_a_batch_is_merged_as_alone(llama, rule):
    ids, mask = batch_of([40, 22, 31])
    further = batch_of([9, 9, 9], seed=1)[0]
    press = MergingPress(SnapKVPress(0.5, window_size=6), **rule)

    def both(rows, length):
        cache = PiKVCache(llama.config)
        prefill(llama, ids[rows, -length:], cache, press, attention_mask=mask[rows, -length:])
        whole = torch.cat([mask[rows, -length:], torch.ones_like(further[rows])], 1)
        prefill(llama, further[rows], cache, press, attention_mask=whole)
        return cache

    together = both(slice(None), 40)
    for b, length in enumerate((40, 22, 31)):
        assert_alike(together.select([b]), both(slice(b, b + 1), length))


@each_method
def test_caches_that_were_joined_go_on_as_each_alone(llama, rule):
    """What the rule noted of rows goes with them."""
    press = MergingPress(H2OPress(0.5), **rule)
    caches = [read(llama, press, (length,), seed) for seed, length in enumerate((30, 30))]
    joined = PiKVCache.concat(caches)
    ids = torch.cat([batch_of([12], seed)[0] for seed in (5, 6)])
    prefill(llama, ids, joined, press)
    for b, cache in enumerate(caches):
        prefill(llama, ids[b : b + 1], cache, press)
        assert_alike(joined.select([b]), cache)


@each_method
def test_tokens_in_a_format_are_merged_too(llama, rule, checked):
    """The format is exact but in another order; the second turn merges into what lies in it."""
    press = FormatPress(MergingPress(SnapKVPress(0.5, window_size=6), **rule))
    run_turns(llama, press, [batch_of([30, 20]), batch_of([14, 9], seed=1)], steps=1)
    assert checked["changed"] > 100


@each_method
def test_attention_reads_what_was_merged_and_stored(llama, rule, monkeypatch):
    compared = compare_attention(monkeypatch)
    press = ComposedPress(
        [MergingPress(SnapKVPress(0.5, window_size=6), **rule), QuantizedPress(4, group_size=8, num_sinks=2, window_size=4)]
    )
    turns = [batch_of([50, 33]), batch_of([20, 26], seed=1)]
    run_turns(llama, press, turns, steps=4, chunk_size=20, decode_under_press=True)
    assert sum(map(bool, compared)) > len(compared) / 2


def test_segments_of_which_nothing_changes_stay_as_they_are(llama):
    cache = read(llama, FormatPress(NoCompressionPress()))
    rows = cache.rows(0)
    (before,) = rows.blocks[0].sealed
    rows.rewrite(lambda row_ids, keys, values, numbers: (None, None))
    assert rows.blocks[0].sealed[0] is before
    keys, values = (tensor.clone() for tensor in rows.blocks[0].dense())
    rows.rewrite(lambda row_ids, keys, values, numbers: (None, values + numbers.view(1, -1, 1)))
    found = rows.blocks[0].dense()
    assert torch.equal(found[0], keys) and torch.equal(found[1], values + torch.arange(40).view(1, -1, 1))
    assert rows.blocks[0].sealed[0].format == before.format == "reversed"


def test_keys_are_turned_after_merging_in_whatever_order_it_is_said(llama):
    caches = []
    for make in (
        lambda cut: KeyRerotationPress(MergingPress(cut, "d2o")),
        lambda cut: MergingPress(KeyRerotationPress(cut), "d2o"),
    ):
        caches.append(read(llama, make(SnapKVPress(0.5, window_size=6))))
        read(llama, make(SnapKVPress(0.5, window_size=6)), (20,), 1, caches[-1])
    assert_alike(*caches, atol=0)
    merged = read(llama, MergingPress(SnapKVPress(0.5, window_size=6), "d2o"))
    turned = read(llama, KeyRerotationPress(MergingPress(SnapKVPress(0.5, window_size=6), "d2o")))
    for row, (keys, values) in tokens_of(turned)[1].items():
        assert torch.equal(values, tokens_of(merged)[1][row][1])
        assert not torch.allclose(keys, tokens_of(merged)[1][row][0])


def test_draws_of_cam_are_right_on_average_and_independent_of_who_was_evicted(llama):
    """The mean over many seeds is what is added without a draw; RandomPress draws by the same seed."""
    plain = tokens_of(read(llama, RandomPress(0.5)))[0]
    expected = tokens_of(read(llama, MergingPress(RandomPress(0.5), seed=None)))[0]
    sums = {row: torch.zeros_like(values) for row, (_, values) in plain.items()}
    num_seeds = 40
    for seed in range(num_seeds):
        for row, (_, values) in tokens_of(read(llama, MergingPress(RandomPress(0.5), seed=seed)))[0].items():
            sums[row] += values - plain[row][1]
    means = torch.stack([sums[row].flatten() for row in sums]) / num_seeds
    added = torch.stack([(expected[row][1] - plain[row][1]).flatten() for row in sums])
    assert added.norm() > 1
    assert (means - added).norm() < 0.3 * added.norm()  # an error of a standard deviation of what single draws add


def test_the_same_seed_gives_the_same_tokens(llama):
    once, twice, other = (read(llama, MergingPress(H2OPress(0.5), seed=seed)) for seed in (3, 3, 4))
    assert_alike(once, twice, atol=0)
    with pytest.raises(AssertionError):
        assert_alike(once, other)


@each_method
def test_a_limit_in_bytes_holds_and_leaves_the_same_tokens(llama, rule):
    for limit in range(20_000, 20_064, 8):
        plain = read(llama, KnormPress(max_bytes=limit), (40, 29))
        cache = read(llama, MergingPress(KnormPress(max_bytes=limit), **rule), (40, 29))
        assert cache.nbytes == plain.nbytes <= limit
        assert cache.lengths(0).tolist() == plain.lengths(0).tolist()


@each_method
def test_notes_go_with_their_sequences(llama, rule):
    """One of the two sequences had nothing evicted before."""
    press = MergingPress(KnormPress(budget=25), **rule)
    caches = [read(llama, press, (40,)), read(llama, NoCompressionPress(), (40,), 1)]
    joined = PiKVCache.concat(caches).select([1, 0])
    further = batch_of([12, 12], 7)[0]
    prefill(llama, further, joined, press)
    for b, cache in enumerate(reversed(caches)):
        prefill(llama, further[b : b + 1], cache, press)
        assert_alike(joined.select([b]), cache)


def test_names_and_settings(llama):
    press = get_press("cam(h2o):0.5")
    assert (press.method, press.compression_ratio, repr(press)) == ("cam", 0.5, "MergingPress(H2OPress(compression_ratio=0.5))")
    press = get_press("d2o(snapkv):0.75", beta=0.5)
    assert (press.method, press.press.compression_ratio, press.beta) == ("d2o", 0.75, 0.5)
    press.beta = 1.0
    once = read(llama, press)
    assert not torch.equal(tokens_of(once)[0][0][1], tokens_of(read(llama, SnapKVPress(0.75)))[0][0][1])
    refused = [
        (lambda: MergingPress(H2OPress(), "d20"), "unknown merging method 'd20'; did you mean 'd2o'"),
        (lambda: MergingPress("h2o"), "needs a press"),
        (lambda: MergingPress(H2OPress(), merge_budget=0), "merge_budget must be a whole number of at least 1"),
        (lambda: MergingPress(H2OPress(), seed=-1), "seed must be a whole number of at least 0"),
        (lambda: MergingPress(H2OPress(), "d2o", beta=1.5), "beta must lie between 0 and 1"),
        (lambda: MergingPress(H2OPress(), "d2o", seed=None), "seed is no setting of the method 'd2o', which has: beta"),
        (lambda: MergingPress(H2OPress(), beta=0.1), "beta is no setting of the method 'cam'"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()


def test_what_cannot_be_combined_is_refused_before_any_work(llama):
    refused = [
        *((lambda name=name: MergingPress(PRESSES[name]()), "shares tokens out over the layers") for name in OVER_LAYERS),
        (lambda: MergingPress(MergingPress(H2OPress()), "d2o"), "is merged already"),
        (lambda: MergingPress(AdaKVPress(MergingPress(H2OPress())), "d2o"), "is merged already"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message), make()(llama):
            raise AssertionError("was not refused")


@each_method
def test_presses_in_one_piece_are_merged_too(llama, rule, checked):
    class EverySecond(BasePress):
        def compress(self, view):
            return [torch.arange(1, length, 2) for length in view.kept.lengths.flatten().tolist()]

        def min_kept(self, num_tokens):
            return num_tokens // 2

    read(llama, MergingPress(EverySecond(), **rule), (31, 20))
    assert checked["changed"] > 50
