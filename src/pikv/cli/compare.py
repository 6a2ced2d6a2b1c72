"""``pikv compare``: methods side by side."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pikv.cli import notes
from pikv.cli.options import (
    AttentionOption,
    CalibrateOption,
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    TaskOption,
    folder,
    hide_bars,
)
from pikv.cli.progress import busy, load_libraries, progress_bars, roughly
from pikv.cli.results import InterruptedRunError, keep_calibrations, publish
from pikv.evaluation.defaults import (
    DEFAULT_METHODS,
    DEFAULT_TASK,
    NUM_CONTEXTS,
    REPEATS,
    THOROUGH_NUM_CONTEXTS,
    THOROUGH_REPEATS,
)

if TYPE_CHECKING:
    from pikv.evaluation.plan import Plan


def compare_command(
    model: ModelOption = "demo",
    methods: Annotated[
        str,
        typer.Option(
            help="Presses with ratios, comma-separated, or all:RATIO; 'none', the full cache, is always there. "
            "my_press.py:MyPress:RATIO is a press in a file of your own."
        ),
    ] = DEFAULT_METHODS,
    num_experts: Annotated[
        int | None, typer.Option(help="Retention experts that routers choose among. (default: the press's own)")
    ] = None,
    task: TaskOption = DEFAULT_TASK,
    context_length: Annotated[
        int | None,
        typer.Option(help="Tokens of the contexts that quality is measured on. (default: 1024, or what fits the model)"),
    ] = None,
    long_context_length: Annotated[
        int | None,
        typer.Option(help="Tokens of the longest context for time and memory. (default: 8192, thorough 16384, or what fits)"),
    ] = None,
    context: Annotated[
        Path | None, typer.Option(help="A text file to use instead of the task's contexts; - for standard input.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="A question about your own context, may be repeated. (default: continue it)")
    ] = None,
    questions_file: Annotated[
        Path | None,
        typer.Option(
            help="A file of questions, one a line, with the expected answer after a tab or as JSON if it is known; - for "
            "standard input."
        ),
    ] = None,
    question_aware: Annotated[
        bool, typer.Option("--question-aware", help="Compress with the question in view, not before it is seen.")
    ] = False,
    calibration: CalibrationOption = None,
    calibrate: CalibrateOption = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Twice the contexts and the longest length, and one more timing of everything.")
    ] = False,
    num_contexts: Annotated[
        int | None, typer.Option(help=f"Contexts for quality. (default: {NUM_CONTEXTS}, thorough {THOROUGH_NUM_CONTEXTS})")
    ] = None,
    num_records: Annotated[int, typer.Option(help="Records hidden in each.")] = 40,
    num_questions: Annotated[int, typer.Option(help="Questions about each.")] = 24,
    num_new_tokens: Annotated[
        int, typer.Option("--num-new-tokens", "--max-new-tokens", help="Tokens to generate for every timing.")
    ] = 32,
    repeats: Annotated[
        int | None, typer.Option(help=f"Timings of every method and length. (default: {REPEATS}, thorough {THOROUGH_REPEATS})")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    attn_implementation: AttentionOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 0,
    out: Annotated[
        Path | None, typer.Option(parser=folder, metavar="PATH", help="Folder for the results. (default: out/compare-<time>)")
    ] = None,
) -> None:
    """Compare methods on one model: memory, TTFT, TPOT, tokens/s, quality.

    Quality is measured at --context-length, where a context is compressed before its questions are seen; time and memory there
    and up to --long-context-length. How long it takes is said first; Ctrl-C saves what is finished. Writes results.csv,
    results.json and report.html.

    Examples:

      pikv compare

      pikv compare --methods "none,duo:0.6,snapkv:0.75" --context-length 2048

      pikv compare --methods all:0.8 --long-context-length 4096

      pikv compare --model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16 --context-length 4096

      pikv compare --context report.txt --question "Who signed the contract?" --question "When?"

      pikv compare --context report.txt --questions-file questions.txt --model ./my-model
    """
    hide_bars(model)
    load_libraries()
    from pikv.evaluation.compare import CompareConfig, compare, prepare
    from pikv.evaluation.costs import total_seconds, try_costs
    from pikv.evaluation.notes import notes_before
    from pikv.evaluation.report.compare import compare_tables, improvements, write_compare
    from pikv.evaluation.report.folder import choose_folder
    from pikv.evaluation.summary import summary_frame
    from pikv.models.loading import load_model

    config = CompareConfig(
        model=model,
        methods=methods,
        num_experts=num_experts,
        task=task,
        context_length=context_length,
        long_context_length=long_context_length,
        num_contexts=_default(num_contexts, THOROUGH_NUM_CONTEXTS if thorough else NUM_CONTEXTS),
        num_records=num_records,
        num_questions=num_questions,
        num_new_tokens=num_new_tokens,
        repeats=_default(repeats, THOROUGH_REPEATS if thorough else REPEATS),
        thorough=thorough,
        question_aware=question_aware,
        context=context,
        questions=tuple(question or ()),
        questions_file=questions_file,
        calibration=calibration,
        calibrate=calibrate,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        seed=seed,
    )
    config.check()
    results = choose_folder(out, "compare")
    files = ["results.csv", "results.json", "report.html"]
    with busy(f"reading model {model}"):
        loaded, tokenizer = load_model(model, device, dtype, attn_implementation)
    if calibrate:
        with progress_bars() as progress:
            config, plan = prepare(config, loaded, tokenizer, progress, keep_calibrations(results, files))
    else:
        with busy("checking every method"):
            config, plan = prepare(config, loaded, tokenizer)
    for note in notes_before(plan):
        notes.show(note)
    with busy("trying every method for a moment"):
        costs = try_costs(plan)
    _announce(plan, total_seconds(plan, costs))
    with progress_bars() as progress:
        result = compare(config, plan, progress, costs)
    result = replace(result, notes=list(dict.fromkeys([*result.notes, *notes.shown])))

    def write(part: Path) -> None:
        result.save(part, {"results": summary_frame(result)})
        write_compare(result, part / "report.html")

    publish(
        results,
        write,
        files,
        tables=lambda: compare_tables(result),
        lines=lambda: [*improvements(result), *(f"note: {note}" for note in result.notes if note not in notes.shown)],
    )
    if result.was_interrupted:
        raise InterruptedRunError(f"what was finished is in {results}")


def _default(asked: int | None, otherwise: int) -> int:
    return otherwise if asked is None else asked


def _announce(plan: "Plan", seconds: float) -> None:
    """Says what is going to be done, and how long that takes."""
    lengths = sorted({batch.num_tokens for batch in plan.batches})
    *most, last = (f"{length:,}" for length in lengths)
    asked = "" if plan.questions is None else _counted(plan.questions.num_questions, "question")
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(
        f"About {roughly(seconds)}: {_counted(len(plan.methods), 'method')}, {asked} to each, time and memory at "
        f"{' and '.join([*([', '.join(most)] if most else []), last])} tokens. Ctrl-C saves what is finished.",
        soft_wrap=not console.is_terminal,
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
