"""The bundled demo model: a small Llama that retrieves records from a text (see ``weights/README.md``)."""

from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).with_name("weights")


def load_demo() -> tuple[Any, Any]:
    """Loads the bundled model (float32, CPU, evaluation mode) and its tokenizer, offline."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(WEIGHTS)
