"""``pikv compare``: methods side by side."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pikv.cli.progress import progress_bars
from pikv.experiments.defaults import DEFAULT_METHODS


def compare_command(
    model: Annotated[str, typer.Option(help="A hub id, a local folder, or 'demo'.")] = "demo",
    methods: Annotated[
        str, typer.Option(help="Presses with ratios, comma-separated, or all:RATIO; 'none', the full cache, is always there.")
    ] = DEFAULT_METHODS,
    context_length: Annotated[int, typer.Option(help="Tokens of the contexts that quality is measured on.")] = 1024,
    long_context_length: Annotated[int, typer.Option(help="Tokens of the longest context for time and memory.")] = 16_384,
    context: Annotated[Path | None, typer.Option(help="A text file to use instead of synthetic contexts.")] = None,
    question: Annotated[str | None, typer.Option(help="A question about your own context.")] = None,
    question_aware: Annotated[
        bool, typer.Option("--question-aware", help="Compress with the question in view, not before it is seen.")
    ] = False,
    calibration: Annotated[Path | None, typer.Option(help="What pikv calibrate wrote, if not beside the model.")] = None,
    num_contexts: Annotated[int, typer.Option(help="Contexts for quality.")] = 8,
    num_records: Annotated[int, typer.Option(help="Records hidden in each.")] = 40,
    num_questions: Annotated[int, typer.Option(help="Questions about each.")] = 24,
    num_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for every timing.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timings of every method and length.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. (default: out/compare-<time>)")] = None,
) -> None:
    """Compare methods on one model: memory, TTFT, TPOT, tokens/s, quality.

    Quality is measured at --context-length, where a context is compressed before its questions are seen; time and memory there
    and up to --long-context-length. Writes results.csv, results.json and report.html.

    Examples:

      pikv compare

      pikv compare --methods "none,duo:0.6,snapkv:0.75" --context-length 2048

      pikv compare --methods all:0.8 --long-context-length 4096

      pikv compare --model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16 --context-length 4096

      pikv compare --context report.txt --question "Who signed the contract?"
    """
    if model == "demo" or Path(model).exists():  # bars are for downloads; reading a folder takes no time
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from pikv.experiments.compare import CompareConfig, compare, prepare
    from pikv.experiments.methods import parse_methods
    from pikv.models.loading import load_model
    from pikv.report.folder import choose_folder, new_folder
    from pikv.report.html import write_html
    from pikv.report.table import improvements, rich_tables, tables

    config = CompareConfig(
        model=model,
        methods=methods,
        context_length=context_length,
        long_context_length=long_context_length,
        num_contexts=num_contexts,
        num_records=num_records,
        num_questions=num_questions,
        num_new_tokens=num_new_tokens,
        repeats=repeats,
        question_aware=question_aware,
        context=context,
        question=question,
        calibration=calibration,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    parse_methods(methods)
    folder = choose_folder(out, "compare")
    loaded, tokenizer = load_model(model, device, dtype)
    chosen, inputs = prepare(config, loaded, tokenizer)
    with new_folder(folder) as part:  # made first: better to know now that it cannot be
        with progress_bars() as progress:
            comparison = compare(config, loaded, tokenizer, chosen, inputs, progress)
        comparison.save(part)
        write_html(comparison, part / "report.html")

    console = Console(width=None if sys.stdout.isatty() else 100)
    for table in rich_tables(tables(comparison)):
        console.print(table, "")
    for line in improvements(comparison):
        console.print(line, highlight=False)
    console.print(f"\nresults: {folder}/results.csv, results.json, report.html", highlight=False, soft_wrap=True)
