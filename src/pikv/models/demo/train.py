"""Trains the bundled demo model from scratch: ``python -m pikv.models.demo.train --out DIR``.

A four-layer Llama of 0.85M parameters learns multi-needle retrieval with a curriculum of lengths, on one CPU thread, in two
phases: in the first it learns to recall what followed a noun, in the second, where names are more alike, what followed an
adjective and a noun. The same seed gives the same weights on the same machine. A seed that does not form the skill is given
up early, and the next one is tried. Interrupted training goes on from its last checkpoint.

``--sibling`` trains another model with the same skill, quickly: it keeps the bundled model's embeddings and first layer, starts
all other layers anew from the seed, and goes through the second phase only, on other texts. Other heads come to retrieve.
"""

import argparse
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pikv.models.demo import load_demo
from pikv.models.demo.card import write_card
from pikv.models.demo.tokenizer import build_tokenizer
from pikv.tasks.retrieval import WORDS_PER_RECORD, make_retrieval

STAGES = (48, 96, 192, 384, 768, 1536, 2560)  # tokens of a sequence
TOKENS_PER_STEP = 2048
RECALLED_PER_QUESTION = 4  # the noun and three numbers
LEARNING_RATE = 3e-3
ADVANCE_AT = 0.8
FIRST_NOISY_STAGE = 2
GIVE_UP_STEP = 1500
CHECKPOINT_EVERY = 250


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A curriculum from its first stage, with an optimizer of its own.

    In an ``alike_share`` of the texts names are drawn from few words, with or without more pairs of them than records.
    """

    num_steps: int
    alike_share: float
    has_spare_pairs: bool
    decays: bool

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over 100 steps, then constant, or constant for half of the phase and linear down to 5%."""
        decay = max(0.0, (step - self.num_steps / 2) / (self.num_steps / 2)) if self.decays else 0.0
        return LEARNING_RATE * min(1.0, (step + 1) / 100) * (1 - 0.95 * decay)


PHASES = (
    Phase(num_steps=2250, alike_share=0.5, has_spare_pairs=True, decays=False),
    Phase(num_steps=2200, alike_share=0.8, has_spare_pairs=False, decays=True),
)


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


def make_batch(rng: random.Random, vocabulary: dict[str, int], stage: int, phase: Phase) -> Batch:
    """Draws one training batch: a context, then a question for each of its records, answered."""
    batch, length = Batch(), STAGES[stage]
    for _ in range(max(1, TOKENS_PER_STEP // length)):
        num_records = max(1, int(rng.uniform(0.3, 1.0) * length / 2 / WORDS_PER_RECORD))
        num_pairs = 2 * num_records + 1 if phase.has_spare_pairs else num_records
        sample = make_retrieval(
            rng,
            num_words=length - 1 - WORDS_PER_RECORD * num_records,
            num_records=num_records,
            noise=0.02 if stage >= FIRST_NOISY_STAGE else 0.0,
            num_pairs=num_pairs if rng.random() < phase.alike_share else None,
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


def build_sibling(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Builds a model with the bundled one's embeddings and first layer; all other layers are untrained."""
    model = build_model(tokenizer, seed)
    bundled = load_demo()[0].state_dict()
    kept = {name: weights for name, weights in bundled.items() if ".layers." not in name or ".layers.0." in name}
    model.load_state_dict(kept, strict=False)
    return model


def train(seed: int, checkpoint: Path, is_sibling: bool = False) -> LlamaForCausalLM | None:
    """Trains one seed through all phases; returns the model, or None for a seed that does not form the skill."""
    tokenizer = build_tokenizer()
    model = build_sibling(tokenizer, seed) if is_sibling else build_model(tokenizer, seed)
    state: dict[str, Any] = torch.load(checkpoint, weights_only=False) if checkpoint.exists() else {}
    if state.get("seed") != seed:
        state = {}
    for index, phase in enumerate(PHASES):
        if index < max(state.get("phase", 0), is_sibling):
            continue
        run = PhaseRun(model, phase, tokenizer.get_vocab(), seed)
        if state.get("phase") == index:
            run.load(state)
            print(f"going on from phase {index + 1}, step {run.step}", flush=True)
        while run.step < phase.num_steps:
            if run.step % CHECKPOINT_EVERY == 0:
                part = checkpoint.with_suffix(".part")
                torch.save({"seed": seed, "phase": index, **run.state()}, part)
                part.replace(checkpoint)
            run.take_step()
            if index == 0 and run.step == GIVE_UP_STEP and run.curriculum.stage == 0:
                print(f"seed {seed} did not form the skill; giving it up", flush=True)
                return None
    return model.eval()


class PhaseRun:
    """One phase under way: everything that changes from step to step."""

    def __init__(self, model: LlamaForCausalLM, phase: Phase, vocabulary: dict[str, int], seed: int) -> None:
        self.model, self.phase, self.vocabulary, self.seed = model.train(), phase, vocabulary, seed
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self.rng, self.curriculum, self.step = random.Random(seed), Curriculum(), 0
        self.started = time.perf_counter()

    def take_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.phase.learning_rate(self.step)
        stage = self.curriculum.choose(self.rng)
        loss, accuracy = loss_and_accuracy(self.model, make_batch(self.rng, self.vocabulary, stage, self.phase))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.curriculum.record(stage, accuracy)
        if self.step % 50 == 0:
            print(
                f"seed {self.seed} step {self.step:5d} {time.perf_counter() - self.started:6.0f}s "
                f"stage {STAGES[self.curriculum.stage]:5d} exact {self.curriculum.accuracy:.3f} loss {loss.item():.3f}",
                flush=True,
            )
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.getstate(),
            "curriculum": asdict(self.curriculum),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.setstate(state["rng"])
        self.curriculum = Curriculum(**state["curriculum"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=1, help="first seed to try")
    parser.add_argument("--sibling", action="store_true", help="start from the bundled model's embeddings and first layer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint.pt"
    started = time.perf_counter()
    seed = arguments.seed
    while (model := train(seed, checkpoint, arguments.sibling)) is None:
        seed += 1
    model.config.training_seed = seed
    model.config.training_steps = sum(phase.num_steps for phase in PHASES[arguments.sibling :])
    model.config.training_seconds = round(time.perf_counter() - started)
    model.save_pretrained(arguments.out)
    build_tokenizer().save_pretrained(arguments.out)
    checkpoint.unlink(missing_ok=True)
    write_card(arguments.out)


if __name__ == "__main__":
    main()
