"""What users get wrong."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transcript import Transcript
from transformers import DynamicCache

import pikv
from pikv import PiKVCache, get_press
from tiny import build


def attempt(how: str, model: Any, cache: PiKVCache, truth: Transcript) -> None:
    """Does one of ``plan.ABUSES``; what comes of it besides an error is nobody's cache."""
    size, columns = truth.ids.shape
    some = torch.full((size, 3), 5)
    if how == "another batch size" and columns:
        model(torch.full((size + 1, 3), 5), past_key_values=cache)
    elif how == "crop of more than there is":
        cache.crop(columns + 7)
        cache.crop(-columns - 7)
    elif how == "mark of another cache":
        other = PiKVCache(model.config)
        cache.rewind(other.mark())
    elif how == "file of another model" and columns:
        with tempfile.TemporaryDirectory() as folder:
            cache.save(Path(folder) / "cache")
            other = build("mistral" if model.config.model_type != "mistral" else "llama", num_hidden_layers=2)
            PiKVCache.load(Path(folder) / "cache", other.config)
    elif how == "file in a missing folder":
        cache.save("/nowhere/at/all/cache")
    elif how == "empty input":
        pikv.prefill(model, torch.zeros((size, 0), dtype=torch.long), cache)
    elif how == "mask that is too short":
        pikv.prefill(model, some, cache, attention_mask=torch.ones((size, columns + 2), dtype=torch.long))
    elif how == "chunks of one column":
        pikv.prefill(model, some, cache, chunk_size=1)
    elif how == "beam search":
        with get_press("knorm:0.5")(model):
            model.generate(torch.full((1, 3), 5), num_beams=2, max_new_tokens=2, do_sample=False)
    elif how == "4D mask" and columns:
        model(some, attention_mask=torch.zeros((size, 1, 3, columns + 3)), past_key_values=cache)
    elif how == "full cache of transformers":
        plain = DynamicCache(config=model.config)
        model(some, past_key_values=plain)
        with get_press("knorm:0.5")(model):
            model(some, past_key_values=plain)
    elif how == "press that keeps nothing":
        with get_press("knorm:0.99")(model):
            model(some, past_key_values=cache if not columns else PiKVCache(model.config))
