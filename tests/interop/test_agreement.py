"""Our own presses and kvpress's choose the same tokens, at equal counts; with -s the shares are printed as a table.

The share is that of the (layer, head, token) triples that kvpress keeps. Methods in ``NOTED`` differ on purpose or where a
choice is arbitrary; their shares are printed only.
"""

from dataclasses import dataclass, field

import pytest
import torch
from peer import our_kept, peer_kept

from pikv import presses
from pikv.core import LayerView
from pikv.presses.h2o import ObservedAttentionScorer
from pikv.presses.pyramidkv import pyramid_counts
from pikv.tasks.contexts import retrieval_samples
from tiny import batch_of, build

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed (it pins transformers < 5.3): make test-kvpress")

RATIOS = (0.3, 0.5, 0.75)
LENGTHS = {"llama": (500,), "qwen3": (500,), "demo": (300, 1000)}


class MeanObservedScorer(ObservedAttentionScorer):
    """Attention mass by query that could see the token, as kvpress has it; H2O itself has the sum."""

    def score(self, view: LayerView) -> torch.Tensor:
        return super().score(view) / (view.seen.view(-1, 1, 1) - view.kept.positions)


def _ours(name):
    """A press of ours with a budget in tokens; a wrapper's options are in front of those of the press inside of it."""
    return lambda **options: lambda budget: getattr(presses, name)(budget=budget, **options)


def _around(name, **options):
    return lambda inner: lambda budget: getattr(presses, name)(inner(budget), **options)


snapkv, peer_snapkv = _ours("SnapKVPress")(window_size=16), lambda ratio: kvpress.SnapKVPress(ratio, window_size=16)
knorm = _ours("KnormPress")()
METHODS = {
    "Knorm": (knorm, lambda ratio: kvpress.KnormPress(ratio)),
    "StreamingLLM": (_ours("StreamingLLMPress")(), lambda ratio: kvpress.StreamingLLMPress(ratio)),
    "SnapKV": (snapkv, peer_snapkv),
    "H2O, mean over queries, nothing recent": (
        lambda budget: presses.ScorerPress(MeanObservedScorer(0.0), budget=budget),
        lambda ratio: kvpress.ObservedAttentionPress(ratio),
    ),
    "H2O": (_ours("H2OPress")(), lambda ratio: kvpress.ObservedAttentionPress(ratio)),
    "AdaKV (SnapKV)": (_around("AdaKVPress")(snapkv), lambda ratio: kvpress.AdaKVPress(peer_snapkv(ratio))),
    "TOVA": (_ours("TOVAPress")(), lambda ratio: kvpress.TOVAPress(ratio)),
    "KeyDiff": (_ours("KeyDiffPress")(), lambda ratio: kvpress.KeyDiffPress(ratio)),
    "expected attention": (_ours("ExpectedAttentionPress")(), lambda ratio: kvpress.ExpectedAttentionPress(ratio)),
    "LagKV, scores": (
        _ours("LagKVPress")(lag_size=16, cross_scoring=True),
        lambda ratio: kvpress.LagKVPress(ratio, lag_size=16, cross_scoring=True),
    ),
    "LagKV, ranks": (_ours("LagKVPress")(lag_size=16), lambda ratio: kvpress.LagKVPress(ratio, lag_size=16)),
    "leverage": (_ours("LeverageScorePress")(), lambda ratio: kvpress.LeverageScorePress(ratio)),
    "non-causal attention": (_ours("NonCausalAttentionPress")(), lambda ratio: kvpress.NonCausalAttnPress(ratio)),
    "CriticalKV (SnapKV)": (_around("CriticalKVPress")(snapkv), lambda ratio: kvpress.CriticalKVPress(peer_snapkv(ratio))),
    "ChunkKV (SnapKV)": (_around("ChunkKVPress")(snapkv), lambda ratio: kvpress.ChunkKVPress(peer_snapkv(ratio))),
    "chunks (Knorm)": (
        _around("ChunkPress", chunk_length=100)(knorm),
        lambda ratio: kvpress.ChunkPress(kvpress.KnormPress(ratio), chunk_length=100),
    ),
}
NOTED = {
    "H2O": "ours sums over the queries, and half of what stays is recent",
    "LagKV, ranks": "ranks tie across partitions",
    "leverage": "kvpress draws another random matrix each time",
    "non-causal attention": "kvpress leaves out the scaling of attention, and its last chunk sees its padding",
}


