"""Things by name."""

from importlib.metadata import EntryPoint

import pytest

from pikv.checks import check_count, check_ratio, check_share
from pikv.registry import Registry


def shapes():
    registry = Registry("shape")
    for name in ("circle", "square", "triangle"):
        registry[name] = name.upper()
    return registry


def test_names_lead_to_what_was_registered():
    registry = shapes()
    assert registry["square"] == "SQUARE"
    assert list(registry) == ["circle", "square", "triangle"]
    assert len(registry) == 3
    registry.register("square", "another")
    del registry["circle"]
    assert dict(registry) == {"square": "another", "triangle": "TRIANGLE"}
    assert registry.get("circle") is None
    assert "circle" not in registry


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sqare", "unknown shape 'sqare'; did you mean 'square'? available: circle, square, triangle"),
        ("xyz", "unknown shape 'xyz'; available: circle, square, triangle"),
        ("x" * 1_000_000, f"unknown shape '{'x' * 57}...'; available: circle, square, triangle"),
    ],
)
def test_what_is_said_of_a_name_that_nothing_has(name, message):
    with pytest.raises(ValueError) as caught:
        shapes()[name]
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="unknown shape 'a'; available: none"):
        Registry("shape")["a"]


def test_files_are_imported_when_their_names_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "own_shapes.py").write_text("import builtins\nbuiltins.shapes_of_test['hexagon'] = 6\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("shape", files=lambda: {"hexagon": "own_shapes", "gone": "own_shapes"})
    monkeypatch.setattr("builtins.shapes_of_test", registry, raising=False)
    assert list(registry) == ["hexagon", "gone"]
    assert registry._things == {}
    assert registry["hexagon"] == 6
    with pytest.raises(ValueError, match="unknown shape 'gone'"):
        registry["gone"]


def test_entry_points_are_checked_when_they_are_asked_for(monkeypatch):
    found = [EntryPoint("log", "math:log", "shapes"), EntryPoint("gone", "math:gone", "shapes")]
    monkeypatch.setattr("pikv.registry.entry_points", lambda group: found if group == "shapes" else [])
    registry = Registry("shape", group="shapes", check=lambda name, thing: (name, thing(1)))
    assert list(registry) == ["log", "gone"]
    assert registry["log"] == ("log", 0.0)
    with pytest.raises(ValueError, match="shape 'gone' of another package cannot be loaded: AttributeError"):
        registry["gone"]
    assert list(Registry("shape")) == []


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, True, None, "3", float("nan"), float("inf"), 10**30])
def test_counts_are_whole_numbers(value):
    assert check_count(3, "size") == 3
    with pytest.raises(ValueError, match="size must be a whole number of at least 1") as caught:
        check_count(value, "size")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [-0.1, 1.1, True, None, "0.5", float("nan"), pytest.param(10**5000, id="10**5000")])
def test_shares_and_ratios(value):
    assert (check_share(1, "share"), check_share(0.5, "share"), check_ratio(0)) == (1.0, 0.5, 0.0)
    with pytest.raises(ValueError, match="share must lie between 0 and 1"):
        check_share(value, "share")
    with pytest.raises(ValueError, match="compression_ratio must be at least 0 and less than 1"):
        check_ratio(value)
    with pytest.raises(ValueError, match="less than 1"):
        check_ratio(1)
