"""Scores of users that are no numbers are refused, where tokens are chosen by them."""

import pytest
import torch

from pikv import PiKVCache
from pikv.presses import AdaKVPress, ChunkKVPress, ComposedPress, ScorerPress, SnapKVPress
from pikv.scoring.base import Scorer
from tiny import batch_of


class WithHoles(Scorer):
    """No number for the token 7 of the first sequence."""

    def score(self, view):
        scores = -view.kept.positions.float()
        scores[0, :, 7] = torch.nan
        return scores


class HolesInItsOwnWay(ScorerPress):
    def score(self, view):
        return WithHoles().score(view)


class HolesInKvpressWay(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return torch.where(torch.arange(keys.shape[2]) == 7, torch.nan, keys.norm(dim=-1))


@pytest.mark.parametrize(
    ("press", "name"),
    [
        (ScorerPress(WithHoles(), 0.5), "ScorerPress"),
        (HolesInItsOwnWay(0.5), "HolesInItsOwnWay"),
        (HolesInKvpressWay(0.5), "HolesInKvpressWay"),
        (AdaKVPress(HolesInItsOwnWay(0.5)), "HolesInItsOwnWay"),
        (ChunkKVPress(HolesInItsOwnWay(0.5), chunk_length=2), "HolesInItsOwnWay"),
        (ComposedPress([SnapKVPress(0.2), HolesInItsOwnWay(0.5)]), "HolesInItsOwnWay"),
    ],
    ids=["scorer", "own", "kvpress", "adakv", "chunkkv", "composed"],
)
def test_scores_that_are_no_numbers_are_refused(llama, press, name):
    said = rf"{name}.* gave [0-9]+ of [0-9]+ tokens of layer 0 the score NaN"
    with torch.no_grad(), press(llama), pytest.raises(ValueError, match=said):
        llama(batch_of([40])[0], past_key_values=PiKVCache(llama.config))


def test_only_scores_that_decide_something_must_be_numbers(llama):
    """Not those behind the end of a row, nor of a sequence that loses nothing; and infinities are numbers."""

    class Behind(ScorerPress):
        def score(self, view):
            scores = view.kept.positions.float()
            scores[1, :, 24:] = torch.nan  # behind its end
            scores[:, :, 3], scores[:, :, 4] = torch.inf, -torch.inf
            return scores

    ids, mask = batch_of([40, 24])
    cache = PiKVCache(llama.config)
    with Behind(0.5)(llama), torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=cache)
    assert cache.positions(0)[1][0].tolist() == [3, *range(13, 24)]

    cache = PiKVCache(llama.config)
    ids, mask = batch_of([8, 40])  # ten tokens are more than the first sequence has
    with ScorerPress(WithHoles(), budget=10)(llama), torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=cache)
    assert cache.lengths(0).tolist() == [[8] * 4, [10] * 4]
