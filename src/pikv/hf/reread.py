"""Reading a context a second time, to see which of its tokens that takes (KVzip, arXiv 2505.23416)."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pikv.attention.capture import CaptureLogSumExp
from pikv.core import AttentionCall, BlockView, LayerView, Reread, plain_arithmetic
from pikv.hf.hooks import ForwardInputs, observe
from pikv.hf.shape import num_positions

_TILE = 1 << 18  # products that exist at a time, few enough to stay in the processor's cache


@torch.no_grad()
def read_again(model: Any, inputs: ForwardInputs, how: Reread) -> dict[int, Tensor]:
    """Lets ``model`` read the tokens of its last forward pass once more, behind the cache that already holds them.

    The tokens of that pass must all be in the cache, which is left as it was.

    Returns:
        by layer, the most attention that any query of the second reading paid each token, ``[B, G, L]``; NaN for tokens of
        earlier passes
    """
    assert inputs.input_ids is not None
    cache, device = inputs.cache, inputs.input_ids.device
    columns = cache.get_seq_length()
    mask = inputs.attention_mask
    if mask is None:
        mask = torch.ones((inputs.batch_size, columns), dtype=torch.long, device=device)
    is_new = mask[:, -inputs.num_new :].bool()
    # Without the padding between: chunks begin at the same tokens in a batch as alone.
    order = is_new.int().argsort(dim=1, descending=True, stable=True)
    is_new = is_new.gather(1, order)
    token_ids = inputs.input_ids.gather(1, order)
    positions = (mask.cumsum(1)[:, -inputs.num_new :] - 1).gather(1, order).masked_fill(~is_new, -1)
    seen = mask.sum(1, keepdim=True)
    prompt = torch.tensor(how.prompt_ids, dtype=torch.long, device=device).expand(inputs.batch_size, -1)
    places = {layer: cache.rows(layer).kept().positions for layer in cache.ragged_layers}
    attention = {layer: torch.zeros(place.shape, device=place.device) for layer, place in places.items()}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    before = cache.mark()
    for start in range(0, int(is_new.sum(1).max()), how.chunk_size):
        chunk = slice(start, start + how.chunk_size)
        is_token = torch.cat([torch.ones_like(prompt, dtype=torch.bool), is_new[:, chunk]], dim=1)

        def after_attention(call: AttentionCall, chunk_positions: Tensor = positions[:, chunk]) -> None:
            layer = call.layer_idx
            with plain_arithmetic(call.queries.device):
                most = _most_attention(call, chunk_positions, how.sink_size)[..., : attention[layer].shape[2]]
            attention[layer] = torch.maximum(attention[layer], most)

        position_ids = {"position_ids": (seen + is_token.cumsum(1) - 1).clamp(min=0)} if takes_positions else {}
        try:
            with observe(model, after_attention=after_attention):
                model(
                    torch.cat([prompt, token_ids[:, chunk]], dim=1),
                    attention_mask=torch.cat([mask, is_token.to(mask.dtype)], dim=1),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                    **position_ids,
                )
        finally:
            cache.rewind(before)
    first_new = (seen - is_new.sum(1, keepdim=True)).unsqueeze(2)
    return {layer: _of_these(most, places[layer], first_new.to(most.device)) for layer, most in attention.items()}


def check_num_positions(model: Any, inputs: ForwardInputs, how: Reread) -> None:
    """Raises ValueError unless the model has positions for a second reading of the forward pass that is about to begin."""
    limit = num_positions(model.config)
    seen = inputs.cache.get_seq_length() + inputs.num_new
    needed = seen + len(how.prompt_ids) + min(how.chunk_size, inputs.num_new)
    if limit is not None and needed > limit:
        raise ValueError(
            f"reading {inputs.num_new} tokens again behind {seen} takes {needed} positions, and the model has {limit}; "
            "a smaller chunk_size takes fewer"
        )


def _of_these(most: Tensor, places: Tensor, first_new: Tensor) -> Tensor:
    """The attention on tokens from ``first_new`` on; NaN on others, which were not read again, and behind a row's end."""
    return most.masked_fill(places < first_new, float("nan"))


