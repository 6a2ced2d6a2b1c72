"""Calibration of a model: its routers are trained, its retrieval heads found."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pikv.calibration.checkpoint import Checkpoint
from pikv.calibration.files import Calibration
from pikv.calibration.heads import find_retrieval_heads, judge_heads
from pikv.calibration.progress import ProgressBar, no_progress
from pikv.calibration.samples import SMALLEST_TEXT, check_num_tokens, default_num_tokens, make_samples
from pikv.calibration.training import Trainer, TrainingSettings
from pikv.calibration.validation import validate
from pikv.hf.identity import fingerprint, model_signature
from pikv.hf.support import check_supported
from pikv.router_defaults import AUX_LOSS_WEIGHT, CAPACITY_FACTOR, DROPOUT
from pikv.routing.experts import RetentionExpert, default_experts
from pikv.routing.factory import ROUTERS, default_top_k
from pikv.tasks.contexts import TokenizedSample


def calibrate(
    model: Any,
    texts_or_tasks: Sequence[str | TokenizedSample] | None = None,
    *,
    tokenizer: Any = None,
    kinds: Sequence[str] | None = None,
    experts: Mapping[str, RetentionExpert] | None = None,
    top_k: int | None = None,
    capacity_factor: float = CAPACITY_FACTOR,
    dropout: float = DROPOUT,
    aux_loss_weight: float = AUX_LOSS_WEIGHT,
    num_tokens: int | None = None,
    num_steps: int = 300,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    checkpoint: str | Path | None = None,
    progress: ProgressBar = no_progress,
) -> Calibration:
    """Trains routers of ``kinds`` for all layers of ``model``, which stays as it is, and finds its retrieval heads.

    The model reads contexts, then what comes after them. How much later queries read each cached token is what its score
    should foresee, from the token's hidden state alone, before anything is asked. An interrupted training goes on where it
    stopped if it has a ``checkpoint`` file.

    Args:
        model: a causal language model of transformers
        texts_or_tasks: texts, and retrieval samples with answers; None for fresh synthetic retrieval, or, where there is no
            tokenizer, for random tokens that repeat
        tokenizer: that of the model; None for the one beside it, if there is one
        kinds: kinds of router; None for all that can be made for so many experts
        experts: retention experts by name; None for the default ones
        top_k: experts that a token goes to; None for 2, or 1 if there is but one
        capacity_factor: slots of an expert, over what an even spread would need
        dropout: share of the gate's inputs that training leaves out
        aux_loss_weight: weight of the routers' own loss
        num_tokens: tokens of the longest contexts; None for 1,024, or half of the model's positions if that is less
        num_steps: contexts to train on, one a step
        seed: of contexts, dropout and noise
        options: further options of a kind of router, by kind
        checkpoint: a file to leave the state of the training in; it is not removed at the end
        progress: opens a progress bar

    Raises:
        ValueError: before any work, for too little text, unknown kinds, options out of range, a model that is not supported,
            or a checkpoint of another training.
    """
    check_supported(model)
    experts = default_experts() if experts is None else dict(experts)
    settings = training_settings(
        kinds=kinds,
        num_experts=len(experts),
        top_k=top_k,
        capacity_factor=capacity_factor,
        dropout=dropout,
        aux_loss_weight=aux_loss_weight,
        num_tokens=default_num_tokens(model) if num_tokens is None else num_tokens,
        num_steps=num_steps,
        seed=seed,
        options=options,
    )
    samples = make_samples(model, texts_or_tasks, tokenizer, num_tokens=settings.num_tokens, seed=seed)
    file = None if checkpoint is None else Checkpoint(Path(checkpoint))
    state = None if file is None else file.read()
    with _evaluating(model):
        scores = find_retrieval_heads(model, tokenizer)
        trainer = Trainer(model, samples, experts, settings)
        if state is not None:
            trainer.load(state)
        advance = progress("training", num_steps)
        for _ in range(trainer.step):
            advance()
        trainer.run(file, advance)
        mixers = {kind: [mixer.eval() for mixer in layers] for kind, layers in trainer.mixers.items()}
        found = validate(model, samples, experts, mixers, trainer.profiles)
    sources = "synthetic" if texts_or_tasks is None else f"{len(texts_or_tasks)} texts or tasks"
    return Calibration(
        facts=model_signature(model.config),
        fingerprint=fingerprint(model),
        experts=tuple(experts),
        mixers={kind: [mixer.state_dict() for mixer in layers] for kind, layers in mixers.items()},
        profiles=trainer.profiles / trainer.profiles.amax(),
        head_scores=scores,
        options=settings.options,
        settings={**asdict(settings), "samples": sources},
        report={"kept_share": found, "heads": asdict(judge_heads(scores))},
    )


def training_settings(
    *,
    kinds: Sequence[str] | None = None,
    num_experts: int,
    top_k: int | None = None,
    num_tokens: int = SMALLEST_TEXT,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> TrainingSettings:
    """The settings of ``calibrate``, checked as far as that is possible without a model.

    Raises:
        ValueError: for unknown kinds, or settings out of range.
    """
    check_num_tokens(num_tokens)
    chosen = TrainingSettings(
        kinds=tuple(ROUTERS) if kinds is None else tuple(dict.fromkeys(kinds)),
        top_k=default_top_k(num_experts) if top_k is None else top_k,
        num_tokens=num_tokens,
        options={kind: dict(found) for kind, found in (options or {}).items()},
        **settings,
    )
    return replace(chosen, kinds=_possible(chosen, num_experts, all_wanted=kinds is not None))


def _possible(settings: TrainingSettings, num_experts: int, *, all_wanted: bool) -> tuple[str, ...]:
    """The kinds of router that can be made with these settings; if ``all_wanted``, one that cannot is an error."""
    possible = []
    for kind in settings.kinds:
        try:
            settings.new_router(kind, hidden_size=1, num_experts=num_experts)
        except ValueError:
            if all_wanted or kind == settings.kinds[0]:
                raise
        else:
            possible.append(kind)
    if not possible:
        raise ValueError(f"name at least one kind of router: {', '.join(ROUTERS)}")
    return tuple(possible)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, as it will be used."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
