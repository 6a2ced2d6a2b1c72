"""Trains the bundled demo model from scratch: ``python -m pikv.models.demo.train --out DIR``.

A four-layer Llama of 0.85M parameters learns multi-needle retrieval with a curriculum of lengths, on one CPU thread
(about 40 minutes). The same seed gives the same weights on the same machine. A seed that does not form the skill is given up
early, and the next one is tried. Interrupted training goes on from its last checkpoint.
"""

import argparse
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pikv.models.demo.card import write_card
from pikv.models.demo.tokenizer import build_tokenizer
from pikv.tasks.retrieval import WORDS_PER_RECORD, make_retrieval

STAGES = (48, 96, 192, 384, 768, 1536, 2560)  # tokens of a sequence
TOKENS_PER_STEP = 2048
RECALLED_PER_QUESTION = 4  # the noun and three numbers
LEARNING_RATE = 3e-3
ADVANCE_AT = 0.8
ALIKE_SHARE = 0.8  # of the texts from the second stage on: without them the model learns to match nouns, not pairs
FIRST_NOISY_STAGE = 2
GIVE_UP_STEP, GIVE_UP_BELOW = 1500, 0.7
CHECKPOINT_EVERY = 250


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Builds the untrained demo model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        trained_context_length=2048,
    )
    return LlamaForCausalLM(config)


@dataclass
class Curriculum:
    """Which sequence length comes next: the present stage, and now and then one of the two before."""

    stage: int = 0
    accuracy: float = 0.0
    steps_in_stage: int = 0

    def choose(self, rng: random.Random) -> int:
        if self.stage and rng.random() < 0.3:
            return max(0, self.stage - rng.randint(1, 2))
        return self.stage

    def record(self, stage: int, accuracy: float) -> None:
        if stage != self.stage:
            return
        self.steps_in_stage += 1
        self.accuracy += 0.05 * (accuracy - self.accuracy)
        if self.accuracy > ADVANCE_AT and self.steps_in_stage > 50 and self.stage < len(STAGES) - 1:
            self.stage, self.accuracy, self.steps_in_stage = self.stage + 1, 0.0, 0


@dataclass
class Batch:
    """Token ids and, per token, whether it follows from a record (a question's noun, an answer) or is filler."""

    ids: list[list[int]] = field(default_factory=list)
    recalled: list[list[bool]] = field(default_factory=list)
    filler: list[list[bool]] = field(default_factory=list)


def make_batch(rng: random.Random, vocabulary: dict[str, int], stage: int) -> Batch:
    """Draws one training batch: a context, then a question for each of its records, answered."""
    batch, length = Batch(), STAGES[stage]
    for _ in range(max(1, TOKENS_PER_STEP // length)):
        num_records = max(1, int(rng.uniform(0.3, 1.0) * length / 2 / WORDS_PER_RECORD))
        sample = make_retrieval(
            rng,
            num_words=length - 1 - WORDS_PER_RECORD * num_records,
            num_records=num_records,
            noise=0.02 if stage >= FIRST_NOISY_STAGE else 0.0,
            alike=stage > 0 and rng.random() < ALIKE_SHARE,
        )
        words = ["<bos>", *sample.context.split()]
        filler = [True] * len(words)
        recalled = [False] * len(words)
        for question in sample.questions:
            start = sample.context.count(" ", 0, question.record_start) + 1
            filler[start : start + WORDS_PER_RECORD] = [False] * WORDS_PER_RECORD
            words += [*question.prompt.split(), *question.answer.split()]
            filler += [False] * WORDS_PER_RECORD
            # A question's noun follows from its adjective: the easiest thing to recall, and the first to be learned.
            recalled += [False] * 2 + [True] * RECALLED_PER_QUESTION
        batch.ids.append([vocabulary[word] for word in words])
        batch.recalled.append(recalled)
        batch.filler.append(filler)
    return batch


def loss_and_accuracy(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Cross entropy of what is recalled plus a tenth of the filler's, and the share of answers with all numbers right."""
    ids, recalled, filler = torch.tensor(batch.ids), torch.tensor(batch.recalled), torch.tensor(batch.filler)
    logits = model(ids, use_cache=False).logits[:, :-1]
    targets, recalled, filler = ids[:, 1:], recalled[:, 1:], filler[:, 1:]
    loss = cross_entropy(logits[recalled], targets[recalled])
    if filler.any():
        loss = loss + 0.1 * cross_entropy(logits[filler], targets[filler])
    right = logits[recalled].argmax(-1) == targets[recalled]
    return loss, right.view(-1, RECALLED_PER_QUESTION)[:, 1:].all(-1).float().mean().item()


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up over 100 steps, constant for half of the run, then linear down to 5%."""
    decay = max(0.0, (step - num_steps / 2) / (num_steps / 2))
    return LEARNING_RATE * min(1.0, (step + 1) / 100) * (1 - 0.95 * decay)


def train(seed: int, num_steps: int, checkpoint: Path) -> LlamaForCausalLM | None:
    """Trains one seed; returns the model, or None for a seed that does not form the skill."""
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng, curriculum, first_step = random.Random(seed), Curriculum(), 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=False)
        if state["seed"] == seed and state["num_steps"] == num_steps:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            rng.setstate(state["rng"])
            curriculum, first_step = state["curriculum"], state["step"]
            print(f"going on from step {first_step} of {checkpoint}", flush=True)
    model.train()
    started = time.perf_counter()
    for step in range(first_step, num_steps):
        if step % CHECKPOINT_EVERY == 0 and step > first_step:
            state = {"seed": seed, "num_steps": num_steps, "step": step, "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "rng": rng.getstate(), "curriculum": curriculum}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        stage = curriculum.choose(rng)
        loss, accuracy = loss_and_accuracy(model, make_batch(rng, vocabulary, stage))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curriculum.record(stage, accuracy)
        if step % 50 == 0:
            seconds = time.perf_counter() - started
            print(
                f"seed {seed} step {step:5d} {seconds:6.0f}s stage {STAGES[curriculum.stage]:5d} "
                f"exact {curriculum.accuracy:.3f} loss {loss.item():.3f}",
                flush=True,
            )
        if step == GIVE_UP_STEP and curriculum.stage == 0 and curriculum.accuracy < GIVE_UP_BELOW:
            print(f"seed {seed} did not form the skill; giving it up", flush=True)
            return None
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=1, help="first seed to try")
    parser.add_argument("--steps", type=int, default=4500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint.pt"
    started = time.perf_counter()
    seed, model = arguments.seed, None
    while (model := train(seed, arguments.steps, checkpoint)) is None:
        seed += 1
    model.config.training_seed = seed
    model.config.training_steps = arguments.steps
    model.config.training_seconds = round(time.perf_counter() - started)
    model.save_pretrained(arguments.out)
    build_tokenizer().save_pretrained(arguments.out)
    checkpoint.unlink(missing_ok=True)
    write_card(arguments.out)


if __name__ == "__main__":
    main()
