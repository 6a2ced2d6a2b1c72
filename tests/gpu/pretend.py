"""A device like CUDA where there is none: tensors that say they are elsewhere and compute on the CPU.

Two things go wrong on a GPU and never on a CPU: tensors of different devices meet, and the host waits for the device. While
``pretend_cuda()`` is active, ``x.to(DEVICE)`` gives a tensor that reports ``pretended:0``. Where it meets a CPU tensor and
CUDA would not allow that, a RuntimeError is raised; whatever makes the host wait (or the device wait for the host's memory) is
noted with the line that asked for it. What it cannot show: results and choices of CUDA's own kernels, and time.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.utils.backend_registration as registration
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

import pikv

DEVICE = "pretended:0"
_is_registered = False
SOURCE = Path(pikv.__file__).parent

# The size of their result, or their result itself, has to be known by the host.
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "_unique",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "bincount",
    "repeat_interleave",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_cholesky",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_VIEWS = {"view", "_unsafe_view", "expand", "slice", "select", "transpose", "permute", "t", "unsqueeze", "squeeze", "alias"}
_VIEWS |= {"detach", "as_strided", "split", "split_with_sizes", "unbind", "unfold", "narrow", "_reshape_alias", "lift_fresh"}


class PretendTensor(torch.Tensor):
    """Reports ``pretended:0``; ``on_host`` is on the CPU and holds the numbers."""

    @staticmethod
    def __new__(cls, real):
        return torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=DEVICE
        )

    def __init__(self, real):
        self.on_host = real

    def __repr__(self, *, tensor_contents=None):
        return f"PretendTensor({self.on_host})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a pretended tensor outside of pretend_cuda()")


@dataclass
class Counts:
    """What a device would have been asked for: ``waits`` by place and kind, and launches (views not counted)."""

    waits: Counter = field(default_factory=Counter)
    launches: Counter = field(default_factory=Counter)

    @property
    def ours(self):
        """Waits that PiKV's own lines ask for, as ``{"cache/rows.py:86 _to_copy": 1}``."""
        return {place: count for place, count in sorted(self.waits.items()) if not place.startswith("elsewhere")}

    @property
    def elsewhere(self):
        return sum(count for place, count in self.waits.items() if place.startswith("elsewhere"))

    @property
    def num_launches(self):
        return sum(self.launches.values())

    def clear(self):
        self.waits.clear()
        self.launches.clear()


def _asked_from():
    """The line of PiKV that asks torch for something; "elsewhere" where it is transformers or a test."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/transformers/" in path:
            break
        if path.startswith(str(SOURCE)):
            return f"{Path(path).relative_to(SOURCE)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class _Dispatch(TorchDispatchMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "pretended"
        to_host = target is not None and not to_device
        flat = tree_flatten((args, kwargs))[0]
        on_device = any(isinstance(value, PretendTensor) for value in flat)
        if not on_device and not to_device:
            return func(*args, **kwargs)
        from_host = [value for value in flat if isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor)]
        self._note(name, args, from_host, on_device, to_device, to_host)
        real_args, real_kwargs = tree_map(
            lambda value: value.on_host if isinstance(value, PretendTensor) else value, (args, kwargs)
        )
        if to_device:
            real_kwargs["device"] = torch.device("cpu")
        if name == "_to_copy" and to_host == on_device:
            real_kwargs.pop("device", None)
        if name == "histc":  # whole numbers: only on CUDA
            real_args = (real_args[0].float(), *real_args[1:])
        real = func(*real_args, **real_kwargs)
        if to_host or (name == "copy_" and not isinstance(args[0], PretendTensor)):
            return args[0] if name == "copy_" else real
        out = tree_map(lambda value: PretendTensor(value) if isinstance(value, torch.Tensor) else value, real)
        return return_and_correct_aliasing(func, args, kwargs, out) if on_device else out

    def _note(self, name, args, from_host, on_device, to_device, to_host):
        if name not in _VIEWS and not name.startswith(("empty", "new_empty")):
            self.counts.launches[name] += 1
        if name in ("_to_copy", "copy_"):
            if (to_host and on_device) or (to_device and from_host) or (name == "copy_" and from_host):
                self._wait(name)
            return
        if name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(not isinstance(index, PretendTensor) for index in indices):
                self._wait(f"{name} by a host tensor")
            elif any(index.dtype == torch.bool for index in indices) and (name == "index" or args[2].numel() > 1):
                self._wait(f"{name} by a mask")
            from_host = [value for value in from_host if not any(value is index for index in indices)]
        if name in _WAITING:
            self._wait(name)
        if any(tensor.dim() for tensor in from_host) and name != "lift_fresh":
            raise RuntimeError(f"{name}: tensors of two devices meet")

    def _wait(self, kind):
        self.counts.waits[f"{_asked_from()}: {kind}"] += 1


_BRACKETS = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


def _from_lists(index):
    """An index with tensors on the device in the place of lists: what brackets make of them, past the dispatcher."""
    if isinstance(index, tuple):
        return tuple(_from_lists(part) for part in index)
    return torch.tensor(index).to(DEVICE) if isinstance(index, list) else index


class _Functions(TorchFunctionMode):
    """Fused attention: one launch, whatever the CPU makes of it."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], PretendTensor):
            tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
            if not all(isinstance(tensor, PretendTensor) for tensor in tensors):
                raise RuntimeError("scaled_dot_product_attention: tensors of two devices meet")
            args, kwargs = tree_map(lambda value: value.on_host if isinstance(value, PretendTensor) else value, (args, kwargs))
            self.counts.launches["scaled_dot_product_attention"] += 1
            return PretendTensor(func(*args, **kwargs))
        if func is torch.tensor and kwargs.get("device") is not None:  # it goes past the dispatcher
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func in _BRACKETS and isinstance(args[0], PretendTensor):
            args = (args[0], _from_lists(args[1]), *args[2:])
        if func is torch.Tensor.tolist and isinstance(args[0], PretendTensor):
            return args[0].to("cpu").tolist()
        return func(*args, **kwargs)


@contextmanager
def pretend_cuda():
    """Yields the ``Counts`` of what happens inside; only for a process of its own, which knows the device from then on."""
    global _is_registered
    if not _is_registered:
        registration._setup_privateuseone_for_python_backend("pretended")
        _is_registered = True
    counts = Counts()
    with torch.no_grad(), _Dispatch(counts), _Functions(counts):
        yield counts


def move(model):
    """Moves a model's weights and buffers; ``model.to`` would leave them on the CPU under another name."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to(DEVICE), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(DEVICE)
    return model
