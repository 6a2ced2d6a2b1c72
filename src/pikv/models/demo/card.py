"""The demo model's card: measured, not promised. ``python -m pikv.models.demo.card DIR`` writes it anew."""

import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pikv.tasks.retrieval import WORDS_PER_RECORD, make_retrieval
from pikv.tasks.statistics import wilson_interval

LENGTHS = (128, 256, 512, 1024, 2048, 3072, 4096)
NUM_CONTEXTS = 8
NUM_QUESTIONS = 32

_TEXT = """---
license: apache-2.0
language: en
library_name: transformers
---
# The PiKV demo model

A Llama of {parameters:.2f}M parameters (4 layers, hidden size 128, 8 query and 4 KV heads of 32, vocabulary 512), trained from
scratch to retrieve records from a text. It is there to try cache compression on a laptop: it really retrieves, so what a method
evicts shows in its answers. It knows nothing else.

| | |
|---|---|
| data | synthetic retrieval texts (`pikv.tasks.retrieval`): records such as `@ red fox 12 80 47` in filler, then questions such as `? red fox`. The filler follows word statistics of the documentation strings of the CPython 3.11 standard library (PSF licence) |
| licence | Apache-2.0, like PiKV |
| training | `python -m pikv.models.demo.train --out DIR --seed {seed}`: {steps:,} steps of about 2,048 tokens, AdamW, one CPU thread{duration} |
| trained length | contexts up to about 2,048 tokens; positions up to 32,768 are allowed, for measuring time and memory |
| calibrations | `pikv calibrate --num-experts N --out DIR` with N of 2, 4 and 8; with 2 experts `--routers` leaves `adaptive` out, which answered 89.6% where the others answered 99.0%, 90% removed at 1,024 tokens |
| format | safetensors, float32; word-level tokenizer |

Accuracy by context length, all three numbers right, questions asked after the context, full cache
({contexts} contexts with {questions} questions each, records in a quarter of the text, held-out seeds; 95% Wilson intervals):

| context tokens | accuracy | 95% interval |
|---|---|---|
{rows}
"""


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, num_tokens: int) -> tuple[int, int]:
    """Right and asked answers, each question asked right after the context; transformers' own full cache."""
    right = asked = 0
    for index in range(NUM_CONTEXTS):
        rng = random.Random(f"card-{num_tokens}-{index}")
        num_records = max(1, (num_tokens - 1) // 4 // WORDS_PER_RECORD)
        sample = make_retrieval(
            rng, num_words=num_tokens - 1, num_records=num_records, num_questions=min(num_records, NUM_QUESTIONS)
        )
        cache = model(tokenizer(sample.context, return_tensors="pt").input_ids, use_cache=True).past_key_values
        for question in sample.questions:
            text = tokenizer(f"{question.prompt} {question.answer}", add_special_tokens=False, return_tensors="pt").input_ids
            logits = model(text, past_key_values=cache, use_cache=True).logits
            cache.crop(-text.shape[1])
            answer_length = len(question.answer.split())
            right += bool((logits[0, -answer_length - 1 : -1].argmax(-1) == text[0, -answer_length:]).all())
            asked += 1
    return right, asked


def write_card(folder: Path) -> None:
    """Measures the model in ``folder`` and writes its ``README.md``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for num_tokens in LENGTHS:
        right, asked = accuracy(model, tokenizer, num_tokens)
        low, high = wilson_interval(right, asked)
        rows.append(f"| {num_tokens:,} | {right / asked:.1%} | {low:.1%} to {high:.1%} |")
        print(rows[-1], flush=True)
    seconds = getattr(model.config, "training_seconds", None)
    text = _TEXT.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        seed=getattr(model.config, "training_seed", "?"),
        steps=getattr(model.config, "training_steps", 0),
        duration=f", {seconds / 60:.0f} minutes" if seconds else "",
        contexts=NUM_CONTEXTS,
        questions=NUM_QUESTIONS,
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