@dataclass
class Agreements:
    """Lowest shares by method and model."""

    lowest: dict[str, dict[str, float]] = field(default_factory=dict)

    def table(self):
        lines = ["| method | " + " | ".join(LENGTHS) + " | note |", "|---" * (len(LENGTHS) + 2) + "|"]
        for method, shares in self.lowest.items():
            cells = [f"{100 * shares[name]:.1f} %" if name in shares else "" for name in LENGTHS]
            lines.append(f"| {method} | {' | '.join(cells)} | {NOTED.get(method, '')} |")
        return "\n".join(lines)


@pytest.fixture(scope="module")
def agreements():
    found = Agreements()
    yield found
    print(f"\n\nLowest share of kept tokens in common, ratios {RATIOS}, texts of {LENGTHS} tokens:\n\n{found.table()}")


@pytest.fixture(scope="module")
def texts(demo):
    """Models, and a text of each length for them."""
    model, tokenizer = demo
    samples = [
        retrieval_samples(tokenizer, num_tokens=length, num_samples=1, num_records=4, num_questions=1, seed=0)[0]
        for length in LENGTHS["demo"]
    ]
    inputs = {name: (build(name), [batch_of([length])[0] for length in LENGTHS[name]]) for name in ("llama", "qwen3")}
    return {**inputs, "demo": (model, [torch.tensor([sample.context_ids]) for sample in samples])}


def share_in_common(ours, theirs):
    """Of the triples in ``theirs``; both by layer, by head."""
    common = total = 0
    for layer, peers_layer in zip(ours, theirs, strict=True):
        for row, peers_row in zip(layer, peers_layer, strict=True):
            common += len(set(row) & set(peers_row))
            total += len(peers_row)
    return common / total


def agreement(model, ids, ours, theirs):
    """At the count per head that kvpress arrives at."""
    before = model.config._attn_implementation
    if isinstance(theirs, kvpress.ObservedAttentionPress):
        model.set_attn_implementation("eager")
    try:
        peers = peer_kept(model, theirs, ids)
    finally:
        model.set_attn_implementation(before)
    counts = {sum(map(len, layer)) / len(layer) for layer in peers}
    assert len(counts) == 1
    kept, _ = our_kept(model, ours(int(counts.pop())), ids)
    return share_in_common(kept, peers)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_tokens_are_kept(texts, agreements, method, name):
    ours, theirs = METHODS[method]
    model, inputs = texts[name]
    shares = [agreement(model, ids, ours, theirs(ratio)) for ids in inputs for ratio in RATIOS]
    agreements.lowest.setdefault(method, {})[name] = min(shares)
    if method not in NOTED:
        assert min(shares) >= 0.99


@pytest.mark.parametrize("num_tokens", [300, 640, 1000])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("beta", [2, 5, 20])
def test_pyramids_are_alike_where_kvpress_forms_one(llama, num_tokens, ratio, beta):
    window_size, num_layers = 8, llama.config.num_hidden_layers
    theirs = kvpress.PyramidKVPress(ratio, window_size=window_size, beta=beta)
    modules = [layer.self_attn for layer in llama.model.layers]
    expected = [theirs.get_layer_budget(module, num_tokens) for module in modules]
    mean = round(num_tokens * (1 - ratio))
    found = pyramid_counts(mean, num_tokens, num_layers, window_size, beta)
    if len(set(expected)) == 1:
        # Its last layer would have less than the window: equal shares there, a pyramid that ends at the window here.
        assert found[-1] == window_size or 2 * mean - window_size < found[0]
        return
    assert max(abs(count - peers_count) for count, peers_count in zip(found, expected, strict=True)) <= 1


def test_a_pyramid_keeps_the_same_tokens(llama):
    ids, _ = batch_of([600])
    peers = peer_kept(llama, kvpress.PyramidKVPress(0.5, window_size=8, beta=5), ids)
    ours, _ = our_kept(llama, presses.PyramidKVPress(0.5, window_size=8, beta=5), ids)
    assert len({len(layer[0]) for layer in peers}) == 3
    assert share_in_common(ours, peers) >= 0.99
