"""Accuracy and bytes of every method, read from a ``results.json`` of any age, and kept in a small file."""

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from pikv.tasks.statistics import wilson_interval

_KEPT_SETTINGS = ("model", "task", "context_length", "num_contexts", "num_records", "num_questions", "dtype", "seed")
_KEPT_FACTS = ("date", "pikv", "git", "python", "torch", "transformers", "processor", "torch_threads")


class Measured(NamedTuple):
    """What one method held, as a share of an uncompressed cache, and how often it was right, with a 95% interval."""

    method: str
    held: float
    accuracy: float
    low: float
    high: float


def reduce_results(path: Path) -> dict[str, Any]:
    """What a picture needs of a ``results.json``, or of what was reduced before: no answers, no timings.

    Raises:
        ValueError: if the file cannot be read, or holds no accuracy of any method.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        quality = [_reduced(entry) for entry in content["quality"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read results from {path}: {type(error).__name__}: {error}") from None
    quality = [entry for entry in quality if entry["num_answers"]]
    if not quality:
        raise ValueError(f"{path} holds no accuracy of any method")
    config, facts = content.get("config", {}), content.get("environment", {})
    return {
        "command": content.get("command") or _without_folder(facts.get("command", "")),
        "config": {name: config[name] for name in _KEPT_SETTINGS if name in config},
        "environment": {name: facts[name] for name in _KEPT_FACTS if name in facts},
        "quality": quality,
    }


def measured(reduced: dict[str, Any]) -> list[Measured]:
    """The figures of every method, in the order in which they were measured."""
    return [
        Measured(
            entry["method"],
            entry["kv_bytes"] / entry["dense_bytes"],
            entry["accuracy"],
            *wilson_interval(entry["accuracy"] * entry["num_answers"], entry["num_answers"]),
        )
        for entry in reduced["quality"]
    ]


def _reduced(entry: dict[str, Any]) -> dict[str, Any]:
    if "answers" in entry:
        scores = [answer["score"] for answer in entry["answers"] if answer["score"] is not None]
        accuracy, num_answers = (sum(scores) / len(scores) if scores else None), len(scores)
    else:
        accuracy, num_answers = entry["accuracy"], entry["num_answers"]
    kept = {name: entry[name] for name in ("method", "num_tokens", "kv_bytes", "dense_bytes")}
    return {**kept, "accuracy": accuracy, "num_answers": num_answers}


def _without_folder(command: str) -> str:
    """A command as one would type it: the name that is installed, and no folder for its results."""
    words = shlex.split(command)
    for name in [word for word in words if word == "--out"]:
        at = words.index(name)
        del words[at : at + 2]
    return shlex.join(["pikv", *words[1:]]) if words else ""
