"""Tensors of a few numbers that the host knows, such as the rows of a block."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor


def index_tensor(numbers: Iterable[int], device: torch.device) -> Tensor:
    """``numbers`` as a tensor (int64) on ``device``; not to be written to.

    The latest are remembered: a copy to a GPU is something that every layer of every decoding step would wait for.
    """
    return _index_tensor(tuple(numbers), device)


@lru_cache(maxsize=256)
def _index_tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.long, device=device)
