"""Which of the tokens that a function was given did it return? Found by their bits."""

import torch
from torch import Tensor


def numbers_of_returned(keys: Tensor, values: Tensor, left: Tensor, left_values: Tensor) -> Tensor:
    """The numbers, within each row, of the tokens that are left, in the order in which they are.

    ``keys`` and ``values`` are ``[n, L, D]`` and ``[n, L, Dv]``, what is left ``[n, K, D]`` and ``[n, K, Dv]``. Among tokens
    that are alike in every bit of key and value the first one returned is taken for the first one given: what would be stored
    is the same.

    Returns:
        ``[n, K]`` (int64)

    Raises:
        ValueError: if something was returned that was not given, or more often than it was given.
    """
    if left.shape[:2] != left_values.shape[:2] or left.shape[::2] != keys.shape[::2] or left_values.shape[2] != values.shape[2]:
        shapes = [list(each.shape) for each in (left, left_values, keys, values)]
        raise ValueError(f"it returned keys {shapes[0]} and values {shapes[1]} for keys {shapes[2]} and values {shapes[3]}")
    found = [_numbers_in_row(*row) for row in zip(keys, values, left, left_values, strict=True)]
    return torch.stack(found) if found else torch.zeros(left.shape[:2], dtype=torch.long, device=keys.device)


def _numbers_in_row(keys: Tensor, values: Tensor, left: Tensor, left_values: Tensor) -> Tensor:
    """The same for one row, ``[L, D]`` and ``[K, D]``."""
    if keys.dtype != left.dtype or values.dtype != left_values.dtype:
        raise ValueError(f"it returned keys of {left.dtype} and values of {left_values.dtype}, but was given {keys.dtype}")
    given, given_order = _marks(keys, values).sort(stable=True)
    returned, order = _marks(left, left_values).sort(stable=True)
    slots = torch.arange(len(returned), device=returned.device)
    occurrence = slots - torch.searchsorted(returned, returned)
    places = torch.searchsorted(given, returned) + occurrence
    inside = places < len(given)
    places = places.clamp(max=max(0, len(given) - 1))
    if not bool((inside & (given[places] == returned)).all()) if len(given) else len(returned) > 0:
        raise ValueError("it returned tokens that it was not given, or that it changed, or one token twice")
    numbers = torch.empty_like(order)
    numbers[order] = given_order[places]
    # Marks may agree by chance; bits then do not.
    if not (_same_bits(keys[numbers], left) and _same_bits(values[numbers], left_values)):
        raise ValueError("it returned tokens that it was not given, or that it changed")
    return numbers


def _marks(keys: Tensor, values: Tensor) -> Tensor:
    """A number for every token of ``[L, D]``, the same for the same bits: exact sums, which no order of adding changes."""
    bits = torch.cat([keys, values], dim=1).double().contiguous().view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (bits.shape[1],), generator=generator).to(bits.device) * 2 + 1
    return ((bits ^ (bits >> 29)) * factors).sum(1)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
