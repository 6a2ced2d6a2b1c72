"""The log-sum-exp that torch's fused attention kernels compute anyway, and usually throw away."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
}


class CaptureLogSumExp(TorchDispatchMode):
    """While active, keeps the log-sum-exp of the last fused attention: ``[B, H, T]``, or None if there was none."""

    def __init__(self) -> None:
        super().__init__()
        self.logsumexp: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            # In inference mode the call arrives before it has chosen its kernel.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in _FUSED and result[1] is not None and result[1].shape == args[0].shape[:3]:
            self.logsumexp = result[1]
        return result
