"""What calibration learned about a model, as one file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pikv.calibration.heads import head_shape
from pikv.hf.files import write_whole
from pikv.hf.identity import ModelSignature, check_same_model, fingerprint, is_same_fingerprint, model_signature
from pikv.hf.shape import hidden_size
from pikv.hf.support import ragged_layers
from pikv.routing.experts import DEFAULT_NUM_EXPERTS
from pikv.routing.factory import create_moe_router
from pikv.routing.mixer import ExpertMixer

FILE_NAME = "pikv_calibration.safetensors"
"""Under this name a calibration for the default experts is found beside the model it was made for."""
FILE_PATTERN = "pikv_calibration*.safetensors"
"""The names of all calibrations beside a model."""
FORMAT = "pikv-calibration-3"

_READABLE = (FORMAT, "pikv-calibration-2")  # the second has no parameters that are left out
_MIXER = "mixer."
_ZEROS = "zeros"
_LARGEST = 1 << 28  # numbers of one parameter
_OLD_FORMAT = "pikv-calibration-1"
_OLD_MIXER = "panel."
_OLD_ENTRIES = {"settings": ("lessons", "samples"), "report": ("taken_from_kept", "kept_share")}
_OLD_NAMES = {"trust": "weight", "level": "bias"}


def file_name(num_experts: int) -> str:
    """The name of a calibration for the first ``num_experts`` experts, so that several lie beside one model."""
    return FILE_NAME if num_experts == DEFAULT_NUM_EXPERTS else f"pikv_calibration_{num_experts}_experts.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Routers of every layer, what each head makes of their experts' scores, budgets by head, and heads that retrieve.

    Attributes:
        facts: the model that it was made for
        fingerprint: of the model's weights
        experts: names of the retention experts
        mixers: the state of an ``ExpertMixer``, by kind of router, then by layer (its rank among those that hold ragged rows)
        profiles: how much later queries read of each head's tokens, ``[num_layers, G, P]``; see ``ProfileBudget``
        head_scores: how much each head retrieves, ``[num_layers, G]``; see ``DuoAttentionPress``
        options: further options of the routers, by kind, as JSON has them
        settings: how they were trained, as JSON has it
        report: what was measured on samples for validation, as JSON has it
    """

    facts: ModelSignature
    fingerprint: Tensor
    experts: tuple[str, ...]
    mixers: Mapping[str, Sequence[Mapping[str, Tensor]]]
    profiles: Tensor
    head_scores: Tensor
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def check(self, model: Any) -> None:
        """Raises ValueError, with the reason, if this was learned on another model."""
        check_same_model(self.facts, model_signature(model.config))
        if not is_same_fingerprint(self.fingerprint, fingerprint(model)):
            raise ValueError("made for a model of the same kind, but with other weights")

    def lacks(self, kind: str, experts: Sequence[str]) -> str | None:
        """Why it has no routers of a kind for these experts, or None if it has."""
        if kind not in self.mixers:
            return f"it has routers of the kinds {', '.join(self.mixers)}"
        if tuple(experts) != self.experts:
            return f"it was made for the experts {', '.join(self.experts)}"
        return None

    def build(self, model: Any, kind: str, top_k: int, **options: Any) -> dict[int, ExpertMixer]:
        """The trained routers of ``kind``, with their mixers, by layer index, in evaluation mode on the model's device.

        Raises:
            ValueError: if they are damaged, or options are out of range.
        """
        mixers = {}
        for layer, state in zip(ragged_layers(model.config), self.mixers[kind], strict=True):
            router = create_moe_router(kind, hidden_size(model.config), len(self.experts), top_k, **options)
            mixer = ExpertMixer(router, self.profiles.shape[1])
            try:
                mixer.load_state_dict(dict(state))
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise ValueError(f"the calibration's routers of the kind {kind} are damaged: {reason}") from error
            mixers[layer] = mixer.eval().to(model.device)
        return mixers

    def save(self, path: str | Path) -> None:
        """Writes one ``.safetensors`` file, whole or not at all.

        Raises:
            ValueError: if it cannot be written.
        """
        mixers = {
            f"{_MIXER}{kind}.{rank}.{name}": tensor
            for kind, states in self.mixers.items()
            for rank, state in enumerate(states)
            for name, tensor in state.items()
        }
        # Gates of modalities that no text has are never trained: of zeros, the shape is enough.
        zeros = {name: list(tensor.shape) for name, tensor in mixers.items() if not bool(tensor.any())}
        tensors = {"profiles": self.profiles, "head_scores": self.head_scores, "fingerprint": self.fingerprint}
        tensors |= {name: tensor for name, tensor in mixers.items() if name not in zeros}
        about = {
            _ZEROS: zeros,
            "facts": self.facts,
            "experts": self.experts,
            "options": self.options,
            "settings": self.settings,
            "report": self.report,
        }
        metadata = {name: json.dumps(value) for name, value in about.items()}
        metadata |= {"format": FORMAT, "model_type": str(self.facts.get("model_type"))}
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        try:
            write_whole(Path(path), tensors, metadata)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> "Calibration":
        """Reads a file, and checks that it was made for ``model``, if one is given.

        Raises:
            ValueError: if the file cannot be read, is no calibration, or was made for another model.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read a calibration from {path}: {error}") from error
        if metadata.get("format") == _OLD_FORMAT:
            tensors = {_new_name(name): tensor for name, tensor in tensors.items()}
            for name, (old, new) in _OLD_ENTRIES.items():
                metadata[name] = metadata.get(name, "").replace(f'"{old}":', f'"{new}":')
        elif metadata.get("format") not in _READABLE:
            raise ValueError(f"{path} is no calibration of this release: its format is {metadata.get('format')}")
        try:
            calibration = _unpack(metadata, {**tensors, **_zeros(metadata)})
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if model is not None:
            try:
                calibration.check(model)
                if tuple(calibration.head_scores.shape) != head_shape(model.config):
                    raise ValueError(f"made for {tuple(calibration.head_scores.shape)} heads")
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return calibration


def _new_name(name: str) -> str:
    """What a tensor of the old format is called now."""
    if not name.startswith(_OLD_MIXER):
        return name
    *places, parameter = name.removeprefix(_OLD_MIXER).split(".")
    # The parameters of a mixer lie at its top; what is below belongs to its router.
    parameter = _OLD_NAMES.get(parameter, parameter) if len(places) == 2 else parameter
    return _MIXER + ".".join([*places, parameter])


def _zeros(metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The parameters of routers that are left out of a file, as they are zero."""
    shapes = json.loads(metadata.get(_ZEROS, "{}"))
    if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
        raise ValueError("it does not say what is zero")
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _is_shape(shape: Any) -> bool:
    """Whether it can be the shape of a parameter; a file that was tampered with may ask for any amount of memory."""
    is_list = isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
    return is_list and math.prod(shape) <= _LARGEST


def _unpack(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Calibration:
    mixers: dict[str, list[dict[str, Tensor]]] = {}
    num_layers, heads = tensors["head_scores"].shape
    if tensors["profiles"].dim() != 3 or tensors["profiles"].shape[:2] != (num_layers, heads):
        raise ValueError(f"profiles {list(tensors['profiles'].shape)} for {num_layers} layers of {heads} heads")
    if not isinstance(json.loads(metadata["facts"]), dict):
        raise ValueError("it does not say what model it was made for")
    for name, tensor in tensors.items():
        if name.startswith(_MIXER):
            kind, rank, parameter = name.removeprefix(_MIXER).split(".", 2)
            mixers.setdefault(kind, [{} for _ in range(num_layers)])[int(rank)][parameter] = tensor
    return Calibration(
        facts=json.loads(metadata["facts"]),
        fingerprint=tensors["fingerprint"],
        experts=tuple(json.loads(metadata["experts"])),
        mixers=mixers,
        profiles=tensors["profiles"],
        head_scores=tensors["head_scores"],
        options=json.loads(metadata["options"]),
        settings=json.loads(metadata["settings"]),
        report=json.loads(metadata["report"]),
    )
