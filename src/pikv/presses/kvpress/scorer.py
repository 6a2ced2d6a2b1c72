"""Scores of a kvpress press, taken on ragged rows (https://github.com/NVIDIA/kvpress)."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from pikv.core import LayerView
from pikv.scoring.base import Scorer

_UNSUITABLE = (AssertionError, AttributeError, KeyError, NotImplementedError)
"""What kvpress's scorers raise for models and moments that they were not written for."""

_lending = RLock()  # presses and modules that several threads share are changed while one scores


class KvpressScorer(Scorer):
    """Scores with the ``score`` of a kvpress ``ScorerPress``, one sequence at a time.

    Each sequence is shown as if it were alone: its own keys and values, and of the hidden states, position embeddings and
    positions the columns that are not padding. Presses that read attention weights get those of the newest forward pass,
    computed anew; so do all presses on a model with eager attention, where kvpress has them at hand.
    """

    def __init__(self, press: Any, rotary: nn.Module | None = None) -> None:
        self.press = press
        self.rotary = rotary

    def bind(self, model: Any) -> "KvpressScorer":
        self.press.post_init_from_model(model)
        return KvpressScorer(self.press, getattr(model.get_decoder(), "rotary_emb", None))

    def score(self, view: LayerView) -> Tensor:
        scores = torch.zeros(view.kept.positions.shape, device=view.kept.device)
        for b in view.kept.lengths.amax(1).nonzero().flatten().tolist():
            found = self._score_sequence(view, b)[0].float()
            scores[b, :, : found.shape[1]] = found
        return scores

    def _score_sequence(self, view: LayerView, b: int) -> Tensor:
        """Scores ``[1, G, L]`` of one sequence's tokens."""
        kept, name = view.kept, type(self.press).__name__
        length = int(kept.lengths[b, 0])
        if bool((kept.lengths[b] != length).any()):
            raise ValueError(f"kvpress's {name} needs KV heads of equal length, and tokens were evicted head by head before")
        keys, values = _tokens_of_sequence(view, b)
        arguments = _arguments_of_sequence(view, b)
        attentions = self._attentions(view, b, keys)
        removed = max(0.0, 1 - (float(view.budget[b].double().mean()) + 1e-3) / length)
        with _lending, _lent(self.press, "compression_ratio", removed), _lent(view.module, "rotary_emb", self.rotary):
            try:
                scores: Tensor = self.press.score(view.module, arguments["hidden_states"], keys, values, attentions, arguments)
            except _UNSUITABLE as error:
                raise ValueError(f"{self._cannot(view, b, length)} ({type(error).__name__}: {error})") from error
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or _is_first_reading(view, b, length):
                    raise
                raise ValueError(f"{self._cannot(view, b, length)} ({error})") from error
        if scores.shape != keys.shape[:3]:
            shapes = f"scores of shape {tuple(scores.shape)} for keys of shape {tuple(keys.shape)}"
            raise ValueError(f"{self._cannot(view, b, length)} ({shapes})")
        return scores

    def _attentions(self, view: LayerView, b: int, keys: Tensor) -> Tensor | None:
        """The attention weights ``[1, H, T, L]`` of a sequence's newest queries, where the press asks for them."""
        implementation = str(getattr(getattr(view.module, "config", None), "_attn_implementation", ""))
        if not (implementation.endswith("eager") or _reads_attention(self.press)):
            return None
        heads, length = keys.shape[1:3]
        is_token = view.is_token[b]
        positions = view.kept.positions[b, :, None, :length]
        visible = positions <= view.query_positions[b, is_token].to(positions.device).view(1, -1, 1)
        params = view.params.for_rows(range(b * heads, (b + 1) * heads), heads)
        weights = params.weights_of_rows(view.queries[b][:, is_token].unflatten(0, (heads, -1)), keys[0], visible)
        return weights.flatten(0, 1).unsqueeze(0).to(keys.dtype)

    def _cannot(self, view: LayerView, b: int, length: int) -> str:
        name, module = type(self.press).__name__, type(view.module).__name__
        if _is_first_reading(view, b, length):
            return f"kvpress's {name} cannot score {length} tokens in {module}"
        num_new = int(view.is_token[b].sum())
        return (
            f"kvpress's {name} cannot score a cache of {length} tokens after reading {num_new}: it was made for one prefill of "
            "the whole context, before anything is evicted"
        )


def _tokens_of_sequence(view: LayerView, b: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[1, G, L, D]`` of a sequence whose rows are equally long; copies, since some presses write to them."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for block in view.kept.blocks:
        own = [(member, row) for member, row in enumerate(block.row_ids) if row // view.kept.shape[1] == b]
        if own:
            keys, values = block.load()
            found |= {row: (keys[member], values[member]) for member, row in own}
    rows = [found[row] for row in sorted(found)]
    keys, values = (torch.stack([row[which] for row in rows]).unsqueeze(0) for which in (0, 1))
    return keys, values


def _is_first_reading(view: LayerView, b: int, length: int) -> bool:
    """Whether the newest forward pass brought all tokens that there are."""
    return int(view.is_token[b].sum()) == int(view.seen[b]) == length


def _reads_attention(press: Any) -> bool:
    """Whether a press, or the one it wraps, works on attention weights only."""
    if any(kind.__name__ == "ObservedAttentionPress" for kind in type(press).__mro__):
        return True
    inner = getattr(press, "press", None)
    return inner is not None and _reads_attention(inner)


def _arguments_of_sequence(view: LayerView, b: int) -> dict[str, Any]:
    """The arguments of the attention module as they would be if the sequence were alone and without padding."""
    is_token = view.is_token[b]
    arguments = {name: value for name, value in view.arguments.items() if name != "past_key_values"}
    positions = view.query_positions[b, is_token]
    arguments["hidden_states"] = view.hidden_states[b : b + 1][:, is_token]
    arguments["attention_mask"] = None
    arguments["cache_position"] = positions
    arguments["position_ids"] = positions.unsqueeze(0)
    embeddings = arguments.get("position_embeddings")
    if embeddings is not None:  # of all sequences, or one for all
        arguments["position_embeddings"] = tuple(each[min(b, len(each) - 1)][is_token].unsqueeze(0) for each in embeddings)
    return arguments


@contextmanager
def _lent(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute for the time of a block; None leaves it as it is."""
    if value is None:
        yield
        return
    missing = object()
    before = getattr(owner, name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
