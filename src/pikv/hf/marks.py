"""Taking tokens back: the newest ones, or all since a mark."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from pikv.hf.contents import LayerContents
from pikv.hf.layers import num_beyond


@dataclass(frozen=True, eq=False)
class CacheMark:
    """Where a cache stood.

    Attributes:
        cache_id: which cache, with which sequences
        num_rewinds: how often tokens had been taken back
        columns: seen, padding included
        is_padded_in_front: whether all padding came before the tokens
        layers: what each layer needs
    """

    cache_id: object
    num_rewinds: int
    columns: int
    is_padded_in_front: bool
    layers: list[Any]


class RewindableCache(LayerContents):
    """A cache that can go back, and knows which marks it can go back to."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._id = object()
        self._num_rewinds = 0
        self._rewinds: list[tuple[int, int]] = []  # their numbers, and the columns that each left; both ascend

    def crop(self, max_length: int) -> None:
        """Takes back the newest tokens: all beyond ``max_length`` if positive, else that many.

        Raises:
            ValueError: if tokens were evicted or slid out of a window since they came, or padding came with them; then
                nothing is changed.
        """
        if not isinstance(max_length, Integral) or isinstance(max_length, bool):
            raise ValueError(f"crop takes a number of tokens, not {max_length!r}")
        max_length = int(max_length)
        self.forward_pass.undo()
        num_tokens = num_beyond(max_length, self.get_seq_length())
        for layer in self.layers:
            if reason := layer.can_crop(num_tokens):
                raise ValueError(f"cannot crop {num_tokens} tokens: {reason}")
        for layer in self.layers:
            layer.crop(-num_tokens)
        self._note_rewind()

    def mark(self) -> CacheMark:
        """Where the cache stands now, to ``rewind`` to; holds on to what the sliding layers hold."""
        self.forward_pass.undo()
        return CacheMark(
            self._id,
            self._num_rewinds,
            self.get_seq_length(),
            self.forward_pass.is_padded_in_front,
            [layer.mark() for layer in self.layers],
        )

    def rewind(self, mark: CacheMark) -> None:
        """Takes back everything since ``mark``, padding and what slid out of windows included.

        Raises:
            ValueError: if tokens were evicted since then, or tokens from before were taken back; then nothing is changed.
        """
        self.forward_pass.undo()
        is_outdated = any(number >= mark.num_rewinds and columns < mark.columns for number, columns in self._rewinds)
        if mark.cache_id is not self._id or is_outdated:
            raise ValueError("this mark is of another cache, or tokens from before it were taken back")
        for layer, before in zip(self.layers, mark.layers, strict=True):
            if reason := layer.can_rewind(before):
                raise ValueError(f"cannot go back to {mark.columns} tokens: {reason}")
        for layer, before in zip(self.layers, mark.layers, strict=True):
            layer.rewind(before)
        self.forward_pass.is_padded_in_front = mark.is_padded_in_front
        self._note_rewind()

    def drop_since(self, mark: CacheMark) -> None:
        """Drops what came since ``mark``, though tokens from before may have been evicted meanwhile: these stay evicted."""
        for layer, before in zip(self.layers, mark.layers, strict=True):
            layer.take_back(before)
        self.forward_pass.forget()
        self.forward_pass.is_padded_in_front = mark.is_padded_in_front
        self._note_rewind()

    def remember_rows(self, layer_idx: int, mark: CacheMark | None = None) -> None:
        """Has a layer's tokens of earlier passes kept as they are, for the pass under way or for ``drop_since(mark)``.

        A press asks for it before it rewrites them: dropping the newest tokens does not undo that.
        """
        layer = self.layers[layer_idx]
        if mark is None:
            self.forward_pass.remember_rows(layer)
        else:
            mark.layers[layer_idx] = layer.with_rows(mark.layers[layer_idx])

    def _forget_marks(self) -> None:
        """The sequences that marks are about are no longer here."""
        self._id = object()

    def _note_rewind(self) -> None:
        """Notes, for marks, how far the cache went back."""
        columns = self.get_seq_length()
        while self._rewinds and self._rewinds[-1][1] >= columns:
            self._rewinds.pop()
        self._rewinds.append((self._num_rewinds, columns))
        self._num_rewinds += 1
