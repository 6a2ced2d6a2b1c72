"""What cached values add to the output of attention."""

import torch
from torch import Tensor, nn

from pikv.core import BlockView, LayerView

_NAMES = ("o_proj", "out_proj", "c_proj", "dense")


def output_norms(view: LayerView) -> Tensor:
    """L1 norms of the values behind each query head's part of the output projection, ``[B, G, H / G, L]`` (float32).

    Raises:
        ValueError: if the attention module has no output projection that is known here.
    """
    heads, group = view.kept.shape[1], view.group_size

    def norms(block: BlockView) -> Tensor:
        dim = block.values.shape[2]
        weight = _output_projection(view.module, heads * group * dim).unflatten(0, (heads, group, dim))
        found = torch.zeros((len(block.row_ids), block.length, group), device=block.values.device)
        size = max(1, block.tile_elements // (2 * weight.shape[-1]))
        for row, head in enumerate(block.heads):
            for member in range(group):
                projection = weight[head, member].float()
                for start in range(0, block.length, size):
                    values = block.values[row, start : start + size].float()
                    found[row, start : start + size, member] = (values @ projection).abs_().sum(-1)
        return found

    return view.by_block(norms).movedim(3, 2)


def _output_projection(module: nn.Module, num_inputs: int) -> Tensor:
    """The weights that the attended values are multiplied by, ``[num_inputs, hidden]``."""
    for name in _NAMES:
        layer = getattr(module, name, None)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        # GPT-2's Conv1D stores its weights the other way round.
        by_input = weight if type(layer).__name__ == "Conv1D" else weight.T
        if by_input.shape[0] == num_inputs and by_input.is_floating_point():
            return by_input.detach()
    raise ValueError(f"{type(module).__name__} has no output projection of {num_inputs} inputs ({', '.join(_NAMES)})")
