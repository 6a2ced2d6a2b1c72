"""Top-k with ties broken in turn, so that equal preferences spread evenly."""

import torch
from torch import Tensor


def balanced_topk(preferences: Tensor, k: int, turn: Tensor | None = None) -> Tensor:
    """The ``k`` largest of ``[B, T, E]`` for each token, largest first, ``[B, T, k]``.

    Of equals, token ``t`` takes those first that come at or after ``turn[t]`` (default ``t``, both modulo ``E``), so that
    tokens without a preference spread evenly.
    """
    _, num_tokens, num_options = preferences.shape
    if turn is None:
        turn = torch.arange(num_tokens, device=preferences.device)
    rotated = (turn.unsqueeze(1) + torch.arange(num_options, device=preferences.device)) % num_options
    rotated = rotated.expand(preferences.shape)
    best = preferences.gather(2, rotated).argsort(dim=2, descending=True, stable=True)[..., :k]
    return rotated.gather(2, best)
