"""Results with figures that are made up, for what is drawn from them."""

import math

from pikv.evaluation.methods import FULL_CACHE, Method
from pikv.evaluation.results import Answer, Measurement, Quality, Result

ENVIRONMENT = {
    "date": "2026-11-21T12:00:00+00:00",
    "command": "pikv compare --methods duo:0.5",
    "pikv": "0.1.0",
    "git": None,
    "python": "3.11.7",
    "processor": "some processor",
    "gpu": None,
}


def made_result(methods, *, lengths=(1024, 4096), num_questions=6, judged=True, notes=(), question="? red fox"):
    """A comparison in which every method answers fewer questions the less it holds."""
    held = {name: math.prod(1 - float(part.rpartition(":")[2]) for part in name.split("+")) for name in methods}
    held = {"none": 1.008, **held}
    return Result(
        name="compare",
        description="KV-cache methods on a model",
        config={"model": "demo", "context_length": 1024, "question_aware": False, "seed": 7},
        environment=ENVIRONMENT,
        methods=[FULL_CACHE, *(Method(name) for name in methods)],
        measurements=[_measurement(name, share, length) for name, share in held.items() for length in lengths],
        quality=[_quality(name, share, num_questions, judged, question) for name, share in held.items()],
        notes=list(notes),
    )


def _quality(name, held, num_questions, judged, question):
    right = round(num_questions * min(1, held**0.5))
    answers = [
        Answer(
            sample=0,
            question=f"{question} {number}",
            expected="12 80" if judged else None,
            got="12 80" if number < right else f"99 {number}",
            score=float(number < right) if judged else None,
            agreement=1.0 if number < right else 0.5,
        )
        for number in range(num_questions)
    ]
    kept = [[min(1, held * (1 + 0.2 * (head - layer))) for head in range(4)] for layer in range(4)]
    return Quality(method=name, num_tokens=1024, answers=answers, kv_bytes=4e6 * held, dense_bytes=4e6, kept=kept)


def _measurement(name, held, length):
    tokens = round(length * min(1, held))
    return Measurement(
        method=name,
        repeat=0,
        num_tokens=length,
        kept=[[held] * 4] * 4,
        kept_min=tokens,
        kept_mean=tokens,
        kept_max=tokens,
        tokens_before=16 * length,
        tokens_after=16 * tokens,
        dense_bytes=4096 * length,
        kv_bytes=int(4096 * length * held),
        kv_bytes_end=int(4096 * length * held),
        read_seconds=1e-4 * length,
        step_seconds=[1e-6 * length * held, 2e-6 * length * held],
        peak_bytes=400 << 20,
    )
