"""Caches as files, so that what was read today can be asked tomorrow.

A file is in the safetensors format. Its tensors are the live tokens, ``<layer>.<block>.keys`` and so on; its metadata are
``format``, ``version``, ``contents`` (JSON: the model it was made for, the state of each layer, and each tensor's data type,
shape and checksum) and ``checksum`` (of the contents). So whatever was damaged on the way is noticed.
"""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pikv import __version__
from pikv.cache.block import RowBlock
from pikv.cache.rows import RaggedRows, plain_tensors
from pikv.hf.files import write_whole
from pikv.hf.identity import check_same_model, model_signature

FORMAT = "pikv-cache"
VERSION = 1

Tensors = dict[str, Tensor]
State = dict[str, Any]
"""What JSON can hold."""


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """One layer as it lies in a file: its kind, its live tokens, and whatever else it needs to go on."""

    kind: str
    tensors: Tensors
    state: State


def write_layers(path: str | os.PathLike[str], layers: Sequence[Any], config: Any) -> None:
    """Writes the layers of a cache, made for the model with this ``config``, to one file: whole or not at all.

    Raises:
        ValueError: if there is nothing to be written, a forward pass was interrupted, or the file cannot be written.
    """
    seen = {layer.get_seq_length() for layer in layers}
    if seen == {0}:
        raise ValueError("cannot save an empty cache")
    if len(seen) > 1:
        raise ValueError(
            "cannot save a cache whose layers have seen different numbers of tokens: a forward pass was interrupted"
        )
    packed = [pack_layer(layer) for layer in layers]
    tensors = {
        f"{index}.{name}": tensor.detach().cpu().contiguous()
        for index, layer in enumerate(packed)
        for name, tensor in layer.tensors.items()
    }
    contents = json.dumps(
        {
            "pikv": __version__,
            "model": model_signature(config),
            "layers": [{"kind": layer.kind, "state": layer.state} for layer in packed],
            "tensors": {name: _describe(tensor) for name, tensor in tensors.items()},
        }
    )
    metadata = {"format": FORMAT, "version": str(VERSION), "contents": contents, "checksum": _checksum(contents.encode())}
    try:
        write_whole(Path(path), tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {error}") from error


def read_layers(path: str | os.PathLike[str], config: Any) -> list[PackedLayer]:
    """Reads and checks the layers of a cache that was made for the model with this ``config``.

    Their tensors are mapped to the file: ``unpack_layer`` copies them.

    Raises:
        ValueError: if the file cannot be read, is damaged or no cache of this format, or was made for another model.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            contents = _read_contents(file.metadata() or {})
            check_same_model(contents["model"], model_signature(config))
            tensors = _read_tensors(file, contents["tensors"])
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return [
        PackedLayer(saved["kind"], _below(f"{index}.", tensors), saved["state"])
        for index, saved in enumerate(contents["layers"])
    ]


def _read_contents(metadata: dict[str, str]) -> State:
    if metadata.get("format") != FORMAT:
        raise ValueError("it is not a PiKV cache")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"its format version is {metadata.get('version')}, PiKV {__version__} reads version {VERSION}")
    contents = metadata.get("contents", "")
    if metadata.get("checksum") != _checksum(contents.encode()):
        raise ValueError("it is damaged: the description of its contents does not match its checksum")
    state: State = json.loads(contents)
    return state


def _read_tensors(file: Any, described: dict[str, State]) -> Tensors:
    missing = described.keys() - set(file.keys())
    if missing:
        raise ValueError(f"it is damaged: tensor {min(missing)} is missing")
    tensors = {name: file.get_tensor(name) for name in described}
    for name, tensor in tensors.items():
        if _describe(tensor) != described[name]:
            raise ValueError(f"it is damaged: tensor {name} does not match its description and checksum")
    return tensors


def _describe(tensor: Tensor) -> State:
    data = tensor.flatten().view(torch.uint8).numpy()
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "checksum": _checksum(data)}


def _checksum(data: Any) -> str:
    # CRC-32 notices accidents, which is what it is for, at several times the speed of a cryptographic hash.
    return f"{zlib.crc32(data):08x}"


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def pack_layer(layer: Any) -> PackedLayer:
    """Takes a layer apart; its tensors are views of what it holds."""
    kind = _kind_of(layer)
    pack, _ = _KINDS[kind]
    return PackedLayer(kind, *pack(layer))


def unpack_layer(layer: Any, packed: PackedLayer, device: str | torch.device) -> None:
    """Puts copies of what was packed on ``device`` and into ``layer``, which is new.

    Raises:
        ValueError: if the layer is of another kind.
    """
    if packed.kind != _kind_of(layer):
        raise ValueError(f"a {packed.kind} layer was saved where this model has a {_kind_of(layer)} layer")
    _, unpack = _KINDS[packed.kind]
    with plain_tensors():
        unpack(layer, packed.tensors, packed.state, torch.device(device))


def _kind_of(layer: Any) -> str:
    return "sliding" if layer.is_sliding else "ragged"


def _pack_ragged(layer: Any) -> tuple[Tensors, State]:
    """A ``PiKVLayer``: its rows, block by block."""
    rows: RaggedRows = layer.rows
    tensors: Tensors = {}
    for index, block in enumerate(rows.blocks):
        tensors[f"{index}.keys"] = block.keys[:, : block.length]
        tensors[f"{index}.values"] = block.values[:, : block.length]
        if block.positions is not None:
            tensors[f"{index}.positions"] = block.positions[:, : block.length]
    return tensors, {
        "columns": layer.columns,
        "columns_at_padding": layer.columns_at_padding,
        "batch_size": rows.batch_size,
        "num_kv_heads": rows.num_kv_heads,
        "seen": list(rows.seen),
        "seen_at_eviction": list(rows.seen_at_eviction),
        "blocks": [{"rows": block.row_ids, "capacity": block.capacity} for block in rows.blocks],
    }


def _unpack_ragged(layer: Any, tensors: Tensors, state: State, device: torch.device) -> None:
    blocks = [_unpack_block(_below(f"{index}.", tensors), saved, device) for index, saved in enumerate(state["blocks"])]
    rows = RaggedRows(state["batch_size"], state["num_kv_heads"], blocks[0].keys, blocks[0].values)
    rows.blocks = blocks
    rows.seen = state["seen"]
    rows.seen_at_eviction = state["seen_at_eviction"]
    layer.rows = rows
    layer.columns = state["columns"]
    layer.columns_at_padding = state["columns_at_padding"]
    layer.is_initialized = True


def _unpack_block(tensors: Tensors, state: State, device: torch.device) -> RowBlock:
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    keys, values, positions = tensors["keys"], tensors["values"], tensors.get("positions")
    block = RowBlock(state["rows"], keys, values, positions, length=keys.shape[1])
    block.reserve(state["capacity"])  # the same as before, so that it grows, and is computed with, as before
    return block


def _pack_sliding(layer: Any) -> tuple[Tensors, State]:
    """A ``DynamicSlidingWindowLayer`` of transformers: its window, ``[B, G, length, D]``."""
    state = {"cumulative_length": layer.cumulative_length, "record_past": getattr(layer, "record_past", False)}
    return {"keys": layer.keys, "values": layer.values}, state


def _unpack_sliding(layer: Any, tensors: Tensors, state: State, device: torch.device) -> None:
    keys, values = (tensors[name].to(device, copy=True) for name in ("keys", "values"))
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    layer.cumulative_length = state["cumulative_length"]
    if state["record_past"]:
        layer.activate_past_recording()


_Pack = Callable[[Any], tuple[Tensors, State]]
_Unpack = Callable[[Any, Tensors, State, torch.device], None]
_KINDS: dict[str, tuple[_Pack, _Unpack]] = {
    "ragged": (_pack_ragged, _unpack_ragged),
    "sliding": (_pack_sliding, _unpack_sliding),
}
