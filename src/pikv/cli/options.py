"""What options of several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pikv.tasks.text_file import named, read_text_file

ModelOption = Annotated[str, typer.Option(help="A hub id, a local folder, or 'demo'.")]
PressOption = Annotated[
    str, typer.Option(metavar="SPEC", help="What compresses the cache, such as snapkv:0.75; see pikv methods.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
AttentionOption = Annotated[str | None, typer.Option(help="eager, sdpa, flash_attention_2, ... (default: the model's)")]
CalibrationOption = Annotated[Path | None, typer.Option(help="What pikv calibrate wrote, if not beside the model.")]
CalibrateOption = Annotated[
    bool, typer.Option("--calibrate", help="First train routers that need it; saved with the results. (minutes, or more)")
]
TaskOption = Annotated[
    str, typer.Option(help="What quality is measured on: retrieval, or a class in a file of your own, my_task.py:MyTask.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is drawn.")]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "--num-new-tokens", help="Tokens to answer with, at most.")]
ChunkOption = Annotated[
    int | None, typer.Option(help="Tokens to read at a time, each chunk compressed before the next. (default: all at once)")
]
TemperatureOption = Annotated[float, typer.Option(min=0, help="Draws tokens; 0 takes the most probable ones.")]
SystemOption = Annotated[str | None, typer.Option(help="The system's message, for models with a chat template.")]
ChatOption = Annotated[bool, typer.Option(help="Use the model's chat template, if it has one.")]


def folder(text: str | Path) -> Path:
    """The folder of ``--out``; an empty name, as an unset variable of a shell leaves it, is refused."""
    if not str(text).strip():
        raise typer.BadParameter("the name of the folder is empty")
    return Path(text)


def read_text(name: str) -> str:
    """A text file's text, or, for ``-``, that of standard input.

    Raises:
        ValueError: if it cannot be read, or is empty.
    """
    text = read_text_file(name)
    if not text.strip():
        raise ValueError(f"{named(name)} holds no text")
    return text


def hide_bars(model: str | None) -> None:
    """Bars are for downloads; a folder, or None for no model that is read, takes no time.

    To be called before transformers is imported.
    """
    if model in (None, "demo") or Path(model).exists():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
