"""Scores in kvpress's way, taken on ragged rows (https://github.com/NVIDIA/kvpress)."""

from typing import Any

import torch
from torch import Tensor, nn

from pikv.core import LayerView
from pikv.presses.kvpress.sequence import SequenceView, reads_attention, rotary_module, setting, temporarily_set
from pikv.scoring.base import Scorer


class KvpressScorer(Scorer):
    """Scores with ``score(module, hidden_states, keys, values, attentions, kwargs)`` of ``press``, one sequence at a time.

    Each sequence is shown as if it were alone: its own keys and values, and of the hidden states, position embeddings and
    positions the columns that are not padding. Presses that read attention weights get those of the newest forward pass,
    computed anew; so do all presses on a model with eager attention, where kvpress has them at hand. ``name`` is what errors
    call the press; the ratio of one that ``is_peer`` is set to what it has to reach, for the time of the call.
    """

    def __init__(self, press: Any, name: str, is_peer: bool, rotary: nn.Module | None = None) -> None:
        self.press = press
        self.name = name
        self.is_peer = is_peer
        self.rotary = rotary

    @property
    def is_own(self) -> bool:
        return not self.is_peer

    def described(self) -> str:
        return repr(self.press)

    def bind(self, model: Any) -> "KvpressScorer":
        self.press.post_init_from_model(model)
        return KvpressScorer(self.press, self.name, self.is_peer, rotary_module(model))

    def score(self, view: LayerView) -> Tensor:
        scores = torch.zeros(view.kept.positions.shape, device=view.kept.device)
        for b in view.kept.lengths.amax(1).nonzero().flatten().tolist():
            found = self._score_sequence(view, b)[0].float()
            scores[b, :, : found.shape[1]] = found
        return scores

    def _score_sequence(self, view: LayerView, b: int) -> Tensor:
        """Scores ``[1, G, L]`` of one sequence's tokens."""
        sequence = SequenceView.of(view, b, self.name)
        removed = max(0.0, 1 - (float(view.budget[b].double().mean()) + 1e-3) / sequence.length)
        with setting, temporarily_set(self.press, "compression_ratio", removed if self.is_peer else None):
            scores: Any = sequence.ask(
                self.press.score, self.name, "score", rotary=self.rotary, needs_attention=reads_attention(self.press)
            )
        expected = sequence.keys.shape[:3]
        if not isinstance(scores, Tensor) or scores.shape != expected:
            found = f"scores of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            shapes = f"{found} for keys of shape {tuple(sequence.keys.shape)}"
            raise ValueError(f"{sequence.cannot(self.name, 'score')} ({shapes})")
        return scores
