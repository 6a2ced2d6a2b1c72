"""``pikv generate``: a prompt or a file, continued from its compressed cache."""

from typing import Annotated

import typer

from pikv.cli.answering import load_seeded, sampling, say_what_was_kept
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


def generate_command(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt.")] = None,
    file: Annotated[str | None, typer.Option(metavar="PATH", help="A file with the prompt; - for standard input.")] = None,
    press: PressOption = "none",
    model: ModelOption = "demo",
    max_new_tokens: NewTokensOption = 64,
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
    """Answer or continue one prompt, from its compressed cache.

    The answer goes to standard output as it comes; what the cache holds, and the time, to standard error.

    Examples:

      pikv generate "@ red fox 12 80 47 the day was long ? red fox" --max-new-tokens 3

      pikv generate --file report.txt --press "snapkv:0.75" --model Qwen/Qwen3-0.6B

      cat report.txt | pikv generate --file - --press knorm:0.5 --chunk-size 1024 --temperature 0.7
    """
    if (prompt is None) == (file is None):
        raise ValueError("give a prompt, or a file with --file" if prompt is None else "give a prompt or --file, not both")
    text = prompt if file is None else read_text(file)
    if text is None or not text.strip():
        raise ValueError("the prompt is empty")
    hide_bars(model)
    load_libraries()
    from transformers import TextStreamer

    from pikv.generation.document import open_document
    from pikv.presses.own_failures import failures_explained
    from pikv.presses.spec import as_press

    chosen = as_press(press)
    options = sampling(temperature)
    loaded, tokenizer = load_seeded(model, device, dtype, attn_implementation, calibration, seed)
    with busy("reading the prompt"), failures_explained(press):
        document = open_document(
            loaded,
            tokenizer,
            text,
            chosen,
            chunk_size=chunk_size,
            max_new_tokens=max_new_tokens,
            options=options,
            can_be_asked=False,
            chat_template=None if chat_template else False,
            system=system,
        )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with failures_explained(press):
        answer = document.ask(max_new_tokens=max_new_tokens, streamer=streamer, options=options)
    say_what_was_kept(document, answer.seconds)
