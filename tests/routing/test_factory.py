"""Routers by name."""

import pytest

from pikv.routing import ROUTERS, MoERouter, create_moe_router


def test_names():
    assert set(ROUTERS) == set("base topk_balanced adaptive pikv eplb hierarchical flex time fast mixture".split())
    assert all(issubclass(router, MoERouter) for router in ROUTERS.values())
    with pytest.raises(ValueError, match=r"unknown router 'elpb'.*did you mean 'eplb'"):
        create_moe_router("elpb", 16)
