"""``pikv experiment``: the studies of routers and presses."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from pikv.cli.progress import progress_bars


def experiment_command(
    study: Annotated[str, typer.Argument(help="routers, presses, combos, sensitivity, experts, benchmark or calibration.")],
    data: Annotated[str | None, typer.Option(help="random, or demo: texts with answers. (default: the study's)")] = None,
    model: Annotated[
        str | None, typer.Option(help="random, demo, a hub id or a local folder. (default: the data set's)")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="What pikv calibrate wrote, if not beside the model.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences that are read together.")] = 2,
    num_tokens: Annotated[
        int | None, typer.Option(help="Tokens of each. (default: the data set's; random 100, demo 1024)")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Batches to measure on. (default: the study's, mostly 5)")] = None,
    passes: Annotated[int, typer.Option(help="Times to read each batch; the fastest counts.")] = 3,
    num_experts: Annotated[int, typer.Option(help="Retention experts that routers choose among.")] = 4,
    top_k: Annotated[int, typer.Option(help="Experts that a token goes to.")] = 2,
    capacity_factor: Annotated[float, typer.Option(help="Room of an expert, over its even share of the tokens.")] = 1.5,
    num_contexts: Annotated[int, typer.Option(help="Contexts for quality, where answers are known.")] = 8,
    num_records: Annotated[int, typer.Option(help="Records hidden in each.")] = 40,
    num_questions: Annotated[int, typer.Option(help="Questions about each.")] = 24,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the random model and of all data.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Log what every press decided in every layer.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. (default: out/STUDY-<time>)")] = None,
) -> None:
    """Study routers and presses: compression, time, memory and quality, with mean and standard deviation.

    routers compares all routers at one ratio, presses single presses, combos combinations of them, sensitivity one press at
    rising ratios, experts every retention expert alone, benchmark single presses and a combination more often, calibration
    trained routers beside all that they have to be better than.
    Writes results.csv (every run), summary.csv, results.json and report.html.

    Examples:

      pikv experiment routers

      pikv experiment combos --data demo

      pikv experiment sensitivity --num-tokens 2000 --repeats 10

      pikv experiment experts --batch-size 1 --debug

      pikv experiment benchmark --model Qwen/Qwen3-0.6B --data demo --device cuda --dtype bfloat16
    """
    if model in (None, "random", "demo") or Path(model or "").exists():  # bars are for downloads
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from pikv.experiments.studies.registry import get_study
    from pikv.experiments.studies.run import StudyConfig, prepare, run_study
    from pikv.report.folder import choose_folder, new_folder
    from pikv.report.study import study_tables, write_study
    from pikv.report.table import rich_tables

    chosen = get_study(study)
    config = StudyConfig(
        data=data,
        model=model,
        calibration=calibration,
        batch_size=batch_size,
        num_tokens=num_tokens,
        repeats=repeats,
        passes=passes,
        num_contexts=num_contexts,
        num_records=num_records,
        num_questions=num_questions,
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=capacity_factor,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    folder = choose_folder(out, study)
    messages = Console(stderr=True)
    if debug:
        _log_to(messages)
    configurations, inputs = prepare(chosen, config)
    with new_folder(folder) as part:  # made first: better to know now that it cannot be
        with progress_bars(messages) as progress:
            result = run_study(chosen, config, configurations, inputs, progress)
        result.save(part)
        write_study(result, part / "report.html")

    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in rich_tables(study_tables(result)):
        console.print(table, "")
    for line in result.findings():
        console.print(line, highlight=False)
    console.print(f"\nresults: {folder}/results.csv, summary.csv, results.json, report.html", highlight=False, soft_wrap=True)


def _log_to(console: Console) -> None:
    """Lets PiKV's own loggers speak, in detail; those of other libraries stay as they are."""
    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False, highlighter=None)
    logger = logging.getLogger("pikv")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
