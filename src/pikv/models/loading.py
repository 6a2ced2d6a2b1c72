"""Loading a model and its tokenizer by name, with one clear error if that cannot be."""

from pathlib import Path
from typing import Any

import torch

from pikv.hf.support import check_supported
from pikv.models.demo import load_demo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str, device: str = "cpu", dtype: str = "float32", attn_implementation: str | None = None
) -> tuple[Any, Any]:
    """Loads ``demo``, a local folder or a hub id, in evaluation mode, with its tokenizer.

    ``attn_implementation`` is what transformers calls so, such as ``eager`` or ``sdpa``; None leaves the choice to it.

    Raises:
        ValueError: for an unknown device, dtype or attention implementation, a model that cannot be read, or an unsupported
            architecture.
    """
    torch_dtype = check_dtype(dtype)
    check_device(device)
    if name == "demo":
        model, tokenizer = load_demo()
        model = model.to(torch_dtype)
        if attn_implementation is not None:
            _set_attention(model, attn_implementation)
    else:
        model, tokenizer = _load_pretrained(name, torch_dtype, attn_implementation)
    check_supported(model)
    return model.to(device).eval(), tokenizer


def check_dtype(dtype: str) -> torch.dtype:
    """The data type of this name; ValueError if there is none."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r} (available: {', '.join(DTYPES)})")
    return DTYPES[dtype]


def check_device(device: str) -> None:
    """Raises ValueError unless torch can compute on the device."""
    try:
        torch.zeros(1, device=device).item()  # the device "meta" makes tensors, but has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from None


def _set_attention(model: Any, attn_implementation: str) -> None:
    try:
        model.set_attn_implementation(attn_implementation)
    except Exception as error:
        raise ValueError(f"cannot use attention implementation {attn_implementation!r}: {_first_line(error)}") from None


def _load_pretrained(name: str, dtype: torch.dtype, attn_implementation: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    is_local = Path(name).exists() or name.startswith((".", "/", "~")) or name.endswith("/")
    if is_local and not (Path(name) / "config.json").is_file():
        raise ValueError(f"cannot read a model from {name}: there is no config.json")
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = _load_tokenizer(AutoTokenizer, name, is_local)
        # Meta weights first: whether the architecture is supported is known before gigabytes are read.
        with torch.device("meta"):
            check_supported(AutoModelForCausalLM.from_config(config))
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attn_implementation)
    except Exception as error:  # whatever is wrong with foreign files, the user gets one line
        place = "" if is_local else ", which is no folder here"
        raise ValueError(f"cannot load model {name!r}{place}: {_first_line(error)}") from error
    return model, tokenizer


def _load_tokenizer(auto: Any, name: str, is_local: bool) -> Any:
    try:
        return auto.from_pretrained(name)
    except Exception as error:
        if not is_local or any(Path(name).glob("*token*")):
            raise
        raise ValueError(f"the folder has no tokenizer; save it there: tokenizer.save_pretrained({name!r})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
