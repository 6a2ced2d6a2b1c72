"""Tokens of which several modalities are known, or only some (Flex-MoE, arXiv 2410.08245)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pikv.routing.base import CommonOptions, GateOutput, Info, MoERouter, zero_linear
from pikv.routing.factory import register_router

MODALITIES = ("image", "genomic", "clinical", "biospecimen", "text", "audio")


@register_router("flex", is_press=False, paper="2410.08245")
class FlexRouter(MoERouter):
    """Adds to the logits what each of ``modalities`` says about a token.

    ``info`` maps names to ``[B, T, hidden]``. For a modality that is missing, a learned row of the ``missing_bank``
    ``[modalities, E]`` speaks instead; without any information all are missing.

    Raises:
        ValueError: for no modalities, one named twice, or one ``required`` that is not among them.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        modalities: Sequence[str] = MODALITIES,
        required: Sequence[str] = (),
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if not modalities or len(set(modalities)) < len(modalities):
            raise ValueError(f"modalities must be different names, at least one, not {modalities!r}")
        self.modalities = tuple(modalities)
        self.required = tuple(required)
        _check_known(self.required, self.modalities)
        # By number, as a name need not be one that torch accepts for a module.
        self.modality_gates = nn.ModuleList(zero_linear(hidden_size, num_experts) for _ in self.modalities)
        self.missing_bank = nn.Parameter(torch.zeros(len(self.modalities), num_experts))

    def check_info(self, hidden_states: Tensor, info: Info | None) -> None:
        """Refuses unknown modalities, ones of another shape or not finite, and the lack of required ones."""
        present = info or {}
        _check_known(present, self.modalities)
        lacking = [name for name in self.required if name not in present]
        if lacking:
            raise ValueError(f"required modalities are missing: {', '.join(lacking)}")
        for name, modality in present.items():
            if modality.shape != hidden_states.shape:
                raise ValueError(f"{name} must be {list(hidden_states.shape)}, not {list(modality.shape)}")
            if not bool(modality.isfinite().all()):
                raise ValueError(f"{name} contains NaN or infinity")

    def read(self, hidden_states: Tensor, info: Info | None) -> GateOutput:
        present = info or {}
        logits = self.gate(hidden_states)
        for name, gate, missing in zip(self.modalities, self.modality_gates, self.missing_bank, strict=True):
            logits = logits + (gate(self.dropout(present[name].to(hidden_states))) if name in present else missing)
        seen = torch.tensor([name in present for name in self.modalities], device=logits.device)
        return GateOutput(logits=logits, counts={"passes_by_modality": seen.long()})


def _check_known(names: Sequence[str] | Info, modalities: tuple[str, ...]) -> None:
    unknown = [str(name) for name in names if name not in modalities]
    if unknown:
        raise ValueError(f"unknown modalities {', '.join(unknown)}; there is {', '.join(modalities)}")
