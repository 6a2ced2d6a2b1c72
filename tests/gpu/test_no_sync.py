"""What a GPU would be asked for, counted without one (``pretend.py``): no tensors of two devices meet, and no step waits.

A host synchronisation in a decoding step costs more than the step's arithmetic: the device idles until the host has caught up.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration
from cases import PRESSES
from on_pretended import SOME_PRESSES, STEPS

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made of Python",
)

# Waits that are known, by scenario; strict: take an entry out when it is mended.
BEYOND_TRANSFORMERS = {
    "padded batch in two blocks": "the positions of a step are built on the host where sequences are not equally long",
}
OF_OURS = {
    name: "the mask is read back to see whether a step brings padding"
    for name, (_, _, has_mask, _) in STEPS.items()
    if has_mask
} | BEYOND_TRANSFORMERS


def run(*arguments):
    """Runs Python in a process of its own, which finds what this one finds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def found():
    done = run(str(Path(__file__).with_name("on_pretended.py")))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def scenarios(known):
    return [
        pytest.param(name, marks=pytest.mark.xfail(reason=known[name], strict=True) if name in known else ()) for name in STEPS
    ]


@pytest.mark.parametrize("name", scenarios(BEYOND_TRANSFORMERS))
def test_a_step_waits_no_more_than_that_of_transformers(found, name):
    step, theirs = found["steps"][name], found["transformers"][name]
    assert theirs["launches"] > 50  # something was counted
    assert sum(step["ours"].values()) + step["elsewhere"] <= theirs["elsewhere"], step["ours"]


@pytest.mark.parametrize("name", scenarios(OF_OURS))
def test_a_step_never_waits_for_us(found, name):
    assert found["steps"][name]["ours"] == {}


def test_a_dense_step_launches_no_more_than_that_of_transformers(found):
    for name in ("one sequence", "one sequence, mask of ones", "batch, mask of ones"):
        assert found["steps"][name]["launches"] <= found["transformers"][name]["launches"], name


def test_launches_follow_the_number_of_blocks(found):
    """A second block costs a layer no more than this many launches (its appends, its attention, its part of the output)."""
    one, two = found["steps"]["one sequence"]["launches"], found["steps"]["two blocks"]["launches"]
    assert two - one <= 16 * 3, f"{two - one} launches more in three layers"


@pytest.mark.parametrize(
    "case",
    [f"llama, {name}" for name in PRESSES] + [f"{family}, {name}" for family in ("gemma2", "gpt_oss") for name in SOME_PRESSES],
)
def test_no_tensors_of_two_devices_meet(found, case):
    result = found["presses"][case]
    assert "error" not in result, result["error"]
    assert result["launches"] > 200  # it was at work


def test_the_count_sees_what_it_is_there_for():
    code = """
import torch
from pretend import DEVICE, pretend_cuda
with pretend_cuda() as counts:
    numbers = torch.arange(6, device=DEVICE)
    def waits(ask):
        counts.clear(); ask(); return counts.elsewhere
    many = [lambda: bool(numbers.any()), lambda: numbers.tolist(), lambda: numbers.cpu(), lambda: int(numbers[0]),
            lambda: numbers.nonzero(), lambda: numbers[numbers > 2], lambda: numbers[[1, 2]], lambda: torch.ones(2).to(DEVICE),
            lambda: torch.tensor([1, 2], device=DEVICE), lambda: numbers.unique(), lambda: numbers.repeat_interleave(numbers)]
    assert all(waits(ask) >= 1 for ask in many), [waits(ask) for ask in many]
    none = [lambda: numbers + 1, lambda: numbers.sort(), lambda: numbers[1:3], lambda: numbers.masked_fill(numbers > 2, 0),
            lambda: numbers.to(torch.float), lambda: numbers.cumsum(0), lambda: numbers.gather(0, numbers)]
    assert not any(waits(ask) for ask in none), [waits(ask) for ask in none]
    numbers[2:] = 7
    assert numbers.tolist() == [0, 1, 7, 7, 7, 7]
    try:
        numbers + torch.ones(6)
    except RuntimeError as error:
        assert "meet" in str(error)
    else:
        raise AssertionError("tensors of two devices were added")
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-1500:]
