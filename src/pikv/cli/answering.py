"""What the commands that answer share: the model they ask, and their last line."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pikv.cli.progress import busy

if TYPE_CHECKING:
    from pikv.generation.document import Document


def load_seeded(
    model: str, device: str, dtype: str, attn_implementation: str | None, calibration: Path | None, seed: int
) -> tuple[Any, Any]:
    """Loads a model with its tokenizer, and a calibration if one is named; sampling starts from ``seed``."""
    from transformers import set_seed

    from pikv.calibration.default_calibration import use_calibration
    from pikv.models.loading import load_model

    set_seed(seed)
    with busy(f"reading model {model}"):
        loaded, tokenizer = load_model(model, device, dtype, attn_implementation)
    if calibration is not None:
        use_calibration(loaded, calibration)
    return loaded, tokenizer


def sampling(temperature: float) -> dict[str, Any]:
    """The options of ``generate`` for a temperature; 0 is greedy."""
    return {"do_sample": True, "temperature": temperature} if temperature else {}


def say_what_was_kept(document: "Document", seconds: float) -> None:
    """The last line of a command that answers."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(f"{document.stats}, answered in {seconds:.2f} s", style="dim")
