"""MoERouterPress inside and beside other presses, and its head budgets under them."""

from dataclasses import replace

import pytest
import torch
from routed import kept, run, uncalibrated

from calibrated import RandomlyCalibrated, random_calibration
from pikv import get_press
from pikv.core import LayerView
from pikv.hf.hooks import observe
from pikv.presses import (
    AdaKVPress,
    ChunkPress,
    ComposedPress,
    DuoAttentionPress,
    KnormPress,
    MoERouterPress,
    ProfileBudgetPress,
    ProtectedPress,
    SnapKVPress,
)
from pikv.routing.mixer import expert_weights
from pikv.scoring.position import ends_first
from tiny import batch_of


def test_scores_are_what_it_keeps_by(llama):
    """Votes, weighed by the mixer, with the ends first: computed from the view alone."""
    press = MoERouterPress(0.7, router_type="hierarchical", calibration=random_calibration(llama), head_budgets=False)
    cache = run(llama, press)
    mixers, views = random_calibration(llama).build(llama, "hierarchical", 2), {}

    def look(call):
        layer = call.layer_idx
        views[layer] = LayerView.of(replace(call, state={}), rank=layer, num_layers=3)
        view = views[layer]
        mixture = expert_weights(mixers[layer].router.route(view.hidden_states))
        votes = torch.stack([expert.rank_scores(view) for expert in press.experts.values()], dim=-1)
        best = ends_first(view, mixers[layer](mixture, votes), 4, 16).topk(18, dim=2).indices.sort(dim=2).values
        assert best[0].tolist() == [row.tolist() for row in cache.positions(layer)[0]]

    with torch.no_grad(), observe(llama, after_attention=look):
        llama(batch_of([60])[0])
    assert len(views) == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda press: AdaKVPress(press),
        lambda press: ChunkPress(press, chunk_length=16),
        lambda press: ProtectedPress(press, [(20, 25)]),
        lambda press: ProfileBudgetPress(press, calibration=press.calibration),
        lambda press: ComposedPress([press, KnormPress(0.2)]),
        lambda press: ComposedPress([KnormPress(0.2), press]),
        lambda press: ComposedPress([press, DuoAttentionPress(0.1, sink_size=2, recent_size=4)]),
    ],
    ids=["adakv", "chunk", "protected", "headwise", "first", "second", "duo"],
)
def test_with_other_presses(llama, wrap):
    press = MoERouterPress(0.5, calibration=random_calibration(llama))
    whole = wrap(press)
    for seed in range(2):
        run(llama, whole, lengths=(60, 41), seed=seed).check_integrity()
    stats = whole.get_stats()
    assert 0.4 < stats["compression_ratio"] < 0.7
    assert press.get_stats()["calibrated"] is True


def test_head_budgets_of_a_calibration_for_other_presses(llama, tmp_path):
    calibration = random_calibration(llama)
    calibration.save(tmp_path / "mine.safetensors")
    press = ProfileBudgetPress(SnapKVPress(0.6, window_size=4), calibration=tmp_path / "mine.safetensors")
    cache = run(llama, press)
    routed = run(llama, MoERouterPress(0.6, calibration=calibration))
    for layer in range(3):
        assert torch.equal(cache.lengths(layer), routed.lengths(layer))
    assert kept(cache) != kept(routed)
    assert all(set(row) >= {0, 1, 2, 3, 56, 57, 58, 59} for row in kept(cache))
    by_name = get_press("headwise(knorm):0.6", calibration=calibration)
    assert isinstance(by_name, ProfileBudgetPress)
    assert by_name.compression_ratio == 0.6
    assert kept(run(llama, by_name)) == kept(run(llama, ProfileBudgetPress(KnormPress(0.6), calibration=calibration)))


@uncalibrated
def test_head_budgets_need_a_calibration(llama):
    for spec in ("headwise:0.5", "headwise(h2o):0.5", "headwise(eplb):0.5"):
        with pytest.raises(ValueError, match="head budgets need a calibration of this model; `pikv calibrate` makes one"):
            run(llama, get_press(spec))
    with pytest.raises(ValueError, match="at least 0"):
        ProfileBudgetPress(KnormPress(0.5), sink_size=-1)
    with pytest.raises(ValueError, match="needs a press"):
        ProfileBudgetPress(0.5)


def test_the_helper_for_the_matrix_is_calibrated(llama):
    press = RandomlyCalibrated(0.5, router_type="eplb")
    run(llama, press)
    assert press.get_stats()["calibrated"] is True
