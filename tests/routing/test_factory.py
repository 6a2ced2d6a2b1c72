"""Routers by name, and what a kind of router says of itself."""

import pkgutil

import pytest
import torch

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
from pikv.routing.factory import press_kinds, register_router

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
    assert press_kinds() == KINDS[:6]
    assert {name for name in list_presses() if press_info(name).group == "router"} == set(press_kinds())


def test_a_router_is_added_by_one_registration(llama):
    """It is a kind for presses at once, with options of its own that its signature names."""

    @register_router("shy")
    class ShyRouter(PiKVRouter):
        def __init__(self, *args, shyness=0.5, **options):
            super().__init__(*args, **options)
            self.shyness = shyness

    try:
        assert press_kinds()[-1] == "shy"
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
