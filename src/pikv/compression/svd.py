"""Low rank: every call's own directions; on a cache, the press ``svd``."""

from typing import Any

from torch import Tensor

from pikv.cache.formats.coded import as_type
from pikv.calibration.lowrank import principal_directions
from pikv.compression.base import Code, CodingCompressor, default_rank, numbers_bytes
from pikv.compression.tokens import Tokens, join_heads, split_heads
from pikv.hf.shape import head_dim
from pikv.presses.base import BasePress
from pikv.presses.spec import get_press


class SVDCompressor(CodingCompressor):
    """Stores keys and values of each sequence as factors of rank ``rank``, with all heads' channels side by side.

    These are the best of that rank: the truncated singular value decomposition. Factors by token ``[T, rank]`` and the basis
    ``[rank, hidden]`` are stored in the type of the tokens; where they would take no fewer bytes than the tokens, these are
    stored as they are. ``rank`` is a quarter of ``hidden_size`` if nothing is said.

    Raises:
        ValueError: for a rank that is not between 1 and ``hidden_size``.
    """

    method = "svd"

    def __init__(self, hidden_size: int, rank: int | None = None) -> None:
        super().__init__(hidden_size)
        self.rank = default_rank(rank, hidden_size)

    def encode(self, tokens: Tokens) -> Code:
        length, heads = tokens.num_tokens, tokens.keys.shape[1]
        if self.rank * (length + self.hidden_size) >= length * self.hidden_size:
            return Code.dense(tokens)
        (key_codes, key_basis), (value_codes, value_basis) = (self._split(each) for each in (tokens.keys, tokens.values))

        def decode(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return _product(keys, key_basis, heads), _product(values, value_basis, heads)

        return Code(
            keys=key_codes,
            values=value_codes,
            code_bytes=numbers_bytes(key_codes, value_codes),
            factor_bytes=numbers_bytes(key_basis, value_basis),
            decode=decode,
        )

    def _split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Factors ``[B, 1, T, rank]`` and the basis ``[B, 1, rank, hidden]``, which gradients take for a constant."""
        joined = join_heads(vectors).float()
        basis = principal_directions(joined.detach(), self.rank).to(vectors.dtype)
        return as_type(joined @ basis.float().mT, vectors.dtype), basis

    def to_press(self, model: Any) -> BasePress:
        return get_press("svd", rank=max(1, round(self.rank / self.hidden_size * head_dim(model.config))))


def _product(codes: Tensor, basis: Tensor, num_heads: int) -> Tensor:
    return split_heads(as_type(codes.float() @ basis.float(), codes.dtype), num_heads)
