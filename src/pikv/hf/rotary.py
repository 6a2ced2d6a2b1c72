"""The rotary position embedding of a model, so that keys and queries can be turned back, or on (RoPE, arXiv 2104.09864)."""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from pikv.cache.coding.rope import Rope
from pikv.hf.shape import text_config
from pikv.hf.support import attention_modules, ragged_layers

_UNSTEADY = ("dynamic", "longrope")  # frequencies that change with the length of the text
# Which elements of a vector turn together, and how the model's tables of cosines repeat: vectors in halves with every
# angle twice (Llama), in neighbours with every angle twice (Cohere), in halves with every angle once (GPT-OSS).
_HALVES, _NEIGHBOURS, _HALVES_ONCE = "halves", "neighbours", "halves once"


class Rotary:
    """Turns vectors as the attention of one model turns its queries and keys.

    The model's own function decides which way of turning that is: one that gives other results than all known ways is refused.

    Raises:
        ValueError: if the model has no rotary embedding, or one whose working is not known here.
    """

    def __init__(self, model: Any) -> None:
        config = text_config(model.config)
        name = config.model_type
        found = _rotary_modules(model)
        if not found:
            raise ValueError(f"{name}: this model has no rotary position embedding")
        uneven = getattr(config, "no_rope_layers", None) or name in ("cohere2", "exaone4")
        if uneven or _rope_type(config) in _UNSTEADY:
            raise ValueError(
                f"{name}: rotary embeddings that change with the length, or are left out in layers, are not supported"
            )
        self._module: nn.Module = found[0]
        self._layer_types: list[str] | None = getattr(config, "layer_types", None)
        self._takes_layer_type = "layer_type" in inspect.signature(self._module.forward).parameters
        layer = ragged_layers(config)[0]
        module = attention_modules(model)[layer]
        source = sys.modules[type(module).__module__]
        head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        self._way = self._find_way(getattr(source, "apply_rotary_pos_emb", None), layer, head_dim, name)

    def rotate(self, vectors: Tensor, positions: Tensor, layer_idx: int) -> Tensor:
        """Turns ``vectors`` ``[..., D]`` on by ``positions`` ``[...]``, which may be negative; computed in float32."""
        cos, sin = self.angles(positions, layer_idx)
        return self._turn(vectors, cos, sin)

    def mean_matrix(self, positions: Tensor, layer_idx: int, dim: int) -> Tensor:
        """The mean over ``positions`` ``[n]`` of the matrices that turn vectors, ``[D, D]`` (float32): ``vector @ matrix``."""
        cos, sin = self.angles(positions, layer_idx)
        unit = torch.eye(dim, device=positions.device)
        return self._turn(unit, cos.mean(0), sin.mean(0))

    def angles(self, positions: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every angle once, ``[..., rotated / 2]`` (float32), without the scaling of some models."""
        cos, sin = (_once(table, self._way) for table in self._tables(positions.abs(), layer_idx))
        scale = (cos.square() + sin.square()).sqrt()
        return cos / scale, sin / scale * positions.sign().unsqueeze(-1)

    def rope(self, layer_idx: int) -> Rope:
        """The rotation of a layer as numbers, for who has to do it without the model."""
        device = next(iter(self._module.buffers())).device
        cos, sin = self.angles(torch.ones(1, dtype=torch.long, device=device), layer_idx)
        frequencies = torch.atan2(sin.double(), cos.double()).flatten().tolist()
        return Rope(frequencies=tuple(frequencies), way="neighbours" if self._way == _NEIGHBOURS else "halves")

    def _tables(self, positions: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The model's own cosines and sines at ``positions`` ``[...]``."""
        like = torch.zeros(1, device=positions.device)
        kind = (self._layer_types[layer_idx],) if self._takes_layer_type and self._layer_types else ()
        cos, sin = self._module(like, positions.reshape(1, -1), *kind)
        return cos.view(*positions.shape, -1).float(), sin.view(*positions.shape, -1).float()

    def _turn(self, vectors: Tensor, cos: Tensor, sin: Tensor, way: str | None = None) -> Tensor:
        rotated = 2 * cos.shape[-1]
        turning, rest = vectors[..., :rotated].float(), vectors[..., rotated:]
        if (way or self._way) == _NEIGHBOURS:
            first, second = turning[..., ::2], turning[..., 1::2]
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        else:
            first, second = turning.chunk(2, dim=-1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned.to(vectors.dtype), rest], dim=-1)

    def _find_way(self, apply: Any, layer_idx: int, head_dim: int | None, name: str) -> str:
        """The way of turning that gives what the model's own function gives on random vectors."""
        generator = torch.Generator().manual_seed(0)
        device = next(iter(self._module.buffers())).device
        positions = torch.tensor([[3, 11]], device=device)
        cos, sin = self._tables(positions, layer_idx)
        for way in (_HALVES, _NEIGHBOURS, _HALVES_ONCE):
            once_cos, once_sin = _once(cos, way), _once(sin, way)
            for dim in dict.fromkeys((head_dim or 0, 2 * once_cos.shape[-1])):
                if dim < 2 * once_cos.shape[-1] or apply is None:
                    continue
                vectors = torch.randn((1, 2, 2, dim), generator=generator).to(device)
                try:
                    expected, _ = apply(vectors, vectors, cos, sin)
                except (RuntimeError, TypeError, ValueError):
                    continue
                found = self._turn(vectors, once_cos.unsqueeze(1), once_sin.unsqueeze(1), way)
                if expected.shape == found.shape and torch.allclose(found, expected.float(), atol=1e-5):
                    return way
        raise ValueError(f"{name}: how this model applies its rotary embedding is not known")


def rotary_of(model: Any) -> Rotary | None:
    """The rotary embedding of a model; None for one that adds positions to its hidden states (GPT-2, OPT).

    Raises:
        ValueError: if the model has a rotary embedding whose working is not known here.
    """
    # An embedding under a name that is not known here must be refused, not taken for none.
    source = sys.modules[type(next(iter(attention_modules(model).values()))).__module__]
    knows_rotation = any("rotary" in name.lower() for name in vars(source))
    return Rotary(model) if knows_rotation or _rotary_modules(model) else None


def rope_of(model: Any, layer_idx: int) -> Rope | None:
    """By what a layer turns its keys; None where it does not, and where how it does so is not known here."""
    try:
        rotary = rotary_of(model)
    except ValueError:
        return None
    return None if rotary is None else rotary.rope(layer_idx)


def _rotary_modules(model: Any) -> list[nn.Module]:
    return [module for module in model.get_decoder().modules() if "RotaryEmbedding" in type(module).__name__]


def _once(table: Tensor, way: str) -> Tensor:
    """Every angle's entry once."""
    if way == _HALVES:
        return table[..., : table.shape[-1] // 2]
    return table[..., ::2] if way == _NEIGHBOURS else table


def _rope_type(config: Any) -> str:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return str(parameters.get("rope_type", "default")) if isinstance(parameters, dict) else "default"
