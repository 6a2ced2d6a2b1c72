"""Every compressor at a size that tests can afford, and tokens for them."""

import torch

from pikv.compression import (
    ChunkKVCompressor,
    DistillationCompressor,
    FastVCompressor,
    LoRACompressor,
    LoRAPlusPlusCompressor,
    PiKVCompressor,
    PruningCompressor,
    PyramidCompressor,
    PyramidKVCompressor,
    QuantizedCompressor,
    SVDCompressor,
)

DROPPING = {
    "pruning": lambda hidden: PruningCompressor(hidden, 0.4),
    "pyramid": lambda hidden: PyramidCompressor(hidden, 0.5, num_levels=3, decay_factor=0.5),
    "pyramidkv": lambda hidden: PyramidKVCompressor(hidden, 0.5, layer_idx=1, num_layers=3, window_size=3),
    "fastv": lambda hidden: FastVCompressor(hidden, 0.75),
    "chunkkv": lambda hidden: ChunkKVCompressor(hidden, 0.5, chunk_length=4),
}
CODING = {
    "lora": lambda hidden: LoRACompressor(hidden, max(1, hidden // 3)),
    "lora_plus": lambda hidden: LoRAPlusPlusCompressor(hidden, max(1, hidden // 3), alpha=2.0),
    "svd": lambda hidden: SVDCompressor(hidden, max(1, hidden // 3)),
    "quantized": lambda hidden: QuantizedCompressor(hidden, bits=4, group_size=8),
    "distillation": lambda hidden: DistillationCompressor(hidden, max(1, hidden // 3)),
}
CHAINS = {
    "pikv": lambda hidden: PiKVCompressor(hidden),
    "pikv-whole-chain": lambda hidden: PiKVCompressor(
        hidden, ["quantized", "pruning", "svd"], adaptive_selection=False, importance_threshold=0.9
    ),
}
EVERY = {**DROPPING, **CODING, **CHAINS}


def random_tokens(*shape, seed=0, dtype=torch.float32, rank=None):
    """Keys and values; of a ``rank``, if one is given, but for a little noise."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    if rank is None:
        return random(*shape).to(dtype), random(*shape).to(dtype)
    dim = shape[-1]
    return tuple((random(*shape[:-1], rank) @ random(rank, dim) + 0.1 * random(*shape)).to(dtype) for _ in range(2))


def picked(tensor, kept):
    """The tokens ``kept`` ``[B, G, n]`` of ``[B, T, hidden]`` or ``[B, G, T, D]``, one by one."""
    if tensor.dim() == 3:
        return torch.stack([sequence[row[0]] for sequence, row in zip(tensor, kept, strict=True)])
    rows = [[tensor[b, g, kept[b, g]] for g in range(tensor.shape[1])] for b in range(tensor.shape[0])]
    return torch.stack([torch.stack(heads) for heads in rows])
