"""Reading a context a second time, to see which of its tokens that takes (KVzip, arXiv 2505.23416)."""

import inspect
from typing import Any

import torch
from torch import Tensor

from pikv.core import AttentionCall, Reread
from pikv.hf.hooks import ForwardInputs, observe

_BLOCK_ELEMENTS = 1 << 22  # attention weights that exist at a time


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


def check_room(model: Any, inputs: ForwardInputs, how: Reread) -> None:
    """Raises ValueError unless the model has positions for a second reading of the forward pass that is about to begin."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
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
    """The maximum, over queries and their heads, of the weights on all tokens, ``[B, G, L]``.

    Queries see the sinks, the tokens of the chunk that they repeat, and each other.
    """
    rows = call.rows.kept()
    is_token = torch.ones(call.hidden_states.shape[:2], dtype=torch.bool, device=rows.device)
    if call.is_token is not None:
        is_token = call.is_token
    seen = torch.tensor(call.rows.seen, device=rows.device).unsqueeze(1)
    query_positions = (seen - is_token.sum(1, keepdim=True) + is_token.cumsum(1) - 1).masked_fill(~is_token, -1)
    place = rows.positions
    chunk_positions = chunk_positions.to(place.device)
    first = chunk_positions.masked_fill(chunk_positions < 0, torch.iinfo(torch.int64).max).amin(1).view(-1, 1, 1)
    last = chunk_positions.amax(1).view(-1, 1, 1)
    begin = (seen - is_token.sum(1, keepdim=True)).unsqueeze(2)
    in_view = (place >= 0) & ((place < sink_size) | ((place >= first) & (place <= last)) | (place >= begin))
    most = torch.zeros(place.shape, device=place.device)
    size = max(1, _BLOCK_ELEMENTS // (call.queries.shape[0] * call.queries.shape[1] * place.shape[2]))
    for start in range(0, is_token.shape[1], size):
        block = query_positions[:, start : start + size]
        visible = in_view[:, :, None, :] & (place[:, :, None, :] <= block[:, None, :, None])
        weights = call.params.weights(call.queries[:, :, start : start + size], rows.keys, visible)
        most = torch.maximum(most, weights.amax((2, 3)))
    return most
