"""Which experts does a token go to, and with what weight?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from pikv.router_defaults import CAPACITY_FACTOR, DROPOUT, NUM_EXPERTS
from pikv.routing.choice import balanced_topk
from pikv.routing.result import Routing, count_by_bin, places_by_priority
from pikv.routing.stats import RoutingStats

Info = Mapping[str, Tensor]
"""What else is known about the tokens, by name."""

Terms = dict[str, tuple[float, Tensor]]
"""Parts of a loss by name: a weight, and a scalar."""


class CommonOptions(TypedDict, total=False):
    """Options of every router."""

    capacity_factor: float
    """Slots of an expert, over what an even spread would need."""
    dropout: float
    """Share of the gate's inputs that training leaves out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GateOutput:
    """What a gate reads off the tokens.

    Attributes:
        logits: ``[B, T, E]``
        gains: ``[B, T, K]``, how much each choice of a token counts, 1 by default; one of 0 is not made
        terms: parts of the loss that are known by now
        counts: what is known by now and to be counted
    """

    logits: Tensor
    gains: Tensor | None = None
    terms: Terms = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)


class MoERouter(nn.Module):
    """Sends every token to the ``top_k`` experts of ``num_experts`` that a linear gate finds most probable.

    Sequences never share slots: a batch gives each of them what it gets alone. A gate that nothing was learned for yet has
    ``calibrated`` False; its weights are zero, and ties are broken in turn, so it spreads tokens evenly. Loading weights
    other than zero sets ``calibrated``. Subclasses override the parts: ``read``, ``assign``, ``place``, ``capacity``,
    ``losses``. What a kind wants to know about cached tokens it says by ``token_info``, ``uses_hits`` and
    ``update_hit_rates``.

    Raises:
        ValueError: for sizes below 1, ``top_k`` beyond ``num_experts``, ``capacity_factor`` not above 0, or ``dropout``
            outside of [0, 1).
    """

    is_press: ClassVar[bool] = True
    """Whether the name of this kind is the name of a press as well; set where it is registered."""
    paper: ClassVar[str | None] = None
    """Its number on arXiv; set where it is registered."""
    idle_options: ClassVar[frozenset[str]] = frozenset()
    """Options that this kind has, but that do not change which experts a token is sent to, or with what weight."""
    uses_hits: ClassVar[bool] = False
    """Whether it uses how much of the experts' attention fell on kept tokens; it is measured for such kinds alone."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = NUM_EXPERTS,
        top_k: int = 2,
        *,
        capacity_factor: float = CAPACITY_FACTOR,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or num_experts < 1:
            raise ValueError(f"hidden_size and num_experts must be at least 1, not {hidden_size} and {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie between 1 and num_experts={num_experts}, not {top_k}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout!r}")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = check_factor("capacity_factor", capacity_factor)
        self.dropout = nn.Dropout(dropout)
        self.gate = zero_linear(hidden_size, num_experts)
        self.calibrated = False
        self.stats = RoutingStats(num_experts)
        self.register_load_state_dict_post_hook(_note_calibration)

    def forward(
        self, hidden_states: Tensor, info: Info | None = None, *, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Routes as ``route`` does.

        Returns:
            dispatch ``[B, T, E, C]``, combine ``[B, T, E, C]``, probabilities ``[B, T, E]``, and the auxiliary loss
        """
        routing = self.route(hidden_states, info, allowed=allowed)
        return routing.dispatch(), routing.combine(), routing.probs, routing.loss

    def route(self, hidden_states: Tensor, info: Info | None = None, *, allowed: Tensor | None = None) -> Routing:
        """Routes ``[B, T, hidden]``, or one sequence ``[T, hidden]``, without building dense tensors.

        ``allowed`` (bool, ``[E]`` or ``[B, T, E]``) says which experts a token may go to; it makes fewer choices where these
        are fewer than ``top_k``. ``info`` is for the kinds of router that say so.

        Raises:
            ValueError: for hidden states of another shape, empty, or that contain NaN or infinity, for a mask of another
                shape or that leaves a token no expert, and for information that the router does not take.
        """
        if hidden_states.dim() == 2:
            hidden_states = hidden_states.unsqueeze(0)
        self._check(hidden_states)
        permitted = self._permitted(hidden_states, allowed)
        self.check_info(hidden_states, info)
        output = self.read(self.dropout(hidden_states.to(self.gate.weight)), info)
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        # What is not finite in a hidden state reaches every logit of it, and there are far fewer of these to look at.
        if not bool(logits.isfinite().all()):
            raise ValueError("hidden states contain NaN or infinity")
        if permitted is not None:
            logits = logits.masked_fill(~permitted, float("-inf"))
        probs = logits.softmax(-1)
        experts, made = self.assign(logits.detach())
        if output.gains is not None:
            made = made & (output.gains.detach() > 0)
        weights = self._weights(logits, probs, experts, made, output.gains)
        load = count_by_bin(experts, made, self.num_experts)
        capacity = self.capacity(hidden_states.shape[1], load)
        slots = self.place(experts, weights, made, capacity)
        terms = {**self.losses(probs, load / load.sum(1, keepdim=True).to(probs)), **output.terms}
        routing = Routing(
            experts=experts,
            weights=weights,
            made=made,
            slots=slots,
            accepted=slots >= 0,
            load=load,
            probs=probs,
            loss=torch.stack([weight * term for weight, term in terms.values()]).sum(),
            capacity=capacity,
            terms={name: term for name, (_, term) in terms.items()},
            counts={**output.counts, **self.counts(experts, slots)},
        )
        self.stats.add(routing)
        return routing

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """The options that this kind takes beside sizes and ``top_k``, by its signature."""
        names: set[str] = set()
        for owner in cls.__mro__:
            if "__init__" not in vars(owner):
                continue
            parameters = signature(vars(owner)["__init__"]).parameters.values()
            names |= {
                each.name for each in parameters if each.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
            }
            if owner is MoERouter or not any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
                break
        return frozenset(names - {"self", "hidden_size", "num_experts", "top_k"})

    def token_info(self, positions: Tensor, hit_rates: Tensor | None) -> Info | None:
        """The ``info`` that ``route`` is given for cached tokens of one sequence; None for none.

        ``positions`` ``[T]`` are their true positions, ``hit_rates`` ``[E]`` what was measured in the sequence so far: NaN for
        an expert whose tokens got no attention, None where nothing was measured.
        """
        return None

    def update_hit_rates(self, hits: Tensor, totals: Tensor) -> None:
        """Learns, in training, the attention ``[E]`` on kept tokens and on all tokens of each expert, if it ``uses_hits``."""

    def check_info(self, hidden_states: Tensor, info: Info | None) -> None:
        """Refuses what ``read`` could not use, before anything is done."""
        if info is not None:
            raise ValueError(f"the {type(self).__name__} takes no information besides the hidden states")

    def read(self, hidden_states: Tensor, info: Info | None) -> GateOutput:
        """The gate's opinion of ``[B, T, hidden]``, which was checked."""
        return GateOutput(logits=self.gate(hidden_states))

    def assign(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses ``top_k`` different experts for each token by ``[B, T, E]``, minus infinity where forbidden.

        Returns:
            experts ``[B, T, K]``, and which of these choices are made, ``[B, T, K]``
        """
        experts = balanced_topk(logits, self.top_k)
        return experts, logits.gather(2, experts).isfinite()

    def capacity(self, num_tokens: int, load: Tensor) -> int:
        """Slots of each expert for a sequence of which the experts were chosen ``load`` times, ``[B, E]``."""
        return slots_needed(self.capacity_factor, num_tokens * self.top_k, self.num_experts, num_tokens)

    def place(self, experts: Tensor, weights: Tensor, made: Tensor, capacity: int) -> Tensor:
        """Gives the choices ``[B, T, K]`` their slots, -1 to those that get none."""
        places = places_by_priority(experts, weights, made, self.num_experts)
        return places.masked_fill(places >= capacity, -1)

    def losses(self, probs: Tensor, shares: Tensor) -> Terms:
        """Parts of the loss, for probabilities ``[B, T, E]`` and each expert's share of the choices ``[B, E]``.

        The balance loss of Switch transformers (arXiv 2101.03961): 1 for an even load, ``E`` if all go to one expert.
        """
        return {"balance": (1.0, balance_loss(probs, shares))}

    def counts(self, experts: Tensor, slots: Tensor) -> dict[str, Tensor]:
        """What there is to be counted of a decision, beside what every router counts."""
        return {}

    def get_routing_stats(self) -> dict[str, Any]:
        """What the router did since it was made, or since ``reset_stats``."""
        return self.stats.summary(calibrated=self.calibrated)

    def reset_stats(self) -> None:
        """Starts counting anew."""
        self.stats.reset()

    def _weights(self, logits: Tensor, probs: Tensor, experts: Tensor, made: Tensor, gains: Tensor | None) -> Tensor:
        """The weights of the choices ``[B, T, K]``: their probabilities times their gains, as shares of the choices made."""
        if self.top_k == 1:
            return probs.gather(2, experts) * (made if gains is None else gains)
        # Among themselves, not by way of all probabilities: of experts that a token was sent to for balance, all may be 0.
        among = logits.gather(2, experts).masked_fill(~made, float("-inf")).softmax(2)
        if gains is None:
            return among
        weighted = among * gains
        return weighted / weighted.sum(2, keepdim=True)

    def _check(self, hidden_states: Tensor) -> None:
        if hidden_states.dim() != 3:
            raise ValueError(f"hidden states must be [B, T, hidden], not {list(hidden_states.shape)}")
        if hidden_states.shape[2] != self.hidden_size:
            raise ValueError(f"hidden size {hidden_states.shape[2]}, but the router was made for {self.hidden_size}")
        if not hidden_states.numel():
            raise ValueError(f"hidden states {list(hidden_states.shape)} have no tokens")

    def _permitted(self, hidden_states: Tensor, allowed: Tensor | None) -> Tensor | None:
        if allowed is None:
            return None
        everywhere = (*hidden_states.shape[:2], self.num_experts)
        if allowed.dtype != torch.bool or tuple(allowed.shape) not in [everywhere, everywhere[2:]]:
            wanted = f"bool, {list(everywhere[2:])} or {list(everywhere)}"
            raise ValueError(f"allowed must be {wanted}, not {allowed.dtype} {list(allowed.shape)}")
        if not bool(allowed.any(-1).all()):
            raise ValueError("allowed forbids a token all experts")
        return allowed.to(hidden_states.device).expand(everywhere)


def zero_linear(num_inputs: int, num_outputs: int) -> nn.Linear:
    """A linear layer without bias that says nothing yet."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs, bias=False)  # draws no random numbers
    nn.init.zeros_(layer.weight)
    return layer


def check_factor(name: str, factor: float) -> float:
    """Refuses a capacity factor that is not a number above 0."""
    if not (0 < factor < math.inf):
        raise ValueError(f"{name} must be above 0, not {factor!r}")
    return factor


def check_weight(name: str, weight: float) -> float:
    """Refuses a weight that is not a number of at least 0."""
    if not (0 <= weight < math.inf):
        raise ValueError(f"{name} must be at least 0, not {weight!r}")
    return weight


def slots_needed(factor: float, num_choices: int, num_bins: int, most: int) -> int:
    """``factor`` times an even share of the choices, rounded up, and not more than there can be in one bin."""
    return min(math.ceil(factor * num_choices / num_bins), most)


def balance_loss(probs: Tensor, shares: Tensor) -> Tensor:
    """``E`` times the sum over experts of mean probability ``[B, T, E]`` times share ``[B, E]``, its mean over sequences."""
    return probs.shape[2] * (probs.mean(1) * shares).sum(1).mean()


def _note_calibration(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, MoERouter)
    module.calibrated = any(bool(parameter.any()) for parameter in module.parameters())
