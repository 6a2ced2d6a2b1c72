"""Loading a model and its tokenizer by name, with one clear error if that cannot be."""

from pathlib import Path
from typing import Any

import torch

from pikv.hf.support import check_supported
from pikv.models.demo import load_demo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """Loads ``demo``, a local folder or a hub id, in evaluation mode, with its tokenizer.

    Raises:
        ValueError: for an unknown device or dtype, a model that cannot be read, or an unsupported architecture.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}, there is {', '.join(DTYPES)}")
    check_device(device)
    if name == "demo":
        model, tokenizer = load_demo()
        model = model.to(DTYPES[dtype])
    else:
        model, tokenizer = _load_pretrained(name, DTYPES[dtype])
    check_supported(model)
    return model.to(device).eval(), tokenizer


def check_device(device: str) -> None:
    """Raises ValueError unless torch can use the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from None


def _load_pretrained(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    is_local = Path(name).exists() or name.startswith((".", "/", "~"))
    if is_local and not (Path(name) / "config.json").is_file():
        raise ValueError(f"cannot read a model from {name}: there is no config.json")
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Meta weights first: whether the architecture is supported is known before gigabytes are read.
        with torch.device("meta"):
            check_supported(AutoModelForCausalLM.from_config(config))
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # whatever is wrong with foreign files, the user gets one line
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load model {name!r}: {reason}") from error
    return model, tokenizer
