"""Classes with kvpress's compress and score on the ragged cache."""

from dataclasses import dataclass

import pytest
import torch

from oracle import assert_matches_oracle
from pikv import PiKVCache, get_press
from pikv.presses import AdaKVPress, BasePress, ComposedPress, DecodingPress, KnormPress, ScorerPress
from pikv.scoring.returned import numbers_of_returned
from tiny import batch_of

# guides/001, as it stands there.
GUIDE = """
from pikv.presses import BasePress

class NoCompressionPress(BasePress):
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys, values  # 不进行任何压缩
"""


class LargeKeysPress(BasePress):
    """Keeps the tokens of the largest keys, in the order of their size."""

    def __init__(self, compression_ratio=0.5):
        self.compression_ratio = compression_ratio  # no call of the constructor above, as in kvpress
        self.shapes = []

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        self.shapes.append((tuple(hidden_states.shape[:2]), tuple(keys.shape), kwargs["position_ids"][0, 0].item()))
        indices = keys.norm(dim=-1).topk(round(keys.shape[2] * (1 - self.compression_ratio)), dim=-1).indices.unsqueeze(-1)
        keys.mul_(1.0)  # they may be written to
        return keys.gather(2, indices.expand(-1, -1, -1, keys.shape[3])), values.gather(
            2, indices.expand(-1, -1, -1, values.shape[3])
        )


@dataclass
class HiddenPress(BasePress):
    """Hides tokens of single heads from attention, as kvpress does where heads keep different numbers."""

    compression_ratio: float = 0.5

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = keys.norm(dim=-1)
        module.masked_key_indices = torch.nonzero(scores < scores.quantile(self.compression_ratio), as_tuple=True)
        return keys, values


@dataclass
class KeySignPress(ScorerPress):
    """A data class that names no ratio, as kvpress's notebook has it."""

    sign: float = 1.0

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return self.sign * keys.norm(dim=-1)


@dataclass
class OwnRatioPress(ScorerPress):
    compression_ratio: float = 0.0

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -keys.norm(dim=-1)


def kept_after(model, press, lengths=(40, 33), cache=None):
    cache = PiKVCache(model.config) if cache is None else cache
    ids, mask = batch_of(list(lengths))
    with press(model), torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def positions(cache):
    return [[row.tolist() for row in sequence] for layer in cache.ragged_layers for sequence in cache.positions(layer)]


def test_the_press_of_the_guide_works_as_it_stands_there(llama):
    own = {}
    exec(GUIDE, own)
    press = own["NoCompressionPress"]()
    assert press.compression_ratio == 0.0
    press.compression_ratio = 0.5  # means what compress makes of it: nothing
    assert kept_after(llama, press).lengths(0).tolist() == [[40] * 4, [33] * 4]
    assert press.get_stats()["compression_ratio"] == 0.0


@pytest.mark.parametrize("press", [LargeKeysPress(), HiddenPress(), KeySignPress(0.5, sign=-1.0), OwnRatioPress(0.5)], ids=repr)
def test_what_goes_is_gone_and_nothing_else(model, press):
    """Against the oracle of eviction, over turns, in a padded batch."""
    turns = [batch_of([64, 33, 47])]
    if not isinstance(press, HiddenPress):
        turns.append(batch_of([17, 9, 12], seed=1))
    assert_matches_oracle(model, press, turns, steps=3)
    assert press.get_stats()["compression_ratio"] == pytest.approx(0.5, abs=0.02)


def test_it_keeps_what_compress_returned(llama):
    full = kept_after(llama, BasePress())
    half, nothing = kept_after(llama, LargeKeysPress(0.5)), kept_after(llama, LargeKeysPress(0.0))
    assert positions(nothing) == positions(full)
    assert half.nbytes < 0.65 * full.nbytes
    for layer in range(3):
        norms = [row.norm(dim=-1) for block in full.rows(layer).blocks for row in block.dense()[0]]
        kept = [row for sequence in half.positions(layer) for row in sequence]
        order = [row for block in full.rows(layer).blocks for row in block.row_ids]
        for row, sizes in zip(order, norms, strict=True):
            assert kept[row].tolist() == sorted(sizes.topk(len(kept[row])).indices.tolist())


def test_later_turns_bring_their_own_tokens_only(llama):
    press = LargeKeysPress(0.5)
    cache = PiKVCache(llama.config, press=press)
    with torch.no_grad():
        llama(batch_of([40])[0], past_key_values=cache)
        before = positions(cache)
        llama(batch_of([20])[0], past_key_values=cache)
    assert cache.lengths(0).tolist() == [[30] * 4]
    assert [row[:20] for rows in positions(cache) for row in rows] == [row for rows in before for row in rows]
    assert press.shapes[0] == ((1, 40), (1, 4, 40, 16), 0)
    assert press.shapes[3] == ((1, 20), (1, 4, 20, 16), 40)


