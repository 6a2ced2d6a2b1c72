"""The calls of the project's guides, as they stand there but for the root of the import."""

import pytest
import torch

from pikv import PiKVCache
from pikv.presses import BaseMoERouter, BasePress, ComposedPress, DuoAttentionPress, MoERouterPress, PiKVMoERouter
from pikv.routing import create_moe_router
from tiny import batch_of

pytestmark = pytest.mark.filterwarnings("ignore:the router")


def lengths_after(model, press, num_tokens=40):
    cache = PiKVCache(model.config)
    with press(model), torch.no_grad():
        model(batch_of([num_tokens])[0], past_key_values=cache)
    return cache.lengths(0)


def test_000_and_001_presses_that_are_compared(llama):
    class NoCompressionPress(BasePress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            return keys, values

    assert lengths_after(llama, NoCompressionPress()).tolist() == [[40] * 4]
    duo_press = DuoAttentionPress(compression_ratio=0.5)
    assert duo_press.compression_ratio == 0.5
    assert DuoAttentionPress(head_compression_ratio=0.3).head_compression_ratio == 0.3
    eplb_press = MoERouterPress(router_type="eplb", num_experts=4, top_k=2, compression_ratio=0.35)
    combined_press = ComposedPress([eplb_press, DuoAttentionPress(compression_ratio=0.15)])
    assert combined_press.compression_ratio == pytest.approx(1 - 0.65 * 0.85)
    config = {"router_type": "eplb", "num_experts": 4, "top_k": 2, "compression_ratio": 0.5, "cache_aware": True}
    assert lengths_after(llama, MoERouterPress(**config)).tolist() == [[20] * 4]
    for num_experts in (1, 2, 6, 8):
        assert MoERouterPress(num_experts=num_experts).top_k == min(2, num_experts)


def test_002_routers_and_their_statistics(llama):
    moe_press = MoERouterPress(
        num_experts=4,
        top_k=2,
        capacity_factor=1.5,
        dropout=0.1,
        router_type="pikv",
        cache_aware=True,
        compression_ratio=0.5,
        aux_loss_weight=0.01,
    )
    with moe_press(llama):
        llama.generate(batch_of([40])[0], max_new_tokens=3, do_sample=False)
    stats = moe_press.get_stats()
    assert {"total_aux_loss", "avg_aux_loss", "forward_count"} <= set(stats)
    for layer_stats in stats["layer_stats"].values():
        assert sum(layer_stats["router_stats"]["expert_usage_ratios"]) == pytest.approx(1)
        assert {"expert_usage", "compression_ratios", "cache_hit_rates"} <= set(layer_stats["expert_compression_stats"])
    assert {type(router) for router in moe_press.routers.values()} == {PiKVMoERouter}
    assert issubclass(PiKVMoERouter, BaseMoERouter)
    for options in (
        {"router_type": "base"},
        {"num_experts": 2},
        {"num_experts": 8},
        {"capacity_factor": 2.0},
        {"aux_loss_weight": 0.001},
        {"top_k": 1},
        {"compression_ratio": 0.7},
    ):
        assert MoERouterPress(**options).get_stats()["compression_count"] == 0
    moe_press.expert_strategies[0] = "ultra_aggressive"
    moe_press.reset_stats()
    assert lengths_after(llama, moe_press).tolist() == [[20] * 4]
    del moe_press.routers


def test_002_strategies_of_ones_own(llama):
    class CustomMoERouterPress(MoERouterPress):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.expert_strategies = {0: "ultra_aggressive", 1: "semantic_aware", 2: "temporal_aware", 3: "adaptive"}

        def _apply_expert_compression(self, keys, values, strategy, router_probs):
            if strategy == "semantic_aware":
                pass
            return keys, values

    press = CustomMoERouterPress(compression_ratio=0.25)
    assert lengths_after(llama, press).tolist() == [[30] * 4]
    press.compression_ratio = 0.5
    press.top_k = 1
    assert press.expert_strategies[1] == "semantic_aware"
    assert lengths_after(llama, press).tolist() == [[20] * 4]


def test_003_routers_by_strategy():
    input_tensor, size = torch.randn(4, 16, 32), {"hidden_size": 32}
    flex_router = create_moe_router("flex", num_experts=16, top_k=4, **size)
    modality_info = {"image": torch.randn(4, 16, 32), "genomic": torch.randn(4, 16, 32)}
    time_router = create_moe_router("time", num_experts=8, top_k=2, **size)
    time_info = {"timestamps": torch.arange(16).float(), "seasonality": torch.sin(torch.arange(16) * 2 * torch.pi / 24)}
    fast_router = create_moe_router("fast", num_experts=16, top_k=2, **size)
    mixture_router = create_moe_router("mixture", num_experts=8, top_k=2, **size)
    for router, *info in ((flex_router, modality_info), (time_router, time_info), (fast_router,), (mixture_router,)):
        dispatch, combine, probs, loss = router(input_tensor, *info)
        assert dispatch.shape == combine.shape
        assert probs.shape[:2] == (4, 16)
        assert loss.dim() == 0
