"""``pikv experiment``: the studies of routers and presses."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from pikv.cli import notes
from pikv.cli.options import (
    AttentionOption,
    CalibrateOption,
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    TaskOption,
    folder,
    hide_bars,
)
from pikv.cli.progress import busy, load_libraries, progress_bars
from pikv.cli.results import InterruptedRunError, keep_calibrations, publish
from pikv.evaluation.defaults import DEFAULT_TASK
from pikv.router_defaults import CAPACITY_FACTOR, NUM_EXPERTS


def experiment_command(
    study: Annotated[
        str, typer.Argument(help="routers, presses, combos, sensitivity, experts, benchmark, eplb_duo, calibration or mix.")
    ],
    data: Annotated[str | None, typer.Option(help="random, or demo: texts with answers. (default: the study's)")] = None,
    model: Annotated[
        str | None, typer.Option(help="random, demo, a hub id or a local folder. (default: the data set's)")
    ] = None,
    calibration: CalibrationOption = None,
    calibrate: CalibrateOption = False,
    batch_size: Annotated[int, typer.Option(help="Sequences that are read together.")] = 2,
    num_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of each. (default: random 100, demo 1024, or what fits the model)"),
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Batches to measure on. (default: the study's, mostly 5)")] = None,
    passes: Annotated[int, typer.Option(help="Times to read each batch; the fastest counts.")] = 3,
    num_experts: Annotated[int, typer.Option(help="Retention experts that routers choose among.")] = NUM_EXPERTS,
    top_k: Annotated[
        int | None, typer.Option(help="Experts that a token goes to. (default: 2, or 1 if there is but one)")
    ] = None,
    capacity_factor: Annotated[
        float, typer.Option(help="Capacity of an expert, over its even share of the tokens.")
    ] = CAPACITY_FACTOR,
    cache_aware: Annotated[bool, typer.Option(help="Let the pikv router prefer experts whose tokens were read.")] = True,
    own_amounts: Annotated[
        bool, typer.Option("--own-amounts", help="Let each expert of 'experts' keep its own amount, not the same.")
    ] = False,
    num_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--num-new-tokens",
            "--max-new-tokens",
            help="Tokens to generate after each reading. (default: the study's, mostly 0)",
        ),
    ] = None,
    task: TaskOption = DEFAULT_TASK,
    num_contexts: Annotated[int, typer.Option(help="Contexts for quality, where answers are known.")] = 8,
    num_records: Annotated[int, typer.Option(help="Records hidden in each.")] = 40,
    num_questions: Annotated[int, typer.Option(help="Questions about each.")] = 24,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    attn_implementation: AttentionOption = None,
    hidden_size: Annotated[int, typer.Option(help="Hidden size of the random model, which has 8 heads.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the random model and of all data.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Log what every press decided in every layer.")] = False,
    out: Annotated[
        Path | None, typer.Option(parser=folder, metavar="PATH", help="Folder for the results. (default: out/STUDY-<time>)")
    ] = None,
) -> None:
    """Study routers and presses: compression, time, memory and quality, with mean and standard deviation.

    routers compares all routers at one ratio, presses single presses, combos combinations of them, sensitivity one press at
    rising ratios, experts every retention expert alone, benchmark single presses and a combination more often, eplb_duo
    EPLB routing with DuoAttention, DuoAttention and no compression in pairs, calibration trained routers beside all that they
    have to be better than, mix how much to evict and how much to quantise at equal bytes.
    Ctrl-C saves what is finished. Writes results.csv (every run), summary.csv, results.json and report.html.

    Examples:

      pikv experiment routers

      pikv experiment combos --data demo

      pikv experiment eplb_duo --num-tokens 8192

      pikv experiment experts --own-amounts

      pikv experiment sensitivity --num-tokens 2000 --repeats 10

      pikv experiment experts --batch-size 1 --debug

      pikv experiment benchmark --model Qwen/Qwen3-0.6B --data demo --device cuda --dtype bfloat16
    """
    hide_bars(None if model == "random" else model)
    load_libraries()
    from pikv.evaluation.report.folder import choose_folder
    from pikv.evaluation.report.study import study_tables, write_study
    from pikv.evaluation.studies.registry import get_study
    from pikv.evaluation.studies.run import StudyConfig, prepare, run_study
    from pikv.evaluation.summary import measurements_frame, summary_frame

    chosen = get_study(study)
    config = StudyConfig(
        data=data,
        model=model,
        calibration=calibration,
        calibrate=calibrate,
        batch_size=batch_size,
        num_tokens=num_tokens,
        repeats=repeats,
        passes=passes,
        num_new_tokens=num_new_tokens,
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=capacity_factor,
        cache_aware=cache_aware,
        own_amounts=own_amounts,
        task=task,
        num_contexts=num_contexts,
        num_records=num_records,
        num_questions=num_questions,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        hidden_size=hidden_size,
        seed=seed,
    )
    results = choose_folder(out, study)
    files = ["results.csv", "summary.csv", "results.json", "report.html"]
    messages = Console(stderr=True, emoji=False)
    if debug:
        _log_to(messages)
    with progress_bars(messages) as progress:
        with nullcontext() if calibrate else busy("reading the model"):
            plan, inputs = prepare(chosen, config, progress, keep_calibrations(results, files))
        result = run_study(chosen, config, plan, inputs, progress)
    result = replace(result, notes=[*result.notes, *notes.shown])

    def write(part: Path) -> None:
        result.save(part, {"results": measurements_frame(result), "summary": summary_frame(result)})
        write_study(result, part / "report.html")

    publish(
        results,
        write,
        files,
        tables=lambda: study_tables(result),
        lines=lambda: [*result.highlights, *(f"note: {note}" for note in result.notes if note not in notes.shown)],
        expected=[] if result.expected is None else [result.expected],
    )
    if result.was_interrupted:
        raise InterruptedRunError(f"what was finished is in {results}")


def _log_to(console: Console) -> None:
    """Lets PiKV's own loggers speak, in detail; those of other libraries stay as they are."""
    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False, highlighter=None)
    logger = logging.getLogger("pikv")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