def test_they_compose_and_scores_can_be_wrapped(llama):
    assert kept_after(llama, ComposedPress([KnormPress(0.5), LargeKeysPress(0.5)])).lengths(0).tolist() == [[10] * 4, [8] * 4]
    assert kept_after(llama, ComposedPress([LargeKeysPress(0.5), KnormPress(0.5)])).lengths(0).tolist() == [[10] * 4, [8] * 4]
    own, ours = AdaKVPress(OwnRatioPress(0.75)), AdaKVPress(KnormPress(0.75))
    assert positions(kept_after(llama, own)) == positions(kept_after(llama, ours))
    with pytest.raises(ValueError, match=r"needs a press made of a scorer and a budget, not LargeKeysPress\("):
        kept_after(llama, AdaKVPress(LargeKeysPress()))
    with DecodingPress(OwnRatioPress(), target_size=10, compression_interval=4)(llama):
        out = llama.generate(batch_of([20])[0], max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.lengths(0).tolist() == [[10] * 4]


def test_ratios_of_data_classes():
    assert (KeySignPress().compression_ratio, KeySignPress(0.25, 2.0).sign, OwnRatioPress().compression_ratio) == (
        0.5,
        2.0,
        0.0,
    )
    press = OwnRatioPress(0.25)
    assert press.budget.amount.ratio == 0.5  # made when it is asked for
    press.compression_ratio = 0.5
    assert (press.compression_ratio, press.min_kept(40), repr(press)) == (0.5, 20, "OwnRatioPress(compression_ratio=0.5)")
    with pytest.raises(ValueError, match="compression_ratio must be at least 0 and less than 1, not 2"):
        press.compression_ratio = 2
    assert press == OwnRatioPress(0.5)
    assert len({press, OwnRatioPress(0.5)}) == 2  # what caches hold for a press is found by the object


def test_a_press_in_a_file(llama, tmp_path):
    (tmp_path / "mine.py").write_text(GUIDE + "\nclass Half(NoCompressionPress):\n    pass\n")
    assert kept_after(llama, get_press(f"{tmp_path}/mine.py:Half")).lengths(0).tolist() == [[40] * 4, [33] * 4]


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        (lambda keys, values: (2 * keys, values), "it returned tokens that it was not given, or that it changed, or one token"),
        (lambda keys, values: (keys[:, :, [1, 1]], values[:, :, [1, 1]]), "it returned tokens .* or one token twice"),
        (lambda keys, values: (keys[:, :, 1:], values), r"it returned keys \[4, 39, 16\] and values \[4, 40, 16\]"),
        (lambda keys, values: (keys[:, :, :0], values[:, :, :0]), "would keep no token of 40"),
        (lambda keys, values: (keys.half(), values.half()), "it returned keys of torch.float16"),
        (lambda keys, values: (keys[0], values[0]), r"must return keys and values \[1, G, K, D\]; it returned \[4, 40, 16\]"),
        (lambda keys, values: keys, r"must return keys and values \[1, G, K, D\]"),
        (lambda keys, values: None, "must return keys and values .* it returned <class 'NoneType'>"),
        (lambda keys, values: (keys[:, :2], values[:, :2]), "returned 2 KV heads of 4"),
    ],
)
def test_what_cannot_be_stored_is_refused(llama, compress, message):
    class Odd(BasePress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            return compress(keys, values)

    with pytest.raises(ValueError, match=message) as caught:
        kept_after(llama, Odd(), [40])
    assert "Odd" in str(caught.value) and "\n" not in str(caught.value)


def test_methods_that_nothing_calls_are_refused(llama):
    class Hooked(LargeKeysPress):
        def forward_hook(self, module, input, kwargs, output):
            return output

    class Strange(BasePress):
        def compress(self, keys, values):
            return keys, values

    with pytest.raises(ValueError, match="Hooked has a forward_hook of its own, which nothing calls here"):
        kept_after(llama, Hooked())
    with pytest.raises(ValueError, match=r"Strange.compress must take \(view\), or as in kvpress \(module, hidden_states"):
        kept_after(llama, Strange())


def test_tokens_are_found_by_their_bits():
    keys, values = torch.randn(2, 50, 4), torch.randn(2, 50, 3)
    keys[:, 10:14], values[:, 10:14] = keys[:, 10:11], values[:, 10:11]  # alike in every bit
    keys[0, 20], values[1, 30] = float("nan"), -0.0
    order = torch.stack([torch.randperm(50)[:30] for _ in range(2)])
    found = numbers_of_returned(
        keys, values, *(each.gather(1, order.unsqueeze(2).expand(-1, -1, each.shape[2])) for each in (keys, values))
    )
    for row in range(2):
        assert len(set(found[row].tolist())) == 30
        for number, given in zip(found[row].tolist(), order[row].tolist(), strict=True):
            assert number == given or {number, given} <= set(range(10, 14))
        alike = [number for number in found[row].tolist() if 10 <= number < 14]
        assert alike == list(range(10, 10 + len(alike)))
    with pytest.raises(ValueError, match="one token twice"):
        numbers_of_returned(keys, values, keys[:, [10, 11, 12, 13, 10]], values[:, [10, 11, 12, 13, 10]])
    assert numbers_of_returned(keys[:, :0], values[:, :0], keys[:, :0], values[:, :0]).shape == (2, 0)
