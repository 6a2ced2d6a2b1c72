"""Compressors of the guide: modules that map keys and values to those that a smaller storage gives back.

``docs/compression.md`` says which press or format each of them is on a model's cache.
"""

from pikv.compression.chunkkv import ChunkKVCompressor
from pikv.compression.distillation import DistillationCompressor
from pikv.compression.fastv import FastVCompressor
from pikv.compression.lora import LoRACompressor, LoRAPlusPlusCompressor
from pikv.compression.pikv_compressor import PiKVCompressor
from pikv.compression.pruning import PruningCompressor
from pikv.compression.pyramid import PyramidCompressor
from pikv.compression.pyramidkv import PyramidKVCompressor
from pikv.compression.quantized import QuantizedCompressor
from pikv.compression.svd import SVDCompressor

__all__ = [
    "ChunkKVCompressor",
    "DistillationCompressor",
    "FastVCompressor",
    "LoRACompressor",
    "LoRAPlusPlusCompressor",
    "PiKVCompressor",
    "PruningCompressor",
    "PyramidCompressor",
    "PyramidKVCompressor",
    "QuantizedCompressor",
    "SVDCompressor",
]
