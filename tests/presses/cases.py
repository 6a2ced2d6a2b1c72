"""The one matrix of presses that tests go through."""

import pytest

from pikv.presses import (
    ComposedPress,
    DuoAttentionPress,
    H2OPress,
    KnormPress,
    MoERouterPress,
    NoCompressionPress,
    SnapKVPress,
    StreamingLLMPress,
)

PRESSES = {
    "none": lambda: NoCompressionPress(),
    "streaming": lambda: StreamingLLMPress(0.5),
    "knorm": lambda: KnormPress(0.3),
    "snapkv": lambda: SnapKVPress(0.6, window_size=8),
    "snapkv-budget": lambda: SnapKVPress(budget=12, window_size=4, kernel_size=1),
    "h2o": lambda: H2OPress(0.5),
    "duo": lambda: DuoAttentionPress(0.5, sink_size=2, recent_size=6),
    "duo-heads": lambda: DuoAttentionPress(head_compression_ratio=0.75, sink_size=0, recent_size=5),
    "eplb": lambda: MoERouterPress(0.4, router_type="eplb"),
    "eplb+duo": lambda: ComposedPress(
        [MoERouterPress(0.35, router_type="eplb"), DuoAttentionPress(0.15, sink_size=2, recent_size=6)]
    ),
}

every_press = pytest.mark.parametrize("press", [pytest.param(build, id=name) for name, build in PRESSES.items()])
