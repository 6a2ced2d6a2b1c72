"""Runs in a process of its own: decoding steps and decisions on the pretended device, told as one line of JSON."""

import json
import warnings

import torch
from cases import PRESSES
from pretend import DEVICE, move, pretend_cuda
from transformers import DynamicCache

import pikv
from pikv import PiKVCache, get_press
from tiny import batch_of, build

SOME_PRESSES = ("snapkv", "h2o", "expected", "kvzip", "duo", "eplb-calibrated")
# family, prompts of the batch, whether the model is given a mask, tokens that the rows keep (None: all) or a press at work
STEPS = {
    "one sequence": ("llama", [40], False, None),
    "one sequence, mask of ones": ("llama", [40], True, None),
    "batch, mask of ones": ("llama", [40, 40], True, None),
    "padded batch": ("llama", [40, 31], True, None),
    "two blocks": ("llama", [40], False, [30, 10, 30, 10]),
    "batch in two blocks, mask of ones": ("llama", [40, 40], True, [30, 30, 10, 10] * 2),
    "padded batch in two blocks": ("llama", [40, 31], True, [30, 30, 10, 10] * 2),
    "every row different": ("llama", [40, 31], True, [30, 25, 20, 15, 27, 22, 17, 12]),
    "one sequence under a press": ("llama", [40], False, "snapkv:0.5"),
    "batch under a press, mask of ones": ("llama", [40, 40], True, "snapkv:0.5"),
    "padded batch under a press": ("llama", [40, 31], True, "snapkv:0.5"),
    "soft-capping": ("gemma2", [40], False, [30, 30, 10, 10]),
    "sinks": ("gpt_oss", [40], False, [30, 30, 10, 10]),
}


def mask_after(mask):
    return torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


def step_of(counts, family, lengths, has_mask, kept, cache_of):
    """What the third decoding step asks the device for; the first two build what is built once."""
    model = move(build(family))
    ids, mask = (tensor.to(DEVICE) for tensor in batch_of(lengths))
    cache = cache_of(model.config)
    if isinstance(kept, str) and isinstance(cache, PiKVCache):
        with get_press(kept)(model):
            return _third_step(counts, model, ids, mask, has_mask, None, cache)
    return _third_step(counts, model, ids, mask, has_mask, kept, cache)


def _third_step(counts, model, ids, mask, has_mask, kept, cache):
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    if kept and isinstance(cache, PiKVCache):
        for layer in cache.ragged_layers:
            cache.rows(layer).keep([torch.arange(count) for count in kept])
    for _ in range(3):
        mask = mask_after(mask)
        counts.clear()
        model(ids[:, -1:], attention_mask=mask if has_mask else None, past_key_values=cache, use_cache=True)
    return {"ours": counts.ours, "elsewhere": counts.elsewhere, "launches": counts.num_launches}


def conversation(counts, model, press):
    """Reads a padded batch in chunks under a press and takes two steps; what its decisions asked for."""
    ids, mask = (tensor.to(DEVICE) for tensor in batch_of([33, 20, 27]))
    cache = PiKVCache(model.config)
    with press(model):  # measures heads and the like, where it needs to
        pass
    counts.clear()
    pikv.prefill(model, ids, cache, press, chunk_size=16, attention_mask=mask)
    found = {"ours": counts.ours, "launches": counts.num_launches}
    cache.check_integrity()
    for _ in range(2):
        mask = mask_after(mask)
        model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
    return found


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = {"steps": {}, "transformers": {}, "presses": {}}
    with pretend_cuda() as counts:
        for name, (family, lengths, has_mask, kept) in STEPS.items():
            found["steps"][name] = step_of(counts, family, lengths, has_mask, kept, PiKVCache)
            found["transformers"][name] = step_of(
                counts, family, lengths, has_mask, None, lambda config: DynamicCache(config=config)
            )
        for family, presses in {"llama": PRESSES, "gemma2": SOME_PRESSES, "gpt_oss": SOME_PRESSES}.items():
            model = move(build(family))
            for name in presses:
                try:
                    found["presses"][f"{family}, {name}"] = conversation(counts, model, PRESSES[name]())
                except Exception as error:  # told, not raised: one process for all
                    found["presses"][f"{family}, {name}"] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
