"""Calibration of a model: its routers are trained, its retrieval heads found."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from pikv.calibration.heads import find_retrieval_heads, judge_heads
from pikv.calibration.lessons import make_lessons
from pikv.calibration.progress import ProgressBar, no_progress
from pikv.hf.identity import fingerprint, model_signature
from pikv.hf.support import check_supported
from pikv.routing.calibration import Calibration
from pikv.routing.exam import examine
from pikv.routing.factory import ROUTERS
from pikv.routing.training import Trainer, TrainingSettings
from pikv.scoring.experts import RetentionExpert, default_experts
from pikv.tasks.contexts import TokenizedSample


def calibrate(
    model: Any,
    texts_or_tasks: Sequence[str | TokenizedSample] | None = None,
    *,
    tokenizer: Any = None,
    kinds: Sequence[str] | None = None,
    experts: Mapping[str, RetentionExpert] | None = None,
    top_k: int = 2,
    capacity_factor: float = 1.5,
    dropout: float = 0.1,
    aux_loss_weight: float = 0.01,
    num_tokens: int = 1024,
    num_steps: int = 300,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    checkpoint: str | Path | None = None,
    progress: ProgressBar = no_progress,
) -> Calibration:
    """Trains routers of ``kinds`` for all layers of ``model``, which stays as it is, and finds its retrieval heads.

    The model reads contexts of up to ``num_tokens`` tokens, then what comes after them; what later queries really take from
    each cached token is what its score should foretell, from the token's hidden state alone, before anything is asked. Lessons
    are made of ``texts_or_tasks``, texts and retrieval samples with answers; None stands for fresh synthetic retrieval, and
    where there is neither a ``tokenizer`` nor one beside the model, for random tokens that repeat. ``kinds`` None stands for
    all that go with so many experts. ``options`` are further options of a kind of router, by kind. With a ``checkpoint`` file
    an interrupted training goes on where it stopped; it is there until somebody removes it.

    Raises:
        ValueError: before any work, for too little text, unknown kinds, options out of range, a model that is not supported,
            or a checkpoint of another training.
    """
    check_supported(model)
    experts = default_experts() if experts is None else dict(experts)
    settings = TrainingSettings(
        kinds=tuple(ROUTERS) if kinds is None else tuple(dict.fromkeys(kinds)),
        top_k=top_k,
        capacity_factor=capacity_factor,
        dropout=dropout,
        aux_loss_weight=aux_loss_weight,
        num_tokens=num_tokens,
        num_steps=num_steps,
        seed=seed,
        options={kind: dict(chosen) for kind, chosen in (options or {}).items()},
    )
    settings = replace(settings, kinds=_possible(settings, len(experts), all_wanted=kinds is not None))
    lessons = make_lessons(model, texts_or_tasks, tokenizer, num_tokens=num_tokens, seed=seed)
    path = None if checkpoint is None else Path(checkpoint)
    state = _read_checkpoint(path) if path is not None and path.is_file() else None
    with _evaluating(model):
        scores = find_retrieval_heads(model, tokenizer)
        trainer = Trainer(model, lessons, experts, settings)
        if state is not None:
            trainer.load(state)
        advance = progress("training", num_steps)
        for _ in range(trainer.step):
            advance()
        trainer.run(path, advance)
        panels = {kind: [panel.eval() for panel in layers] for kind, layers in trainer.panels.items()}
        taken = examine(model, lessons, experts, panels, trainer.profiles)
    sources = "synthetic" if texts_or_tasks is None else f"{len(texts_or_tasks)} texts or tasks"
    return Calibration(
        facts=model_signature(model.config),
        fingerprint=fingerprint(model),
        experts=tuple(experts),
        panels={kind: [panel.state_dict() for panel in layers] for kind, layers in panels.items()},
        profiles=trainer.profiles / trainer.profiles.amax(),
        head_scores=scores,
        options=settings.options,
        settings={**asdict(settings), "lessons": sources},
        report={"taken_from_kept": taken, "heads": asdict(judge_heads(scores))},
    )


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


def _read_checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"cannot read the checkpoint {path}; remove it to begin anew") from error
