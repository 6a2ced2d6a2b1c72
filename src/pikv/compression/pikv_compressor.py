"""Several compressors in a chain, of which the tokens that matter most are kept out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from pikv.checks import check_count, check_ratio, check_share
from pikv.compression.base import BaseCompressor, Code, CodingCompressor
from pikv.compression.chunkkv import ChunkKVCompressor
from pikv.compression.distillation import DistillationCompressor
from pikv.compression.dropping import DroppingCompressor, checked_scorer, importance_of
from pikv.compression.fastv import FastVCompressor
from pikv.compression.lora import LoRACompressor, LoRAPlusPlusCompressor
from pikv.compression.pruning import PruningCompressor
from pikv.compression.pyramid import PyramidCompressor
from pikv.compression.pyramidkv import PyramidKVCompressor
from pikv.compression.quantized import QuantizedCompressor
from pikv.compression.stats import Tally
from pikv.compression.svd import SVDCompressor
from pikv.compression.tokens import (
    POSITION_BYTES,
    Compressed,
    Tokens,
    all_of,
    lost_and_given,
    relative_error,
    split_heads,
    take,
)
from pikv.presses.base import BasePress
from pikv.presses.composed import ComposedPress
from pikv.registry import Registry
from pikv.scoring.base import Scorer

METHODS: Registry[type[BaseCompressor]] = Registry("compression method")
"""What can be chained, by name; further classes derived from ``DroppingCompressor`` or ``CodingCompressor`` can be added."""
for _kind in (
    LoRACompressor,
    LoRAPlusPlusCompressor,
    PyramidCompressor,
    PyramidKVCompressor,
    FastVCompressor,
    SVDCompressor,
    QuantizedCompressor,
    PruningCompressor,
    DistillationCompressor,
    ChunkKVCompressor,
):
    METHODS[_kind.method] = _kind


@dataclass(frozen=True, kw_only=True, eq=False)
class _Attempt:
    """A chain that was tried: its methods, what came of it, what it shares with other calls, what each method did."""

    methods: tuple[str, ...]
    found: Compressed
    shared_bytes: int
    done: list[tuple[str, Tokens, Compressed]]


class PiKVCompressor(BaseCompressor):
    """Chains compressors, keeps important tokens out of them, and chooses by what they were measured to lose.

    Methods that drop tokens go first, in the order given; then those that code what is left, whole numbers last. All heads keep
    the same tokens. Tokens whose importance, scaled to [0, 1] within each sequence (its least is 0, its most is 1), is above
    ``importance_threshold`` are protected: they are never dropped, and are stored as they are. (Of a batch each sequence stores
    as many of its most important tokens so as the one with most.)

    With ``adaptive_selection`` every call, so every layer, tries each method alone, each two, and all together, and takes what
    loses least of those that save ``compression_ratio`` of the bytes, or stay within ``max_bytes``: by the relative error of
    keys and values, weighted by importance. Where none does (protected tokens alone may be too many) it takes the one of fewest
    bytes. Without it the whole chain is taken.

    Attributes:
        last_methods: the methods of the last call, in the order in which they acted
        last_protected: tokens of each sequence that were stored as they are

    Args:
        hidden_size: channels of keys over all KV heads
        compression_methods: names of ``METHODS``
        importance_threshold: between 0 and 1; at 1 no token is protected
        adaptive_selection: whether a chain is chosen for every call
        compression_ratio: the share of bytes that is to be saved where chains are chosen
        max_bytes: bytes that a call may store, in the place of a ratio
        options: arguments of methods by name, ``{"lora": {"rank": 32}}``
        scorer: says how important tokens are where a call does not; by default small keys are

    Raises:
        ValueError: for methods that there are not, or none; one given twice; and for settings that make no sense.
    """

    method = "pikv"

    def __init__(
        self,
        hidden_size: int,
        compression_methods: Sequence[str] = ("lora", "pyramid", "fastv"),
        importance_threshold: float = 0.5,
        adaptive_selection: bool = True,
        *,
        compression_ratio: float = 0.5,
        max_bytes: int | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__(hidden_size)
        self.compression_methods = _checked_names(compression_methods, options or {})
        self.importance_threshold = check_share(importance_threshold, "importance_threshold")
        self.adaptive_selection = bool(adaptive_selection)
        self.compression_ratio = check_ratio(compression_ratio)
        self.max_bytes = None if max_bytes is None else check_count(max_bytes, "max_bytes")
        self.scorer = checked_scorer(scorer)
        self.compressors = nn.ModuleDict(
            {name: METHODS[name](hidden_size, **(options or {}).get(name, {})) for name in self.compression_methods}
        )
        self.last_methods: tuple[str, ...] = ()
        self.last_protected = 0
        self.reset_stats()

    @property
    def shared_bytes(self) -> int:
        return self._shared(self._used)

    def compress(self, tokens: Tokens) -> Compressed:
        heads = tokens.keys.shape[1]
        whole = tokens.joined()
        weights = _scaled(importance_of(tokens, self.scorer).mean(1, keepdim=True))
        protected = weights > self.importance_threshold
        attempts = [self._attempt(methods, whole, weights, protected) for methods in self._chains()]
        chosen = attempts[0] if len(attempts) == 1 else self._best(attempts, whole, weights)
        self.last_methods, self.last_protected = chosen.methods, int(protected.sum(2).max())
        self._used |= set(chosen.methods)
        for method, given, found in chosen.done:
            self._method_tallies[method].add(given, found)
        found = chosen.found
        return Compressed(
            keys=split_heads(found.keys, heads),
            values=split_heads(found.values, heads),
            kept=found.kept.expand(-1, heads, -1),
            nbytes=found.nbytes,
        )

    def _chains(self) -> list[tuple[str, ...]]:
        """The chains to try."""
        names = self.compression_methods
        if not self.adaptive_selection:
            return [names]
        few = [chain for size in (1, 2) for chain in combinations(names, size)]
        return list(dict.fromkeys([*few, names]))

    def _best(self, attempts: Sequence[_Attempt], tokens: Tokens, weights: Tensor) -> _Attempt:
        """The attempt that loses least of those within the budget; where none is, the one of fewest bytes."""
        most = tokens.nbytes * (1 - self.compression_ratio) if self.max_bytes is None else self.max_bytes
        sizes = [attempt.found.nbytes + attempt.shared_bytes for attempt in attempts]
        if min(sizes) > most:
            return attempts[sizes.index(min(sizes))]
        weights = torch.where(weights.any(2, keepdim=True), weights, 1.0)  # where all tokens are alike, all count
        fitting = [attempt for attempt, size in zip(attempts, sizes, strict=True) if size <= most]
        with torch.no_grad():
            return min(fitting, key=lambda attempt: relative_error(*lost_and_given(tokens, attempt.found, weights)))

    def _attempt(self, methods: tuple[str, ...], tokens: Tokens, weights: Tensor, protected: Tensor) -> _Attempt:
        """Takes tokens ``[B, 1, T, hidden]`` through a chain."""
        done: list[tuple[str, Tokens, Compressed]] = []
        left, kept = tokens, all_of(tokens.keys)
        droppers = [name for name in methods if isinstance(self.compressors[name], DroppingCompressor)]
        for name in droppers:
            dropper = self.compressors[name]
            assert isinstance(dropper, DroppingCompressor)
            found = dropper.drop(left, protected)
            done.append((name, left, found))
            left, kept, protected = left.take(found.kept), kept.gather(2, found.kept), protected.gather(2, found.kept)
        position_bytes = POSITION_BYTES * kept.numel() if left.num_tokens < tokens.num_tokens else 0
        coders = [name for name in methods if name not in droppers]
        coders.sort(key=lambda name: self._coder(name).is_last)
        found = self._code(coders, left, weights.gather(2, kept), protected, done)
        whole = Compressed(keys=found.keys, values=found.values, kept=kept, nbytes=found.nbytes + position_bytes)
        acted = tuple(name for name, _, _ in done)  # all tokens may be protected, so that nothing is left to code
        return _Attempt(methods=acted, found=whole, shared_bytes=self._shared(acted), done=done)

    def _code(
        self,
        coders: Sequence[str],
        tokens: Tokens,
        weights: Tensor,
        protected: Tensor,
        done: list[tuple[str, Tokens, Compressed]],
    ) -> Compressed:
        """Codes all tokens but as many of the most important ones as are protected."""
        num_dense = int(protected.sum(2).max()) if coders else tokens.num_tokens
        if num_dense >= tokens.num_tokens:
            return Compressed(keys=tokens.keys, values=tokens.values, kept=all_of(tokens.keys), nbytes=tokens.nbytes)
        ranked = weights.masked_fill(protected, 2.0).argsort(dim=2, descending=True, stable=True)
        dense, coded = ranked[..., :num_dense].sort().values, ranked[..., num_dense:].sort().values
        apart = tokens.take(dense)
        code, decoders, factor_bytes = Code.dense(tokens.take(coded)), [], 0
        for name in coders:
            given = Tokens(keys=code.keys, values=code.values)
            code = self._coder(name).encode(given)
            factor_bytes += code.factor_bytes
            decoders.append(code.decode)
            keys, values = code.decode(code.keys, code.values)
            num_bytes = code.code_bytes + code.factor_bytes
            done.append((name, given, Compressed(keys=keys, values=values, kept=all_of(keys), nbytes=num_bytes)))
        keys, values = code.keys, code.values
        for decode in reversed(decoders):
            keys, values = decode(keys, values)
        order = torch.cat([dense, coded], 2).argsort(dim=2)
        return Compressed(
            keys=take(torch.cat([apart.keys, keys], 2), order),
            values=take(torch.cat([apart.values, values], 2), order),
            kept=all_of(tokens.keys),
            nbytes=apart.nbytes + code.code_bytes + factor_bytes + self._mark_bytes(num_dense, tokens),
        )

    def _mark_bytes(self, num_dense: int, tokens: Tokens) -> int:
        """Bytes that say which tokens were stored as they are."""
        return POSITION_BYTES * num_dense * len(tokens.keys)

    def _coder(self, name: str) -> CodingCompressor:
        coder = self.compressors[name]
        assert isinstance(coder, CodingCompressor)
        return coder

    def _shared(self, names: Sequence[str] | set[str]) -> int:
        """Bytes that calls of these methods share."""
        found = 0
        for name in names:
            compressor = self.compressors[name]
            assert isinstance(compressor, BaseCompressor)
            found += compressor.shared_bytes
        return found

    def _method_stats(self, whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {name: tally.summary(self._shared([name])) for name, tally in self._method_tallies.items()}

    def reset_stats(self) -> None:
        super().reset_stats()
        self._used: set[str] = set()
        self._method_tallies = {name: Tally() for name in getattr(self, "compression_methods", ())}

    def to_press(self, model: Any) -> BasePress:
        """The presses of the methods, one after the other: all of them, or those of the last call's choice.

        They protect no tokens, and a press keeps to its methods in all layers.

        Raises:
            ValueError: for methods of which several code what is left: a cache stores a token in one format.
        """
        methods = self.last_methods or self._attempt_order()
        coders = [name for name in methods if isinstance(self.compressors[name], CodingCompressor)]
        if len(coders) > 1:
            raise ValueError(f"a cache stores a token in one format, and {', '.join(coders)} are several")
        presses = []
        for name in methods:
            compressor = self.compressors[name]
            assert isinstance(compressor, BaseCompressor)
            presses.append(compressor.to_press(model))
        return presses[0] if len(presses) == 1 else ComposedPress(presses)

    def _attempt_order(self) -> tuple[str, ...]:
        """All methods in the order in which they act."""
        return tuple(sorted(self.compression_methods, key=lambda name: isinstance(self.compressors[name], CodingCompressor)))


def _checked_names(methods: Sequence[str], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Methods that there are, each once."""
    if isinstance(methods, str) or not methods:
        raise ValueError(f"compression_methods must be a list of at least one name, not {methods!r}")
    for name in [*methods, *options]:
        if not isinstance(name, str) or name not in METHODS:
            raise METHODS.unknown(str(name))
    if twice := [name for name in methods if list(methods).count(name) > 1]:
        raise ValueError(f"compression method {twice[0]!r} is given twice")
    if beyond := [name for name in options if name not in methods]:
        raise ValueError(f"options of {beyond[0]!r}, which is not among the methods: {', '.join(methods)}")
    return tuple(methods)


def _scaled(importance: Tensor) -> Tensor:
    """Importance ``[B, 1, T]`` within [0, 1]: 0 for the least of each sequence, 1 for the most; all 0 where all are equal."""
    least, most = importance.aminmax(dim=2, keepdim=True)
    return torch.where(most > least, (importance - least) / (most - least), 0.0)
