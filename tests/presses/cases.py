"""The one matrix of presses that tests go through."""

import pytest

from calibrated import RandomHeadBudgets, RandomlyCalibrated
from pikv.presses import (
    AdaKVPress,
    CAKEPress,
    ChunkKVPress,
    ChunkPress,
    ComposedPress,
    CriticalKVPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    H2OPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    LeverageScorePress,
    LoRAPress,
    LowRankPress,
    MoERouterPress,
    NoCompressionPress,
    NonCausalAttentionPress,
    ProtectedPress,
    PyramidKVPress,
    PyramidPress,
    QFiltersPress,
    QuantizedPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
    TurboQuantPress,
)

PRESSES = {
    "none": lambda: NoCompressionPress(),
    "streaming": lambda: StreamingLLMPress(0.5),
    "knorm": lambda: KnormPress(0.3),
    "snapkv": lambda: SnapKVPress(0.6, window_size=8),
    "snapkv-budget": lambda: SnapKVPress(budget=12, window_size=4, kernel_size=1),
    "h2o": lambda: H2OPress(0.5),
    "adakv": lambda: AdaKVPress(SnapKVPress(0.6, window_size=8)),
    "adakv-h2o": lambda: AdaKVPress(H2OPress(0.5), alpha_safeguard=0.5),
    "pyramidkv": lambda: PyramidKVPress(0.5, window_size=4, kernel_size=3),
    "pyramid": lambda: PyramidPress(0.6, num_levels=3, decay_factor=0.5),
    "cake": lambda: CAKEPress(0.5, window_size=8),
    "kvzip": lambda: KVzipPress(0.6, chunk_size=24),
    "kvzip-layerwise": lambda: KVzipPress(0.5, layerwise=True),
    "protected": lambda: ProtectedPress(KnormPress(0.7), [(5, 9), (12, 14)]),
    "tova": lambda: TOVAPress(0.5),
    "expected": lambda: ExpectedAttentionPress(0.5, n_future_positions=32),
    "keydiff": lambda: KeyDiffPress(0.5),
    "lagkv": lambda: LagKVPress(0.5, lag_size=8),
    "leverage": lambda: LeverageScorePress(0.5, sketch_dimension=12),
    "noncausal": lambda: NonCausalAttentionPress(0.5, chunk_size=16),
    "qfilters": lambda: QFiltersPress(0.5),
    "random": lambda: RandomPress(0.5),
    "chunk": lambda: ChunkPress(SnapKVPress(0.5, window_size=4), chunk_length=16),
    "chunkkv": lambda: ChunkKVPress(H2OPress(0.5), chunk_length=8),
    "criticalkv": lambda: CriticalKVPress(SnapKVPress(0.5, window_size=4)),
    "duo": lambda: DuoAttentionPress(0.5, sink_size=2, recent_size=6),
    "duo-heads": lambda: DuoAttentionPress(head_compression_ratio=0.75, sink_size=0, recent_size=5),
    "eplb": lambda: MoERouterPress(0.4, router_type="eplb"),
    "pikv": lambda: MoERouterPress(0.5, calibration=None),
    "eplb-calibrated": lambda: RandomlyCalibrated(0.6, router_type="eplb", recent_size=4),
    "pikv-calibrated": lambda: RandomlyCalibrated(0.4, router_type="pikv", recent_size=4),
    "headwise": lambda: RandomHeadBudgets(SnapKVPress(0.5, window_size=4), recent_size=4),
    "eplb+duo": lambda: ComposedPress(
        [MoERouterPress(0.35, router_type="eplb"), DuoAttentionPress(0.15, sink_size=2, recent_size=6)]
    ),
}

# Presses that store tokens in formats; with groups and windows that short texts reach.
FORMATS = {
    "int8": lambda: QuantizedPress(8, group_size=8, num_sinks=2, window_size=4),
    "int4": lambda: QuantizedPress(4, group_size=8, num_sinks=2, window_size=4),
    "int2": lambda: QuantizedPress(2, group_size=4, num_sinks=0, window_size=0, symmetric=True),
    "turbo": lambda: TurboQuantPress(3, value_bits=4, num_sinks=2, window_size=4),
    "svd": lambda: LowRankPress(4, group_size=16, num_sinks=2, window_size=4, check=False),
    "think": lambda: ThinKPress(0.5, group_size=8, num_sinks=2, window_size=4),
    "int4-by-token": lambda: QuantizedPress(4, group_size=5, key_axis="token", value_bits=2, num_sinks=1, window_size=3),
    "lora": lambda: LoRAPress(4, steps=2, group_size=16, num_sinks=2, window_size=4, check=False),
}

every_press = pytest.mark.parametrize("press", [pytest.param(build, id=name) for name, build in PRESSES.items()])
