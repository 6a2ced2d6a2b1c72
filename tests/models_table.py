"""Writes the table of models in ``docs/models.md`` from what the matrix of tests found: ``make models``.

A pytest plugin: it collects the outcome of every cell of ``presses/test_matrix.py`` and, when all have run, replaces the table
between its marks.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

import transformers

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- models: written by make models -->", "<!-- end of models -->"
DTYPES = ["float32", "bfloat16", "float16"]
NAMES = {
    "llama": "Llama (grouped queries)",
    "mistral": "Mistral (without a window)",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "gemma2": "Gemma 2 (sliding layers, soft-capping)",
    "gemma3": "Gemma 3 (sliding layers)",
    "gpt_oss": "GPT-OSS (sliding layers, attention sinks)",
    "phi": "Phi (partial RoPE)",
    "phi3": "Phi-3 (window beyond its positions)",
    "mixtral": "Mixtral",
    "opt": "OPT",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "cohere": "Cohere",
    "olmo2": "OLMo2",
    "starcoder2": "StarCoder2",
    "granite": "Granite",
    "stablelm": "StableLM",
    "mistral-sliding": "Mistral with a window in every layer",
    "gptj": "GPT-J",
    "falcon": "Falcon",
    "bloom": "Bloom",
    "mamba": "Mamba",
    "llama4": "Llama 4",
    "qwen3_next": "Qwen3-Next",
    "gemma3n": "Gemma 3n",
}

_outcomes = defaultdict(Counter)


def pytest_runtest_logreport(report):
    cell = re.search(r"test_conversation\[(\w+)-(\w+)-(.+)\]$", report.nodeid)
    if cell and (report.when == "call" or report.outcome != "passed"):
        _outcomes[cell[1], cell[2]][report.outcome] += 1


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput") and _outcomes:
        text = DOCUMENT.read_text()
        before, _, rest = text.partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")


def table():
    """The table, a row a family: how many presses pass in each data type, or why the family is refused."""
    from tiny import FAMILIES, REFUSED

    lines = [
        f"| model (transformers {transformers.__version__}) | {' | '.join(DTYPES)} |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES:
        cells = [_cell(_outcomes[family, dtype]) for dtype in DTYPES]
        lines.append(f"| {NAMES[family]} | {' | '.join(cells)} |")
    for family, (_, reason) in REFUSED.items():
        said = re.sub(r"\(([^|]*)\|.*\)", r"\1", reason.partition(": ")[2]).replace(".*", " ...")
        lines.append(f"| {NAMES[family]} | refused: {said} | | |")
    return "\n".join(lines)


def _cell(outcomes):
    failed = outcomes["failed"] + outcomes["error"]
    return f"{failed} of {outcomes.total()} presses FAIL" if failed else f"{outcomes['passed']} presses"
