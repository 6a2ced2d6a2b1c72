"""What an observed attention call shows to who decides about its layer."""

from typing import Any

import torch

from pikv.hf.hooks import ObservedCall
from pikv.scoring.base import LayerView


def view_of(observed: ObservedCall, *, rank: int, num_layers: int, **further: Any) -> LayerView:
    """The view of a layer right after its attention, before anything is decided.

    ``further`` replaces entries of the view; without it the layer was given all tokens that it has seen.
    """
    call = observed.call
    real = call.real
    if real is None:
        real = torch.ones(observed.hidden_states.shape[:2], dtype=torch.bool, device=call.queries.device)
    seen = torch.tensor(call.rows.seen)
    entries = {
        "module": call.module,
        "arguments": observed.arguments,
        "layer_idx": call.layer_idx,
        "rank": rank,
        "num_layers": num_layers,
        "kept": call.rows.padded(),
        "queries": call.queries,
        "hidden_states": observed.hidden_states,
        "real": real,
        "rule": call.rule,
        "logsumexp": call.logsumexp,
        "seen": seen,
        "given": seen.unsqueeze(1).expand(-1, call.rows.num_kv_heads),
        "allotted": call.rows.lengths,
        "notes": call.notes,
    }
    return LayerView(**{**entries, **further})
