"""The matrix of presses, families and data types on a device, against the oracle of the tests."""

import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from cases import PRESSES
from test_matrix import ALL_EXPERTS, DTYPES, STEPS, conversation

from on_gpu.device import exact_arithmetic
from oracle import expected_logits, run_turns
from tiny import build

FAMILIES = ("llama", "gpt_oss", "gemma2", "gpt2", "qwen3", "mixtral", "opt")
QUICK_FAMILIES = ("llama", "gpt_oss")
QUICK_PRESSES = ("none", "snapkv", "h2o", "kvzip", "duo", "adakv", "eplb-calibrated", "eplb+duo")
LARGEST_ERROR = 1e-4  # of a logit, in float32
LARGEST_NOISE_RATIO = 1.5  # error over the model's own in the same data type


def cases(quick: bool) -> list[tuple[str, str, str]]:
    """Family, data type and press; what says most comes first, since time may run out."""
    families = QUICK_FAMILIES if quick else FAMILIES
    dtypes = ("float32", "bfloat16") if quick else tuple(DTYPES)
    presses = QUICK_PRESSES if quick else tuple(PRESSES)
    pairs = [(i + j, family, dtype) for i, family in enumerate(families) for j, dtype in enumerate(dtypes)]
    return [(family, dtype, press) for _, family, dtype in sorted(pairs, key=lambda pair: pair[0]) for press in presses]


@cache
def _model(family: str, dtype: str, device: str, exact: bool) -> Any:
    settings = {} if dtype == "float32" else ALL_EXPERTS.get(family, {})
    model = build(family, DTYPES[dtype], device=device, **settings)
    return model.float() if exact else model


def measure(family: str, dtype: str, press: str, device: str) -> dict[str, Any]:
    """One case: the largest error in float32; in low precision its mean error over that of the model's own plain run."""
    turns = [(ids.to(device), mask.to(device)) for ids, mask in conversation()]
    chunks = {"chunk_size": 16} if dtype == "float32" else {}
    model = _model(family, dtype, device, exact=False)
    ids, mask, logits, evictions, _ = run_turns(model, PRESSES[press](), turns, STEPS, **chunks)
    if dtype == "float32":
        error = (logits - expected_logits(model, ids, mask, evictions, STEPS)).abs().max()
        return {"figure": "largest error", "value": float(error), "passed": bool(error <= LARGEST_ERROR)}
    exact = expected_logits(_model(family, dtype, device, exact=True), ids, mask, evictions, STEPS)
    noise = (expected_logits(model, ids, mask, evictions, STEPS).float() - exact).abs().mean()
    ratio = (logits.float() - exact).abs().mean() / noise
    return {"figure": "error over the model's own", "value": float(ratio), "passed": bool(ratio <= LARGEST_NOISE_RATIO)}


def run(device: str, quick: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields one result a case, until the deadline; then one that says how many were left out."""
    todo = cases(quick)
    with exact_arithmetic(), torch.no_grad():
        for done, (family, dtype, press) in enumerate(todo):
            if time.monotonic() > deadline:
                yield {"left_out": len(todo) - done, "why": "the time for exactness was spent"}
                return
            result: dict[str, Any] = {"family": family, "dtype": dtype, "press": press}
            try:
                result |= measure(family, dtype, press, device)
            except Exception as error:  # one broken press must not hide the others
                result |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
            yield result
