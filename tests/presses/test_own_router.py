"""Routers of users: a class in a file, a class, a name."""

from pathlib import Path

import pytest
import torch

from pikv import get_press
from pikv.presses import MoERouterPress
from pikv.routing import MoERouter
from pikv.routing.factory import ROUTERS, register_router
from pikv.routing.routers.eplb import EPLBRouter
from tiny import batch_of

SOURCE = """
from pikv.routing import MoERouter

class {name}(MoERouter):
    "Turns the gate's opinion round."

    def read(self, hidden_states, info):
        return super().read(-hidden_states, info)
"""


@pytest.fixture(autouse=True)
def registered():
    """Takes back what a test registers."""
    before = ROUTERS.loaded()
    yield
    for name in ROUTERS.loaded().keys() - before.keys():
        del ROUTERS[name]


def test_a_class_in_a_file_is_a_press_that_can_be_calibrated(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_router.py").write_text(SOURCE.format(name="Turned"))
    press = get_press("my_router.py:Turned:0.75")
    assert isinstance(press, MoERouterPress)
    assert (press.router_type, press.compression_ratio) == ("Turned", 0.75)
    assert press.to_calibrate(llama) == "press.calibrate(model)"  # the command does not know it
    press.calibrate(llama, num_tokens=64, num_steps=1)
    with press(llama), torch.no_grad():
        llama(batch_of([60])[0])
    assert press.get_stats()["calibrated"] is True
    assert type(press.routers[0]).__name__ == "Turned"
    whole = get_press("adakv(my_router.py:Turned):0.5+knorm:0.2", **{})
    assert "MoERouterPress" in repr(whole)
    Path("my_router.py").write_text(SOURCE.format(name="Turned") + "\n    changed = True\n")
    assert get_press("my_router.py:Turned:0.75").routers == {}
    assert ROUTERS["Turned"].changed  # anew, as the file is


def test_two_files_cannot_bring_routers_of_one_name(tmp_path):
    for file in ("one.py", "two.py"):
        (tmp_path / file).write_text(SOURCE.format(name="Turned"))
    get_press(f"{tmp_path}/one.py:Turned:0.5")
    with pytest.raises(ValueError, match="there are two routers 'Turned'; register one under another name"):
        get_press(f"{tmp_path}/two.py:Turned:0.5")


def test_a_registered_one_is_a_press_by_its_name():
    @register_router("backwards")
    class Backwards(MoERouter):
        """Reads backwards."""

    @register_router("hidden", is_press=False)
    class Hidden(MoERouter):
        """Is no press."""

    assert get_press("backwards:0.5").router_type == "backwards"
    assert MoERouterPress(0.5, router_type=Hidden).router_type == "hidden"
    assert MoERouterPress(0.5, router_type=EPLBRouter).router_type == "eplb"
    with pytest.raises(ValueError, match="unknown press 'hidden'"):
        get_press("hidden:0.5")
    with pytest.raises(ValueError, match="a router is a name or a class that derives from MoERouter, not"):
        MoERouterPress(0.5, router_type=int)
