"""Whether keys that one model has cached make sense to another, read off their configurations."""

import json
import re
import reprlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pikv.hf.shape import text_config
from pikv.hf.support import attention_modules

ModelSignature = dict[str, Any]

# Training, outputs and how the model is loaded: with these changed, the same tokens still have the same keys.
_IMMATERIAL = re.compile(
    r"_.*|.*_token_ids?|.*dropout.*|.*_pdrop|layerdrop|initializer_.*|output_.*|summary_.*|router_aux_loss_coef|router_z_loss_coef"
    r"|router_jitter_noise|pretraining_tp|tie_word_embeddings|use_cache|quantization_config|name_or_path|torch_dtype"
)


def check_config(config: Any) -> None:
    """Raises ValueError for what is no configuration of a model, such as the model itself."""
    if not hasattr(config, "get_text_config"):
        hint = "model.config, not the model itself" if hasattr(config, "config") else f"a model's config, not {config!r}"
        raise ValueError(f"PiKVCache takes {hint}")


def model_signature(config: Any) -> ModelSignature:
    """What decides over the keys of a model's decoder: its configuration without what is immaterial, as JSON has it."""
    check_config(config)
    facts: ModelSignature = json.loads(json.dumps(_material(text_config(config).to_dict()), default=str))
    return facts


def check_same_model(made_for: ModelSignature, facts: ModelSignature) -> None:
    """Raises ValueError, naming the entries that differ, if keys made for one model make no sense to the other."""
    kind, other_kind = made_for.get("model_type"), facts.get("model_type")
    if kind != other_kind:
        raise ValueError(f"made for {kind}, this model is {other_kind}")
    made_for = _material(made_for)  # another release may have found more entries material
    differing = [name for name in sorted({*made_for, *facts}) if made_for.get(name) != facts.get(name)]
    if differing:
        pairs = (f"{name}={_short(made_for.get(name))}, this model has {_short(facts.get(name))}" for name in differing)
        raise ValueError(f"made for {kind} with {'; '.join(pairs)}")


def _material(entries: ModelSignature) -> ModelSignature:
    # What every model's configuration has is about transformers, not about the model's arithmetic.
    generic = PreTrainedConfig().to_dict().keys() - {"model_type"}
    return {name: value for name, value in entries.items() if name not in generic and not _IMMATERIAL.fullmatch(name)}


def _short(value: Any) -> str:
    return value if isinstance(value, str) else reprlib.repr(value)


_ENTRIES = 64
_TOLERANCE = 2e-2


def fingerprint(model: Any) -> Tensor:
    """Entries of the input embeddings and of the first, middle and last attention module, evenly spaced (float32, CPU).

    They are the same in every precision, or nearly.
    """
    modules = list(attention_modules(model).values())
    chosen = [model.get_input_embeddings(), modules[0], modules[len(modules) // 2], modules[-1]]
    weights = [next((each for each in module.parameters() if each.is_floating_point()), None) for module in chosen]
    return torch.cat([_spread(weight.detach()) for weight in weights if weight is not None])


def _spread(weight: Tensor) -> Tensor:
    places = torch.linspace(0, weight.numel() - 1, _ENTRIES, dtype=torch.float64).long()
    return weight.flatten()[places.to(weight.device)].float().cpu()


def is_same_fingerprint(one: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints differ by no more than rounding, or a light fine-tuning, explains, in every part."""
    if one.shape != other.shape:
        return False
    parts, other_parts = one.split(_ENTRIES), other.split(_ENTRIES)
    return all(
        bool((part - theirs).norm() <= _TOLERANCE * part.norm()) for part, theirs in zip(parts, other_parts, strict=True)
    )
