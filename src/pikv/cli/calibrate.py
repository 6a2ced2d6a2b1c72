"""``pikv calibrate``: routers, head budgets and retrieval heads, learned from a model's own attention."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pikv.cli.options import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    folder,
    hide_bars,
)
from pikv.cli.progress import busy, load_libraries, progress_bars
from pikv.cli.results import print_line, print_table
from pikv.router_defaults import AUX_LOSS_WEIGHT, CAPACITY_FACTOR, DROPOUT, NUM_EXPERTS
from pikv.tasks.text_file import read_text_file

if TYPE_CHECKING:
    from pikv.calibration.files import Calibration


def calibrate_command(
    model: ModelOption = "demo",
    texts: Annotated[
        list[Path] | None, typer.Option(help="Text files to learn from, may be repeated. (default: synthetic retrieval)")
    ] = None,
    routers: Annotated[str, typer.Option(help="Kinds of router, comma-separated. (default: all)")] = "",
    num_experts: Annotated[int, typer.Option(help="Retention experts that routers choose among.")] = NUM_EXPERTS,
    top_k: Annotated[
        int | None, typer.Option(help="Experts that a token goes to. (default: 2, or 1 if there is but one)")
    ] = None,
    capacity_factor: Annotated[
        float, typer.Option(help="Slots of an expert, over its even share of the tokens.")
    ] = CAPACITY_FACTOR,
    dropout: Annotated[float, typer.Option(help="Share of a gate's inputs that training leaves out.")] = DROPOUT,
    aux_loss_weight: Annotated[float, typer.Option(help="Weight of the routers' balance loss.")] = AUX_LOSS_WEIGHT,
    context_length: Annotated[
        int | None,
        typer.Option(help="Tokens of the longest contexts. (default: 1024, or half of the model's positions if that is less)"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Contexts to learn from, one a step.")] = 300,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    attn_implementation: AttentionOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the contexts and of dropout.")] = 0,
    out: Annotated[
        Path,
        typer.Option(
            parser=folder,
            metavar="PATH",
            help="Folder for pikv_calibration.safetensors (with the number of experts in its name if that is not 4); "
            "in the model's own folder it is found by default.",
        ),
    ] = Path("out/calibration"),
) -> None:
    """Train routers on what later queries of a model really read, measure head budgets, find retrieval heads.

    The model itself is not changed. Writes one file, which presses take by default where it lies beside the model, and by
    --calibration elsewhere. Interrupted, the same command goes on where it stopped.

    Examples:

      pikv calibrate

      pikv calibrate --model ./my-model --out ./my-model

      pikv calibrate --model ./my-model --out ./my-model --num-experts 8

      pikv calibrate --model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16 --context-length 4096 --routers eplb,pikv

      pikv calibrate --model ./my-model --texts notes.txt --texts manual.txt
    """
    hide_bars(model)
    load_libraries()
    from pikv.calibration.calibrate import calibrate, training_settings
    from pikv.calibration.checkpoint import Checkpoint
    from pikv.calibration.files import file_name
    from pikv.calibration.samples import SMALLEST_TEXT
    from pikv.models.loading import load_model
    from pikv.registry import unknown
    from pikv.routing.experts import default_experts
    from pikv.routing.factory import ROUTERS

    path = out / file_name(num_experts)
    kinds = [kind.strip() for kind in routers.split(",") if kind.strip()] or None
    experts, sources = default_experts(num_experts), None if texts is None else [read_text_file(text, "text") for text in texts]
    unknown_kinds = [kind for kind in kinds or [] if kind not in ROUTERS]
    if unknown_kinds:
        raise unknown("router", unknown_kinds[0], ROUTERS)
    if steps < 1:
        raise ValueError(f"calibration needs at least 1 step, not {steps}")
    if path.exists():
        raise ValueError(f"{path} exists and is never overwritten: delete it or move it first")
    training_settings(
        kinds=kinds,
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=capacity_factor,
        dropout=dropout,
        aux_loss_weight=aux_loss_weight,
        num_tokens=SMALLEST_TEXT if context_length is None else context_length,
    )
    checkpoint = Checkpoint(path.with_name(f".{path.name}.checkpoint"))
    with _folder(out), progress_bars(Console(stderr=True, emoji=False)) as progress:
        with busy(f"reading model {model}"):
            loaded, tokenizer = load_model(model, device, dtype, attn_implementation)
        calibration = calibrate(
            loaded,
            sources,
            tokenizer=tokenizer,
            kinds=kinds,
            experts=experts,
            top_k=top_k,
            capacity_factor=capacity_factor,
            dropout=dropout,
            aux_loss_weight=aux_loss_weight,
            num_tokens=context_length,
            num_steps=steps,
            seed=seed,
            checkpoint=checkpoint.path,
            progress=progress,
        )
    _print(calibration)  # before it is saved, which may fail
    _save(calibration, path)
    checkpoint.remove()
    Console(emoji=False).print(f"\ncalibration: {path}", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Makes a folder, or makes sure that it can be written to; one that was made goes again if nothing comes of it."""
    made = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error}") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):  # there is a checkpoint in it
            for each in made:
                each.rmdir()
        raise


def _save(calibration: "Calibration", path: Path) -> None:
    """Saves a calibration; where that is impossible by now, in the folder for temporary files, and says so.

    Raises:
        ValueError: if it is not at ``path``.
    """
    try:
        if path.exists():
            raise ValueError(f"{path} was made by something else in the meantime")
        path.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(path)
    except (OSError, ValueError) as error:
        reason = str(error)
    else:
        return
    try:
        rescued = Path(mkdtemp(prefix="pikv-")) / path.name
        calibration.save(rescued)
    except (OSError, ValueError) as error:
        raise ValueError(f"{reason}; nor can it be saved elsewhere: {error}") from None
    raise ValueError(f"{reason}; the calibration is saved as {rescued}")


def _print(calibration: "Calibration") -> None:
    """What training measured on contexts that it did not learn from."""
    found = calibration.report["kept_share"]
    names = {"best": "best possible choice (upper bound)", "even": "uncalibrated, same head budgets"}
    header = ["router", *(f"{ratio} removed" for ratio in next(iter(found.values())))]
    rows = [[names.get(name, name), *(f"{100 * share:.1f}%" for share in shares.values())] for name, shares in found.items()]
    print_table("Share of later attention that falls on kept tokens", header, rows)
    print_line(calibration.report["heads"]["message"] + ".")
