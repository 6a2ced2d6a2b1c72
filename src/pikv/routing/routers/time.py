"""Tokens that have a time (after Time-MoE, arXiv 2409.16040)."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.routing.base import CommonOptions, GateOutput, Info, MoERouter, zero_linear
from pikv.routing.factory import register_router


@register_router("time", is_press=False, paper="2409.16040")
class TimeRouter(MoERouter):
    """Adds to the logits what is learned of a token's time: waves of ``num_frequencies`` periods, and its seasonality.

    ``info`` has ``timestamps`` and, if known, ``seasonality``, both ``[T]`` or ``[B, T]``. Without information, positions
    stand in for timestamps. Periods grow geometrically from 2 to ``longest_period``, in the unit of the timestamps.

    Raises:
        ValueError: for fewer than 1 frequency, or a ``longest_period`` of less than 2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        num_frequencies: int = 8,
        longest_period: float = 10_000.0,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if num_frequencies < 1:
            raise ValueError(f"num_frequencies must be at least 1, not {num_frequencies}")
        if not 2 <= longest_period < float("inf"):
            raise ValueError(f"longest_period must be at least 2, not {longest_period!r}")
        self.num_frequencies = num_frequencies
        self.longest_period = longest_period
        self.time_gate = zero_linear(2 * num_frequencies, num_experts)
        self.season_gate = zero_linear(1, num_experts)

    def token_info(self, positions: Tensor, hit_rates: Tensor | None) -> Info | None:
        return {"timestamps": positions.float()}

    def check_info(self, hidden_states: Tensor, info: Info | None) -> None:
        """Refuses information without timestamps, of other names or shapes, or not finite."""
        if info is None:
            return
        unknown = [str(name) for name in info if name not in ("timestamps", "seasonality")]
        if unknown:
            raise ValueError(f"unknown information {', '.join(unknown)}; there is timestamps, seasonality")
        if "timestamps" not in info:
            raise ValueError("the information about time lacks 'timestamps'")
        batch, num_tokens, _ = hidden_states.shape
        for name, times in info.items():
            if tuple(times.shape) not in [(num_tokens,), (batch, num_tokens)]:
                raise ValueError(f"{name} must be [{num_tokens}] or [{batch}, {num_tokens}], not {list(times.shape)}")
            if not bool(times.isfinite().all()):
                raise ValueError(f"{name} contains NaN or infinity")

    def read(self, hidden_states: Tensor, info: Info | None) -> GateOutput:
        given = {"timestamps": torch.arange(hidden_states.shape[1], device=hidden_states.device)} if info is None else info
        logits = self.gate(hidden_states) + self.time_gate(self.waves(given["timestamps"]).to(hidden_states))
        if "seasonality" in given:
            logits = logits + self.season_gate(given["seasonality"].to(hidden_states).unsqueeze(-1))
        return GateOutput(logits=logits)

    def waves(self, timestamps: Tensor) -> Tensor:
        """Sines and cosines of the timestamps, ``[..., 2 * num_frequencies]`` (float64: seconds since 1970 need it)."""
        growth = torch.linspace(0, 1, self.num_frequencies, dtype=torch.float64, device=timestamps.device)
        angles = timestamps.double().unsqueeze(-1) * (2 * torch.pi / (2 * (self.longest_period / 2) ** growth))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
