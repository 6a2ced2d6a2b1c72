"""Methods by specification."""

import pytest

from pikv.evaluation.methods import parse_methods, parts_of
from pikv.presses import list_presses
from pikv.presses.moe import MoERouterPress
from pikv.presses.registry import press_info


def test_all_stands_for_every_press():
    methods = [method.name for method in parse_methods("all:0.5,knorm:0.1")]
    names = [name for name in list_presses() if name not in ("none", "headwise")]
    takes_ratio = [press_info(name).number == "compression_ratio" for name in names]
    expected = [f"{name}:0.5" if takes else name for name, takes in zip(names, takes_ratio, strict=True)]
    assert methods == ["none", *expected, "knorm:0.1"]
    assert {"int4", "turbo", "svd", "think", "snapkv:0.5"} <= set(methods)
    assert "snapkv:0.75" in [method.name for method in parse_methods("all")]


def test_a_press_in_a_file_of_ones_own(tmp_path):
    path = tmp_path / "my_press.py"
    path.write_text(
        'from pikv.scoring.base import Scorer\n\n\nclass NewestPress(Scorer):\n    """Keeps the newest."""\n\n'
        "    def score(self, view):\n        return view.kept.positions.float()\n"
    )
    names = [method.name for method in parse_methods(f"none,{path}:NewestPress:0.75,adakv(h2o):0.5")]
    assert names == ["none", f"{path}:NewestPress:0.75", "adakv(h2o):0.5"]
    assert parse_methods(f"{path}:NewestPress:0.75")[1].press().compression_ratio == 0.75


def test_repeated_and_blank_methods_count_once():
    assert [method.name for method in parse_methods("duo:0.5,, none ,duo:0.5")] == ["none", "duo:0.5"]


@pytest.mark.parametrize("spec", ["eplb:0.5", "eplb:0.35+duo:0.15", "chunkkv(pikv):0.5", "snapkv:0.2+adakv(eplb):0.5"])
def test_routers_get_the_number_of_experts_that_was_asked_for(spec):
    for num_experts in (1, 2, 8):
        full, method = parse_methods(spec, num_experts)
        assert full.name == "none"
        press, default = method.press(), parse_methods(spec)[1].press()
        (router,) = [part for part in parts_of(press) if isinstance(part, MoERouterPress)]
        assert len(router.experts) == num_experts
        assert router.top_k == min(2, num_experts)
        assert press.compression_ratio == default.compression_ratio
        assert [type(part) for part in parts_of(press)] == [type(part) for part in parts_of(default)]


def test_other_presses_stay_as_they_are():
    _, snapkv, eplb = parse_methods("snapkv:0.5,eplb:0.5", 8)
    assert snapkv.build is None and eplb.build is not None
