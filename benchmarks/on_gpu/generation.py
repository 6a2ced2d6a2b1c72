"""Generation on a device: what must come out the same, checked on a tiny model in float32."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from on_gpu.device import exact_arithmetic
from pikv import PiKVCache, get_press
from tiny import batch_of, build

SPEC = "duo:0.5"
NEW_TOKENS = 12


class NotOfferedError(Exception):
    """Says why something is not checked."""


def _options(**further: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW_TOKENS, "do_sample": False, **further}


def full_cache_is_that_of_transformers(device: str) -> None:
    for family in ("llama", "gpt2", "gemma2"):
        model, (ids, mask) = build(family, device=device), batch_of([40, 31], device=device)
        plain = model.generate(ids, attention_mask=mask, **_options())
        ours = model.generate(ids, attention_mask=mask, past_key_values=PiKVCache(model.config), **_options())
        assert torch.equal(plain, ours), f"{family}: {plain.tolist()} and {ours.tolist()}"


def batch_is_each_alone(device: str) -> None:
    model, lengths = build("llama", device=device), [40, 31, 22]
    ids, mask = batch_of(lengths, device=device)
    for spec in (SPEC, "snapkv:0.5", "adakv(snapkv):0.5"):
        with get_press(spec)(model):
            together = model.generate(ids, attention_mask=mask, **_options())
            for row, length in enumerate(lengths):
                alone = model.generate(ids[row : row + 1, -length:], attention_mask=mask[row : row + 1, -length:], **_options())
                assert torch.equal(together[row, -NEW_TOKENS:], alone[0, -NEW_TOKENS:]), f"{spec}, sequence {row}"


def sampling_repeats_by_its_seed(device: str) -> None:
    model, (ids, mask) = build("llama", device=device), batch_of([40, 31], device=device)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with get_press(SPEC)(model):
            options = _options(do_sample=True, top_p=0.95, temperature=1.5, num_return_sequences=3)
            runs.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(runs[0], runs[1]), "the same seed gave other tokens"
    assert not torch.equal(runs[0], runs[2]), "another seed gave the same tokens"


def beams_are_those_of_transformers(device: str) -> None:
    model, (ids, mask) = build("llama", device=device), batch_of([40, 31], device=device)
    plain = model.generate(ids, attention_mask=mask, **_options(num_beams=3))
    try:
        ours = model.generate(ids, attention_mask=mask, past_key_values=PiKVCache(model.config), **_options(num_beams=3))
    except ValueError as refusal:
        raise NotOfferedError(str(refusal)) from refusal
    assert torch.equal(plain, ours), f"{plain.tolist()} and {ours.tolist()}"


def turns_go_on_from_the_cache(device: str) -> None:
    model = build("llama", device=device)
    cache, text = PiKVCache(model.config), batch_of([40], device=device)[0]
    for turn in range(3):
        mask = torch.ones_like(text)  # what was generated may hold the token that pads
        plain = model.generate(text, attention_mask=mask, **_options())
        ours = model.generate(text, attention_mask=mask, past_key_values=cache, **_options())
        assert torch.equal(plain, ours), f"turn {turn}: {plain.tolist()} and {ours.tolist()}"
        text = torch.cat([ours, batch_of([9], seed=turn, device=device)[0]], dim=1)


@torch.no_grad()
def saved_caches_go_on_anywhere(device: str) -> None:
    model, on_host = build("llama", device=device), build("llama")
    ids, token = batch_of([40], device=device)[0], torch.tensor([[5]], device=device)
    cache = PiKVCache(model.config)
    with get_press(SPEC)(model):
        model(ids, past_key_values=cache)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        loaded, hosted = PiKVCache.load(path, model.config, device=device), PiKVCache.load(path, on_host.config)
    expected = model(token, past_key_values=cache).logits
    error = (model(token, past_key_values=loaded).logits - expected).abs().max()
    assert error <= 1e-4, f"on the device: {float(error)}"
    error = (on_host(token.cpu(), past_key_values=hosted).logits - expected.cpu()).abs().max()
    assert error <= 1e-3, f"on the CPU: {float(error)}"  # two devices' arithmetic


def decoding_press_bounds_the_cache(device: str) -> None:
    from pikv.presses import DecodingPress, KnormPress

    model, (ids, mask) = build("llama", device=device), batch_of([40, 31], device=device)
    cache = PiKVCache(model.config)
    with DecodingPress(KnormPress(), target_size=20, compression_interval=4)(model):
        model.generate(ids, attention_mask=mask, past_key_values=cache, **_options())
    cache.check_integrity()
    assert int(cache.lengths(0).max()) <= 24, cache.lengths(0).tolist()


CHECKS: tuple[Callable[[str], None], ...] = (
    full_cache_is_that_of_transformers,
    batch_is_each_alone,
    sampling_repeats_by_its_seed,
    beams_are_those_of_transformers,
    turns_go_on_from_the_cache,
    saved_caches_go_on_anywhere,
    decoding_press_bounds_the_cache,
)


def run(device: str, quick: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields one result a check, until the deadline; then one that says how many were left out."""
    with exact_arithmetic():
        for done, check in enumerate(CHECKS):
            if time.monotonic() > deadline:
                yield {"left_out": len(CHECKS) - done, "why": "the time for generation was spent"}
                return
            result: dict[str, Any] = {"check": check.__name__.replace("_", " ")}
            try:
                check(device)
                result["passed"] = True
            except NotOfferedError as reason:
                result["skipped"] = str(reason)
            except Exception as error:
                result |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
            yield result