def _most_attention(call: AttentionCall, chunk_positions: Tensor, sink_size: int) -> Tensor:
    """The maximum, over queries and their heads, of the weights on the tokens of the context, ``[B, G, L]``.

    Queries see the sinks, the tokens of the chunk that they repeat, and each other: keys of other tokens are not looked at.
    ``chunk_positions`` are the true positions of the chunk, ``[B, T]``; -1 for none.
    """
    seen = torch.tensor(call.rows.seen)
    view = LayerView.of(call, rank=0, num_layers=1)
    chunk_positions = chunk_positions.to(view.kept.device)
    first = chunk_positions.masked_fill(chunk_positions < 0, torch.iinfo(torch.int64).max).amin(1)
    last = chunk_positions.amax(1)
    begin = seen.to(first.device) - view.is_token.sum(1)

    def most(block: BlockView) -> Tensor:
        place, own = block.positions, block.of_sequences(begin).unsqueeze(1)
        in_chunk = (place >= block.of_sequences(first).unsqueeze(1)) & (place <= block.of_sequences(last).unsqueeze(1))
        in_view = (place < sink_size) | in_chunk | (place >= own)
        # Rows see equally many tokens unless they are of different sequences; what is too much is hidden.
        numbers = in_view.int().argsort(dim=1, descending=True, stable=True)[:, : int(in_view.sum(1).max())]
        keys, places, visible = block.keys, place.gather(1, numbers), in_view.gather(1, numbers)
        found = torch.zeros(numbers.shape, device=keys.device)
        for row in range(len(numbers)):
            found[row] = _most_of_row(block, row, keys[row, numbers[row]], places[row], visible[row])
        found.masked_fill_(places >= own, 0.0)
        return torch.zeros(place.shape, device=keys.device).scatter_(1, numbers, found)

    return view.by_block(most)


def _most_of_row(block: BlockView, row: int, keys: Tensor, places: Tensor, visible: Tensor) -> Tensor:
    """The most attention that any query pays the tokens of one row, ``[L]``."""
    if not len(keys):  # of a sequence that was all padding so far
        return torch.zeros(0, device=keys.device)
    is_token, num_own = block.is_token[row], int(block.is_token[row].sum())
    if block.params.is_plain and num_own and bool(visible.all()):
        most = _most_by_logsumexp(block.queries[row][:, is_token], keys, num_own, block.params.scaling)
        if most is not None:
            return most
    rows = slice(row, row + 1)
    sinks = block.params.sinks
    params = replace(block.params, sinks=None if sinks is None else sinks[rows])
    queries, positions = block.queries[rows], block.query_positions[rows]
    most = torch.zeros(len(keys), device=keys.device)
    size = max(1, block.tile_elements // (queries.shape[1] * len(keys)))
    for start in range(0, queries.shape[2], size):
        seen = visible & (places <= positions[:, start : start + size].unsqueeze(2))
        weights = params.weights_of_rows(queries[:, :, start : start + size], keys.unsqueeze(0), seen)
        most = torch.maximum(most, weights.amax((0, 1, 2)))
    return most


def _most_by_logsumexp(queries: Tensor, keys: Tensor, num_own: int, scaling: float) -> Tensor | None:
    """The same for plain parameters and queries ``[h, T, D]`` without padding, whose own keys are the last ``num_own``.

    A fused kernel says what the weights are divided by, so that one product finds the largest; None where no such kernel is.
    The queries' own keys get zeros.
    """
    num_others = len(keys) - num_own
    queries, keys = queries.float(), keys.float()
    logs = []
    for part, is_causal in ((keys[:num_others], False), (keys[num_others:], True)):
        if not len(part):
            continue
        spread = part.expand(1, len(queries), -1, -1)
        with CaptureLogSumExp() as capture:
            scaled_dot_product_attention(queries.unsqueeze(0), spread, spread, is_causal=is_causal, scale=scaling)
        if capture.logsumexp is None or capture.logsumexp.device != queries.device:
            return None
        logs.append(capture.logsumexp[0])
    total = logs[0] if len(logs) == 1 else logs[0].logaddexp(logs[1])
    extended = torch.cat([queries * scaling, -total.unsqueeze(2)], dim=2).flatten(0, 1)
    others = torch.cat([keys[:num_others], keys.new_ones((num_others, 1))], dim=1)
    most = torch.zeros(len(keys), device=keys.device)
    if num_others:
        size = max(1, _TILE // num_others)
        highest = [(extended[start : start + size] @ others.mT).amax(0) for start in range(0, len(extended), size)]
        most[:num_others] = torch.stack(highest).amax(0).exp()
    return most
