"""``pikv ask``: questions about a file, answered from its compressed cache."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from pikv.cli.answering import load_seeded, sampling, say_what_was_kept
from pikv.cli.interrupts import TerminatedError
from pikv.cli.options import (
    AttentionOption,
    CalibrationOption,
    ChatOption,
    ChunkOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    NewTokensOption,
    PressOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    hide_bars,
    read_text,
)
from pikv.cli.progress import busy, load_libraries
from pikv.tasks.text_file import check_read_once


def ask_command(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="A text file; - for standard input; none for --cache.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="May be repeated; on a terminal, without any, you are asked for them.")
    ] = None,
    questions_file: Annotated[
        Path | None,
        typer.Option(
            help="A file of questions, one a line or as JSON, - for standard input; expected answers, as pikv compare takes, "
            "are left out."
        ),
    ] = None,
    press: PressOption = "none",
    model: ModelOption = "demo",
    max_new_tokens: NewTokensOption = 64,
    save: Annotated[
        Path | None, typer.Option(help="Write the compressed cache here, to ask it tomorrow; questions may then wait.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Ask what --save wrote, instead of reading a file.")] = None,
    chunk_size: ChunkOption = None,
    calibration: CalibrationOption = None,
    chat_template: ChatOption = True,
    system: SystemOption = None,
    temperature: TemperatureOption = 0.0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    attn_implementation: AttentionOption = None,
    seed: SeedOption = 0,
) -> None:
    """Ask questions about a text that is read once, from its compressed cache.

    Answers go to standard output as they come, one after the other; what the cache holds, and the time, to standard error.

    Examples:

      pikv ask report.txt --question "Who signed?" --question "When?" --press duo:0.5 --model Qwen/Qwen3-0.6B

      pikv ask report.txt --press keydiff:0.5 --save report.cache --model Qwen/Qwen3-0.6B

      pikv ask --cache report.cache --question "Who signed?" --model Qwen/Qwen3-0.6B

      cat report.txt | pikv ask - --questions-file questions.txt --chunk-size 1024

      cat questions.txt | pikv ask report.txt --questions-file -
    """
    check_read_once(file, questions_file)
    questions = _questions(question, questions_file)
    if file is None and cache is None:
        raise ValueError("name a text file to ask, or a cache with --cache")
    can_type = file != "-" and sys.stdin is not None and sys.stdin.isatty()
    if not questions and save is None and not can_type:
        raise ValueError(
            "there is no question: give --question or --questions-file, or --save to ask later; on a terminal you are asked "
            "for them"
        )
    if save is not None:
        _check_new(save)
    text = None if file is None else read_text(file)
    hide_bars(model)
    load_libraries()
    from transformers import TextStreamer

    from pikv.generation.document import open_document
    from pikv.hf.cache import PiKVCache
    from pikv.presses.own_failures import failures_explained
    from pikv.presses.spec import as_press

    chosen = as_press(press)
    options = sampling(temperature)
    loaded, tokenizer = load_seeded(model, device, dtype, attn_implementation, calibration, seed)
    what = cache if file is None else "standard input" if file == "-" else file
    with busy(f"reading {what}"), failures_explained(press):
        document = open_document(
            loaded,
            tokenizer,
            text,
            chosen,
            questions=questions,
            cache=None if cache is None else PiKVCache.load(cache, loaded.config, loaded.device),
            chunk_size=chunk_size,
            max_new_tokens=max_new_tokens,
            options=options,
            chat_template=None if chat_template else False,
            system=system,
        )
    if save is not None:
        _check_new(save)  # reading took a while
        document.cache.save(save)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    seconds = 0.0
    for asked in questions or (_typed() if can_type else ()):
        if len(questions) > 1:
            print(f"> {asked}")
        try:
            with failures_explained(press):
                answer = document.ask(asked, max_new_tokens=max_new_tokens, streamer=streamer, options=options)
            seconds += answer.seconds
        except (KeyboardInterrupt, ValueError) as error:
            if questions or isinstance(error, TerminatedError):
                raise
            streamer.end()
            print(f"({str(error) or 'interrupted'})")
    say_what_was_kept(document, seconds)


def _check_new(path: Path) -> None:
    """Raises ValueError where no file can be made, or there is one."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: {'it is' if path.is_dir() else f'{path.parent} is not'} a folder")
    if path.exists():
        raise ValueError(f"{path} exists and is never overwritten: delete it or move it first")


def _questions(given: list[str] | None, file: Path | None) -> list[str]:
    """The questions of the command line, then those of a file, which may hold expected answers."""
    questions = list(given or ())
    if any(not question.strip() for question in questions):
        raise ValueError("a question is empty")
    if file is not None:
        from pikv.evaluation.questions import read_questions

        questions += [question.text for question in read_questions(file)]
    return questions


def _typed() -> Iterator[str]:
    """Questions as they are typed, up to an empty line."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 -- lines can be edited and called back

    print("Ask, or press Enter to end.")
    while True:
        try:
            question = input("? ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            return
        yield question
