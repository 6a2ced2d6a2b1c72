"""Routers by name, and what a kind of router says of itself."""

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pikv
import pikv.routing.routers
from pikv import list_presses
from pikv.presses import MoERouterPress
from pikv.presses.registry import press_info
from pikv.routing import (
    ROUTERS,
    BaseMoERouter,
    MoERouter,
    PiKVMoERouter,
    PiKVRouter,
    TimeRouter,
    create_moe_router,
)
from pikv.routing.factory import register_router

KINDS = ["base", "topk_balanced", "adaptive", "pikv", "eplb", "hierarchical", "flex", "time", "fast", "mixture"]


def test_routers_by_name():
    assert list(ROUTERS) == KINDS
    for name, kind in ROUTERS.items():
        assert type(create_moe_router(name, 8)) is kind
    with pytest.raises(ValueError, match="unknown router 'elpb'; did you mean 'eplb'"):
        create_moe_router("elpb", 8)
    with pytest.raises(TypeError, match="num_groups"):
        create_moe_router("eplb", 8, num_groups=2)


def test_names_of_the_guide():
    assert BaseMoERouter is MoERouter is ROUTERS["base"]
    assert PiKVMoERouter is PiKVRouter is ROUTERS["pikv"]


def test_every_file_in_the_folder_of_routers_registers_one():
    names = {module.name for module in pkgutil.iter_modules(pikv.routing.routers.__path__)}
    assert names | {"base"} == set(ROUTERS)
    kinds = {name for name, kind in ROUTERS.items() if kind.is_press}
    assert kinds == set(KINDS[:6])
    assert {name for name in list_presses() if press_info(name).group == "router"} == kinds


def test_a_file_of_a_router_makes_a_press_of_its_name(tmp_path):
    """In a copy of the package, by nothing but that file."""
    package = tmp_path / "pikv"
    shutil.copytree(Path(pikv.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    lines = [
        "from pikv.routing.base import MoERouter",
        "from pikv.routing.factory import register_router",
        '@register_router("{0}", is_press={1}, paper="2101.03961")',
        "class {2}(MoERouter):",
        '    """Sends every token where the others go."""',
    ]
    for name, is_press, kind in (("herd", True, "HerdRouter"), ("flock", False, "FlockRouter")):
        (package / "routing/routers" / f"{name}.py").write_text("\n".join(lines).format(name, is_press, kind))
    code = (
        "import sys; from pikv.presses.catalog import catalog; info = catalog()['herd']; assert 'torch' not in sys.modules;"
        "from pikv import get_press, list_presses; from pikv.presses import press_info;"
        "assert 'herd' in list_presses() and 'flock' not in list_presses() and press_info('herd') == info, info;"
        "assert (info.description, info.paper) == ('Sends every token where the others go.', '2101.03961'), info;"
        "press = get_press('herd:0.25', calibration=None);"
        "assert (press.router_type, press.compression_ratio) == ('herd', 0.25)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})


def test_a_router_is_added_by_one_registration(llama):
    """It is a kind for presses at once, with options of its own that its signature names."""

    @register_router("shy")
    class ShyRouter(PiKVRouter):
        def __init__(self, *args, shyness=0.5, **options):
            super().__init__(*args, **options)
            self.shyness = shyness

    try:
        assert list(ROUTERS)[-1] == "shy"
        assert ShyRouter.option_names() == {"shyness", *PiKVRouter.option_names()}
        press = MoERouterPress(router_type="shy", cache_aware=False, calibration=None)
        press.bind(llama)
        assert [router.cache_aware for router in press.routers.values()] == [False] * 3
        with pytest.raises(ValueError, match="unknown router 'shyy'; did you mean 'shy'"):
            MoERouterPress(router_type="shyy")
    finally:
        del ROUTERS["shy"]
    assert "shy" not in ROUTERS


def test_options_of_a_kind_follow_from_its_signature():
    common = {"capacity_factor", "dropout"}
    assert MoERouter.option_names() == ROUTERS["eplb"].option_names() == common
    assert PiKVRouter.option_names() == {"cache_aware", "cache_weight", "momentum", *common}
    assert TimeRouter.option_names() == {"num_frequencies", "longest_period", *common}


def test_what_routers_ask_of_others():
    positions, rates = torch.tensor([3, 4, 9]), torch.tensor([0.25, float("nan"), 0.5, 1.0])
    for name in KINDS:
        router = create_moe_router(name, 8)
        info, without = router.token_info(positions, rates), router.token_info(positions, None)
        if name == "time":
            assert info["timestamps"].tolist() == without["timestamps"].tolist() == [3.0, 4.0, 9.0]
        elif name == "pikv":
            router.hit_rates.fill_(0.75)
            info = router.token_info(positions, rates)
            assert info["hit_rates"].tolist() == [0.25, 0.75, 0.5, 1.0]
            assert without is None
        else:
            assert info is None and without is None
        router.route(torch.ones(3, 8), info)  # which it takes
        assert router.uses_hits == (name == "pikv")
        router.update_hit_rates(torch.ones(4), torch.full((4,), 2.0))
