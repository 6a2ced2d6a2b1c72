"""Caches as files, so that what was read today can be asked tomorrow.

A file is in the safetensors format. Its tensors are the live tokens, ``<layer>.<block>.<segment>.keys`` and so on; its metadata
are ``format``, ``version``, ``contents`` (JSON: the model it was made for, the state of each layer, and each tensor's data
type, shape and checksum) and ``checksum`` (of the contents). So whatever was damaged on the way is noticed.
"""

import json
import os
import stat
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pikv.cache.block_state import block_from_state, state_of_block
from pikv.cache.regroup import plain_tensors
from pikv.cache.row_state import ContiguousPositions
from pikv.cache.rows import RaggedRows
from pikv.hf.files import write_whole
from pikv.hf.identity import ModelSignature, check_same_model, model_signature
from pikv.registry import UnknownNameError
from pikv.version import __version__

FORMAT = "pikv-cache"
VERSION = 3  # 3: segments of formats with settings; those of version 2 are as before
_READABLE = ("1", "2", "3")
_NUM_TRIES = 20
_MALFORMED = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError)
"""What is raised where contents are not what their checksum says they were written as."""

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
        contents, tensors = _read_whole(os.fspath(path), model_signature(config))
        layers = [
            PackedLayer(saved["kind"], _below(f"{index}.", tensors), saved["state"])
            for index, saved in enumerate(contents["layers"])
        ]
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except _MALFORMED as error:
        raise ValueError(f"cannot read {path}: its contents are malformed ({error!r})") from error
    return layers


def _read_whole(path: str, signature: ModelSignature) -> tuple[State, Tensors]:
    """Reads one and the same file, though another process may replace it meanwhile."""
    for _ in range(_NUM_TRIES):
        before = _identity(path)
        try:
            with safe_open(path, framework="pt") as file:
                contents = _read_contents(file.metadata() or {})
                check_same_model(contents["model"], signature)
                tensors = _read_tensors(file, contents["tensors"])
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            # It is opened once for its description and once for its tensors.
            if _identity(path) == before:
                raise ValueError(str(error)) from error
        else:
            if _identity(path) == before:
                return _of_first_version(contents, tensors) if contents["version"] == "1" else (contents, tensors)
    raise ValueError("it is being replaced again and again")


def _identity(path: str) -> tuple[int, ...]:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("it is a folder")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _of_first_version(contents: State, tensors: Tensors) -> tuple[State, Tensors]:
    """What version 1 saved, as version 2 would have: every block was one dense segment."""
    renamed = {}
    for name, tensor in tensors.items():
        *front, last = name.split(".")
        renamed[".".join([*front, "0", last] if len(front) == 2 and last != "positions" else [*front, last])] = tensor
    for layer in contents["layers"]:
        for block in layer["state"].get("blocks", ()):
            block["row_ids"] = block.pop("rows")
            block["segments"] = [{"format": "dense", "capacity": block.pop("capacity")}]
    return contents, renamed


def _read_contents(metadata: dict[str, str]) -> State:
    if metadata.get("format") != FORMAT:
        raise ValueError("it is not a PiKV cache")
    if metadata.get("version") not in _READABLE:
        *older, newest = _READABLE
        said = f"{', '.join(older)} and {newest}"
        raise ValueError(f"its format version is {metadata.get('version')}, this release reads {said}")
    contents = metadata.get("contents", "")
    if metadata.get("checksum") != _checksum(contents.encode()):
        raise ValueError("it is damaged: the description of its contents does not match its checksum")
    return {**json.loads(contents), "version": metadata["version"]}


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
        ValueError: if the layer is of another kind, or what was packed cannot be a layer.
    """
    if packed.kind != _kind_of(layer):
        raise ValueError(f"a {packed.kind} layer was saved where this model has a {_kind_of(layer)} layer")
    _, unpack = _KINDS[packed.kind]
    try:
        with plain_tensors():
            unpack(layer, packed.tensors, packed.state, torch.device(device))
    except UnknownNameError:  # of a format; a KeyError too, and clear as it is
        raise
    except _MALFORMED as error:
        raise ValueError(f"the saved layer is malformed ({error!r})") from error


def _kind_of(layer: Any) -> str:
    return "sliding" if layer.is_sliding else "ragged"


def _pack_ragged(layer: Any) -> tuple[Tensors, State]:
    """A ``PiKVLayer``: its rows, block by block."""
    rows: RaggedRows = layer.rows
    tensors: Tensors = {}
    blocks = []
    for index, block in enumerate(rows.blocks):
        parts, state = state_of_block(block)
        tensors |= {f"{index}.{name}": tensor for name, tensor in parts.items()}
        blocks.append(state)
    turned = layer.state.get(ContiguousPositions)
    contiguous = None if turned is None else {"seen": turned.seen, "lengths": turned.lengths.tolist()}
    return tensors, {
        "contiguous": contiguous,
        "columns": layer.columns,
        "columns_at_padding": layer.columns_at_padding,
        "num_kv_heads": rows.num_kv_heads,
        "seen": list(rows.seen),
        "seen_at_eviction": list(rows.seen_at_eviction),
        "blocks": blocks,
    }


def _unpack_ragged(layer: Any, tensors: Tensors, state: State, device: torch.device) -> None:
    blocks = [block_from_state(_below(f"{index}.", tensors), saved, device) for index, saved in enumerate(state["blocks"])]
    rows = RaggedRows.of(state["num_kv_heads"], blocks, state["seen"], state["seen_at_eviction"])
    rows.check_integrity(with_values=False)
    columns, at_padding = state["columns"], state["columns_at_padding"]
    numbers = [columns, at_padding, *rows.seen, *rows.seen_at_eviction]
    if not all(type(number) is int for number in numbers) or len(rows.seen_at_eviction) != rows.batch_size:
        raise ValueError("the numbers of tokens are not whole numbers, or too few")
    if (
        any(not 0 <= at <= seen for at, seen in zip(rows.seen_at_eviction, rows.seen, strict=True))
        or not 0 <= at_padding <= columns
        or any(not 0 <= seen <= columns for seen in rows.seen)
    ):
        raise ValueError(f"{columns} columns, padding up to {at_padding}, and {rows.seen} tokens")
    layer.rows = rows
    layer.columns, layer.columns_at_padding = columns, at_padding
    if turned := state.get("contiguous"):
        lengths = torch.tensor(turned["lengths"], dtype=torch.long)
        if lengths.shape != rows.lengths.shape or len(turned["seen"]) != rows.batch_size:
            raise ValueError("what is said of rotated keys does not match the rows")
        layer.state[ContiguousPositions] = ContiguousPositions(turned["seen"], lengths)
    layer.is_initialized = True


def _pack_sliding(layer: Any) -> tuple[Tensors, State]:
    """A ``DynamicSlidingWindowLayer`` of transformers: its window, ``[B, G, length, D]``."""
    state = {"cumulative_length": layer.cumulative_length, "record_past": getattr(layer, "record_past", False)}
    return {"keys": layer.keys, "values": layer.values}, state


def _unpack_sliding(layer: Any, tensors: Tensors, state: State, device: torch.device) -> None:
    keys, values = (tensors[name].to(device, copy=True) for name in ("keys", "values"))
    length = keys.shape[2]
    if keys.shape[:3] != values.shape[:3] or not length <= state["cumulative_length"] or length > layer.sliding_window:
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} are no window")
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
