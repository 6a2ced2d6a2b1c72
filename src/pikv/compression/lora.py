"""LoRA: keys and values behind a projection to few channels that is trained beforehand; on a cache, the press ``lora``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import dropout

from pikv.calibration.lowrank import LowRankMap, check_positive, lost_share, train
from pikv.compression.base import Code, CodingCompressor, default_rank, numbers_bytes
from pikv.compression.tokens import Tokens, join_heads, split_heads
from pikv.hf.shape import head_dim
from pikv.presses.base import BasePress
from pikv.presses.spec import get_press

_START_VECTORS = 512  # that the first directions are taken from


class LoRACompressor(CodingCompressor):
    """Stores keys and values as ``rank`` numbers each, through a matrix down and one up (LoRA's form, arXiv 2106.09685).

    The matrices are parameters, which all calls share; all heads' channels go through them side by side. ``fit`` trains them.
    Without it they are the principal directions of the first tokens that are compressed (as in PiSSA, arXiv 2404.02948). At
    full rank both are the identity from the start, and nothing is lost. ``rank`` is a quarter of ``hidden_size`` if nothing
    is said. ``dropout`` leaves out codes at random in training mode, and while ``fit`` trains.

    Raises:
        ValueError: for a rank not between 1 and ``hidden_size``, an ``alpha`` not above 0, a ``dropout`` outside of [0, 1).
    """

    method = "lora"
    learning_rate_ratio: float = 1.0
    """The learning rate of the matrix up is that of the matrix down, times this."""
    press_name: ClassVar[str] = "lora"
    _has_started: Tensor
    _is_fitted: Tensor

    def __init__(self, hidden_size: int, rank: int | None = None, alpha: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(hidden_size)
        self.rank = default_rank(rank, hidden_size)
        self.alpha = check_positive(alpha, "alpha")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, not {dropout!r}")
        self.dropout = float(dropout)
        self.key_map = LowRankMap(hidden_size, self.rank, self.alpha)
        self.value_map = LowRankMap(hidden_size, self.rank, self.alpha)
        self.register_buffer("_has_started", torch.tensor(self.rank == hidden_size))
        self.register_buffer("_is_fitted", torch.tensor(False))

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` trained the matrices."""
        return bool(self._is_fitted)

    @property
    def shared_bytes(self) -> int:
        return self.key_map.up_bytes + self.value_map.up_bytes

    def encode(self, tokens: Tokens) -> Code:
        keys, values, heads = join_heads(tokens.keys), join_heads(tokens.values), tokens.keys.shape[1]
        self._start(keys.flatten(0, 2), values.flatten(0, 2))
        key_codes, value_codes = (
            dropout(to_few.codes(each), self.dropout, self.training)
            for to_few, each in ((self.key_map, keys), (self.value_map, values))
        )

        def decode(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return split_heads(self.key_map.restore(keys), heads), split_heads(self.value_map.restore(values), heads)

        return Code(keys=key_codes, values=value_codes, code_bytes=numbers_bytes(key_codes, value_codes), decode=decode)

    @torch.inference_mode(False)
    def fit(
        self,
        keys: Tensor,
        values: Tensor,
        importance: Tensor | None = None,
        *,
        steps: int = 200,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> dict[str, float]:
        """Trains the matrices by gradient descent (Adam) on the error of reconstruction, of keys and of values alike.

        It goes on from what the matrices are, and ends with the best that it saw.

        Args:
            keys: samples, ``[B, T, hidden]`` or ``[B, G, T, D]``
            values: of the same shape
            importance: what each token counts, not negative, ``[B, T]`` or ``[B, G, T]``; None for all alike
            steps: of the optimizer, each on all samples
            learning_rate: at the first step; it falls to zero in a straight line
            seed: of the dropout

        Returns:
            ``error_before`` and ``error_after`` on the samples, without dropout: the share of the sum of squares that is lost

        Raises:
            ValueError: for samples that could not be compressed, none at all, and negative importance.
        """
        tokens = self._samples(keys, values, importance)
        weights = None
        if tokens.importance is not None:
            if bool((tokens.importance < 0).any()):
                raise ValueError("fit needs importance that is not negative")
            weights = tokens.importance.mean(1).flatten()

        def loss(codes_dropout: float) -> Tensor:
            parts = [
                lost_share(vectors, self._through(to_few, vectors, codes_dropout), weights)
                for to_few, vectors in self._pairs(tokens)
            ]
            return torch.stack(parts).mean()

        return self._train(loss, steps, learning_rate, seed)

    def _samples(self, keys: Tensor, values: Tensor, importance: Tensor | None) -> Tokens:
        """Samples that were checked; the matrices have begun."""
        # Tensors of inference mode cannot be learned from; their copies can.
        tokens = Tokens.of(keys.clone(), values.clone(), importance, self.hidden_size, type(self).__name__)
        if keys.numel() == 0:
            raise ValueError("there is nothing to learn from: no token was given")
        self._start(*(vectors for _, vectors in self._pairs(tokens)))
        return tokens

    def _pairs(self, tokens: Tokens) -> list[tuple[LowRankMap, Tensor]]:
        """Each map with its vectors, ``[B * T, hidden]``, in the type that it computes in."""
        pairs = ((self.key_map, tokens.keys), (self.value_map, tokens.values))
        return [(to_few, join_heads(each).flatten(0, 2).detach().to(to_few.down)) for to_few, each in pairs]

    def _through(self, to_few: LowRankMap, vectors: Tensor, codes_dropout: float) -> Tensor:
        return to_few.restore(dropout(to_few.codes(vectors), codes_dropout, codes_dropout > 0))

    @torch.no_grad()
    def _start(self, keys: Tensor, values: Tensor) -> None:
        """Takes the first directions from these vectors ``[n, hidden]``, unless that was done."""
        if bool(self._has_started):
            return
        for to_few, vectors in ((self.key_map, keys), (self.value_map, values)):
            to_few.start(vectors.detach()[:: -(-len(vectors) // _START_VECTORS)])
        self._has_started.fill_(True)

    def _train(self, loss: Callable[[float], Tensor], steps: int, learning_rate: float, seed: int) -> dict[str, float]:
        """Lowers ``loss``, a function of the dropout of codes."""
        found = train(
            [self.key_map, self.value_map],
            loss,
            steps=steps,
            learning_rate=learning_rate,
            learning_rate_ratio=self.learning_rate_ratio,
            dropout=self.dropout,
            seed=seed,
        )
        self._is_fitted.fill_(True)
        return found

    def to_press(self, model: Any) -> BasePress:
        """The press that stores each KV head's tokens so, with as large a share of its channels as ``rank`` is here."""
        return get_press(self.press_name, rank=max(1, round(self.rank / self.hidden_size * head_dim(model.config))))


class LoRAPlusPlusCompressor(LoRACompressor):
    """As ``LoRACompressor``, but the matrix up learns faster than the one down, by a factor (LoRA+, arXiv 2402.12354).

    Raises:
        ValueError: for a factor not above 0; further as ``LoRACompressor``.
    """

    method = "lora_plus"
    press_name = "loraplus"

    def __init__(
        self,
        hidden_size: int,
        rank: int | None = None,
        alpha: float = 1.0,
        dropout: float = 0.0,
        *,
        learning_rate_ratio: float = 16.0,
    ) -> None:
        super().__init__(hidden_size, rank, alpha, dropout)
        self.learning_rate_ratio = check_positive(learning_rate_ratio, "learning_rate_ratio")
