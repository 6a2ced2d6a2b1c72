"""Plays a conversation on a real cache, and holds what happens against the transcript."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache as cached
from pathlib import Path
from random import Random
from typing import Any

import torch
from abuses import attempt
from grammar import NAMESPACE, moves_keys
from plan import Conversation, Operation
from torch import Tensor
from transcript import Broken, Transcript, require

import pikv
from calibrated import random_calibration
from pikv import PiKVCache
from pikv.routing import use_calibration
from tiny import build

# Whether forward passes are interrupted, and refusals in the middle of one must leave the cache usable.
INTERRUPTIONS = False
MAX_COLUMNS = 200
MAX_BATCH_SIZE = 6
VOCABULARY = 512  # so many different words that keys of a context do not tie
_FEW_WORDS = 3
_PACKAGE = Path(pikv.__file__).parent


class Unusable(Exception):
    """The cache was left unusable, as is known of it (see ``INTERRUPTIONS``): the conversation is over."""


@cached
def model_of(family: str) -> Any:
    # With all experts asked, rounding sends no token to another one.
    settings = {"num_experts_per_tok": 4} if family in ("mixtral", "gpt_oss") else {}
    model = build(family, vocab_size=VOCABULARY, **settings)
    use_calibration(model, random_calibration(model))
    return model


def can_be_pickled() -> bool:
    try:
        pickle.loads(pickle.dumps(PiKVCache(model_of("llama").config)))
    except (TypeError, AttributeError, pickle.PicklingError):
        return False
    return True


def can_carry_a_press() -> bool:
    return "press" in inspect.signature(PiKVCache.__init__).parameters


def is_clear(error: BaseException) -> bool:
    """Whether an error is one line that this package says on purpose."""
    if type(error) is not ValueError:
        return False
    frames = traceback.extract_tb(error.__traceback__)
    own = Path(frames[-1].filename).is_relative_to(_PACKAGE)
    return own and 0 < len(str(error)) < 1000 and "\n" not in str(error)


class Player:
    """One cache, its transcript, and the presses; ``only`` plays one sequence of the batch alone."""

    def __init__(self, conversation: Conversation, only: int | None = None) -> None:
        self.conversation = conversation
        self.only = only
        self.model = model_of(conversation.family)
        self.refusals: Counter[str] = Counter()
        self.num_layers = len(PiKVCache(self.model.config).ragged_layers)
        self.presses = [self._build(press) for press in conversation.presses]
        self.evicted: list[Counter[int]] = [Counter() for _ in self.presses]
        self.moved = 0  # how often the text goes on elsewhere, so that it does not repeat what was taken back
        self.marks: list[tuple[Any, Transcript]] = []
        self.cache = self._new_cache()
        self.truth = self._new_truth()

    def _build(self, expression: str) -> Any:
        """A press, or None where the expression is refused."""
        try:
            return eval(expression, {**NAMESPACE, "NUM_LAYERS": self.num_layers})
        except ValueError as error:
            self._refused(error)
            return None

    def _new_cache(self) -> PiKVCache:
        if self.conversation.carries and self.presses[0] is not None:
            return PiKVCache(self.model.config, press=self.presses[0])
        return PiKVCache(self.model.config)

    def _new_truth(self) -> Transcript:
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = self.conversation.batch_size if self.only is None else 1
        return Transcript(size, list(self.cache.ragged_layers), heads)

    def play(self, operation: Operation) -> None:
        """Carries one operation out.

        Raises:
            Broken: if a property does not hold.
            Unusable: if it makes no sense to go on.
            Exception: whatever is no clear error.
        """
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(self, operation.kind)(Random(operation.seed), **operation.options)
            self._check()

    def finish(self) -> None:
        """A last step, and all logits so far."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.truth.columns:
                self.decode(Random(0), steps=1, padding=False, press=None)
            self.truth.compare(self.model)
        hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in self.model.modules())
        require(hooks == 0, f"{hooks} hooks were left on the model")

    # What a conversation is made of.

    def turn(
        self,
        rng: Random,
        columns: int,
        padding: str,
        press: int | None,
        how: str,
        chunk_size: int | None,
        outer: int | None = None,
    ) -> None:
        ids, mask = self._text(rng, columns, padding)
        if self.truth.columns + columns > MAX_COLUMNS:
            return
        whole = torch.cat([self.truth.mask, mask], 1)
        with_mask, with_positions, in_bools = (
            not bool(whole.all()) or rng.random() < 0.5,
            rng.random() < 0.5,
            rng.random() < 0.2,
        )
        self._with_press(
            press,
            lambda: self._read(ids, whole, how, chunk_size, press, with_mask, with_positions, in_bools),
            outer=outer,
            own=how != "prefill",
        )

    def _read(
        self,
        ids: Tensor,
        whole: Tensor,
        how: str,
        chunk_size: int | None,
        press: int | None,
        with_mask: bool,
        with_positions: bool,
        in_bools: bool = False,
    ) -> None:
        """Reads new columns ``ids``; ``whole`` is the mask of all."""
        first = whole.shape[1] - ids.shape[1]
        given = whole.bool() if in_bools else whole
        if how == "prefill":
            mask = given if with_mask else None
            used = None if press is None or self._is_carried else self.presses[press]
            last = pikv.prefill(self.model, ids, self.cache, used, chunk_size=chunk_size, attention_mask=mask)
            require(last.shape == (ids.shape[0], VOCABULARY), f"prefill returned {tuple(last.shape)}")
            return
        size = chunk_size or ids.shape[1]
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        for start in range(0, ids.shape[1], size):
            stop = min(start + size, ids.shape[1])
            further = {"attention_mask": given[:, : first + stop]} if with_mask else {}
            if with_positions or with_mask:
                further["position_ids"] = positions[:, first + start : first + stop]
            self.model(ids[:, start:stop], past_key_values=self.cache, **further)

    def decode(self, rng: Random, steps: int, padding: bool, press: int | None) -> None:
        if not self.truth.columns or self.truth.columns + steps > MAX_COLUMNS + 40:
            return

        def run() -> None:
            for _ in range(steps):
                ids, mask = self._text(rng, 1, "some" if padding else "none")
                whole = torch.cat([self.truth.mask, mask], 1)
                with_mask = not bool(whole.all()) or rng.random() < 0.5
                self._read(ids, whole, "whole", None, press, with_mask, rng.random() < 0.5)

        self._with_press(press, run)

    def generate(self, rng: Random, columns: int, padding: str, steps: int, press: int | None) -> None:
        ids, mask = self._text(rng, columns, padding)
        if self.truth.columns + columns + steps > MAX_COLUMNS:
            return
        ids, mask = torch.cat([self.truth.ids, ids], 1), torch.cat([self.truth.mask, mask], 1)
        options = dict(max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)

        def run() -> None:
            found = self.model.generate(ids, attention_mask=mask, past_key_values=self.cache, **options)
            require(found.shape[1] == ids.shape[1] + steps, f"{found.shape[1] - ids.shape[1]} tokens generated, not {steps}")
            require(bool((found[:, : self.truth.columns] == self.truth.ids).all()), "the model was given other tokens")

        self._with_press(press, run)

    def crop(self, rng: Random, columns: int, from_end: bool) -> None:
        columns = min(columns, self.truth.columns)
        left = self.truth.columns - columns
        if not left:
            return
        if self._asks(lambda: self.cache.crop(-columns if from_end else left)):
            self.truth.crop(left)
            self.moved += 1

    def mark(self, rng: Random) -> None:
        self.marks.append((self.cache.mark(), self.truth.copy()))

    def rewind(self, rng: Random, mark: int) -> None:
        if not self.marks:
            return
        mark, before = self.marks[mark % len(self.marks)]
        if self._asks(lambda: self.cache.rewind(mark)):
            moved = self.truth.keys_moved
            self.truth = before.copy()
            self.truth.keys_moved |= moved
            self.moved += 1

    def reset(self, rng: Random) -> None:
        self.cache.reset()
        self.truth = self._new_truth() if len(self.truth.sequences) == self._new_truth().ids.shape[0] else self.truth
        if self.truth.columns:
            raise Unusable("reset to another batch size")
        self.marks.clear()

    def save_and_load(self, rng: Random) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            if not self._asks(lambda: self.cache.save(path)):
                require(not self.truth.columns, "a cache that holds something cannot be saved")
                return
            loaded = PiKVCache.load(path, self.model.config)
        before, nbytes = self.cache, self.cache.nbytes
        require(loaded.nbytes <= nbytes, f"{loaded.nbytes} bytes loaded, {nbytes} saved")
        if rng.random() < 0.7:
            self._replace_cache(loaded)
        else:
            self.truth.copy().observe(loaded, may_evict=False)
            require(self.cache is before, "saving replaced the cache")

    def copy(self, rng: Random) -> None:
        self._replace_cache(copy.deepcopy(self.cache))

    def pickle(self, rng: Random) -> None:
        self._replace_cache(pickle.loads(pickle.dumps(self.cache)))

    def detour(self, rng: Random, columns: int, padding: str, press: int | None, how: str, chunk_size: int | None) -> None:
        """A copy goes another way; the cache must not notice."""
        with self._aside(copy.deepcopy(self.cache)):
            self.turn(rng, columns, padding, press, how, chunk_size)
            self.decode(rng, 2, False, None)
            self.truth.compare(self.model)

    def select(self, rng: Random) -> None:
        size = len(self.truth.sequences)
        indices = [rng.randrange(size) for _ in range(rng.randint(1, min(size + 1, MAX_BATCH_SIZE)))]
        if not self.truth.columns:
            return
        chosen = self.cache.select(indices if rng.random() < 0.5 else torch.tensor(indices))
        self.truth.observe(self.cache, may_evict=False)
        self._replace_cache(chosen, self.truth.select(indices))

    def repeat(self, rng: Random, times: int) -> None:
        size = len(self.truth.sequences)
        if not self.truth.columns or size * times > MAX_BATCH_SIZE:
            return
        repeated = self.cache.repeat(times)
        self._replace_cache(repeated, self.truth.select([b for b in range(size) for _ in range(times)]))

    def concat(self, rng: Random, columns: int, padding: str, press: int | None) -> None:
        """What a copy of some sequences became on a way of its own comes back beside the others."""
        size = len(self.truth.sequences)
        indices = [rng.randrange(size) for _ in range(rng.randint(1, 2))]
        if not self.truth.columns or size + len(indices) > MAX_BATCH_SIZE:
            return
        with self._aside(self.cache.select(indices), self.truth.select(indices)):
            self.turn(rng, columns, padding, press, "whole", None)
            other, other_truth = self.cache, self.truth
        if rng.random() < 0.5:
            joined, truth = PiKVCache.concat([self.cache, other]), self.truth.joined(other_truth)
        else:
            joined, truth = PiKVCache.concat([other, self.cache]), other_truth.joined(self.truth)
        if hasattr(joined, "attention_mask"):
            require(torch.equal(joined.attention_mask().long(), truth.mask), "attention_mask() is not what was read")
        self._replace_cache(joined, truth)

    def interrupt(self, rng: Random, columns: int, padding: str, press: int | None, layer: int) -> None:
        """Ctrl-C while a layer is computed: the pass counts as a whole or not at all."""
        ids, mask = self._text(rng, columns, padding)
        if self.truth.columns + columns > MAX_COLUMNS:
            return

        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None) or decoder.h
        hook = layers[layer].register_forward_hook(stop)
        whole = torch.cat([self.truth.mask, mask], 1)
        with suppress(KeyboardInterrupt):
            try:
                self._with_press(press, lambda: self._read(ids, whole, "whole", None, press, True, True))
            finally:
                hook.remove()
        may_evict = press is not None or self._is_carried
        if self.cache.get_seq_length() == self.truth.columns + columns:
            self.truth.read(ids, mask)
        self.truth.keys_moved |= press is not None and moves_keys(self.conversation.presses[press])
        self.truth.observe(self.cache, may_evict)
        self._forget_stats()

    def compare(self, rng: Random) -> None:
        self.truth.compare(self.model)

    def abuse(self, rng: Random, how: str) -> None:
        """Something wrong, which must be refused in one line and change nothing."""
        try:
            attempt(how, self.model, self.cache, self.truth)
        except (ValueError, RuntimeError) as error:
            documented = isinstance(error, RuntimeError) and str(error).startswith("PiKVCache needs")
            if not is_clear(error) and not documented:
                raise
            self._refused(error)
        self._check_usable()

    # How it is carried out.

    @property
    def _is_carried(self) -> bool:
        return self.conversation.carries and self.presses[0] is not None

    def _text(self, rng: Random, columns: int, padding: str) -> tuple[Tensor, Tensor]:
        """New columns: ids and mask ``[B, columns]``, the same for a sequence in a batch and alone."""
        size = self.conversation.batch_size if self.only is not None else len(self.truth.sequences)
        first = self.truth.columns + 41 * self.moved
        words = _FEW_WORDS if self.conversation.repeats else VOCABULARY - 4
        ids = torch.zeros((size, columns), dtype=torch.long)
        for b in range(size):
            order = Random(1000 * self.conversation.seed + b).sample(range(4, VOCABULARY), words)
            ids[b] = torch.tensor([order[(first + column) % words] for column in range(columns)])
        mask = torch.ones_like(ids)
        for b in range(size):
            left, right = rng.randrange(columns), rng.randrange(columns)
            if padding in ("left", "both"):
                mask[b, :left] = 0
            if padding in ("right", "both"):
                mask[b, columns - right :] = 0
            if padding == "inside":
                mask[b] = torch.tensor([int(rng.random() < 0.7) for _ in range(columns)])
            if padding == "some":
                mask[b] = int(rng.random() < 0.6)
        if padding == "empty":
            mask[rng.randrange(size)] = 0
        keep = slice(None) if self.only is None else slice(self.only, self.only + 1)
        return (ids * mask)[keep], mask[keep]

    def _with_press(self, press: int | None, run: Any, outer: int | None = None, own: bool = True) -> None:
        """Runs forward passes under a press; every one of them goes into the transcript, and a refusal changes nothing."""
        if self._is_carried:
            press, outer = 0, None
        used = None if press is None else self.presses[press]
        if press is not None and used is None:
            return  # it could not be built
        around = None if outer is None else self.presses[outer]
        untouched = around.get_stats() if around is not None and outer != press else None
        try:
            with ExitStack() as stack:
                if around is not None and used is not None:
                    stack.enter_context(around(self.model))
                if used is not None and own and not self._is_carried:
                    stack.enter_context(used(self.model))
                stack.enter_context(self._following(press))
                run()
        except (ValueError, RuntimeError) as error:
            if not is_clear(error):
                raise
            self._refused(error)
            self._forget_stats()
            self.truth.keys_moved |= press is not None and moves_keys(self.conversation.presses[press])
            self._check_usable(press is not None)
        if used is not None and untouched is not None:
            require(around.get_stats() == untouched, "a press around the one at work counted what that did")

    @contextmanager
    def _following(self, press: int | None) -> Iterator[None]:
        """Enters every forward pass of the cache into the transcript."""
        text = "" if press is None else self.conversation.presses[press]
        depth = 0  # a press may read again within a pass

        def enter(*args: Any) -> None:
            nonlocal depth
            depth += 1

        def leave(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth or kwargs.get("past_key_values") is not self.cache:
                return
            ids, mask = args[0] if args else kwargs["input_ids"], kwargs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :].long()
            self.truth.read(ids, mask)
            logits = output.logits
            if logits.shape[1] == ids.shape[1] or bool(mask[:, -1].all()):
                self.truth.answered(logits)
            acts = press is not None and (ids.shape[1] > 1 or "DecodingPress" in text)
            self.truth.keys_moved |= acts and moves_keys(text)
            evicted = self.truth.observe(self.cache, may_evict=acts)
            if press is not None:
                self.evicted[press].update(evicted)
                self._check_stats(press)

        hooks = [
            self.model.register_forward_pre_hook(enter, prepend=True),
            self.model.register_forward_hook(leave, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _check_stats(self, press: int) -> None:
        stats = self.presses[press].get_stats()
        for layer, num_evicted in self.evicted[press].items():
            found = stats["layer_stats"].get(layer, {"num_given": 0, "num_kept": 0})
            counted = found["num_given"] - found["num_kept"]
            require(counted == num_evicted, f"statistics say {counted} tokens of layer {layer} were evicted, not {num_evicted}")

    def _forget_stats(self) -> None:
        for press in self.presses:
            if press is not None:
                press.reset_stats()
        self.evicted = [Counter() for _ in self.presses]

    def _asks(self, call: Any) -> bool:
        """Whether a call was not refused."""
        try:
            call()
        except ValueError as error:
            if not is_clear(error):
                raise
            self._refused(error)
            self._check_usable()
            return False
        return True

    def _refused(self, error: BaseException) -> None:
        message = re.sub(r"\w+Press\(.*\)", "<press>", re.sub(r"/[\w/.#-]+", "<path>", str(error)))
        self.refusals[re.sub(r"\d+(\.\d+)?", "#", message)[:110]] += 1

    def _check_usable(self, may_have_evicted: bool = False) -> None:
        """After a refusal all layers must stand where they stood."""
        columns = {layer.get_seq_length() for layer in self.cache.layers}
        if columns != {self.truth.columns} and not INTERRUPTIONS:
            raise Unusable("a refusal left layers that have seen different numbers of tokens")
        require(
            columns == {self.truth.columns}, f"after a refusal layers have seen {sorted(columns)}, not {self.truth.columns}"
        )
        self.truth.observe(self.cache, may_have_evicted)

    def _check(self) -> None:
        """What always holds."""
        self.truth.observe(self.cache, may_evict=False)
        config = self.model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if not self.truth.columns:
            return
        ragged = self.cache.ragged_layers
        kept = sum(int(self.cache.lengths(layer).sum()) for layer in ragged)
        require(self.cache.nbytes >= 2 * 4 * size * kept, f"{self.cache.nbytes} bytes hold {kept} tokens of {size} numbers")
        seen = sum(sequence.seen for sequence in self.truth.sequences)
        heads = len(next(iter(self.truth.sequences[0].died.values())))
        dense = 2 * 4 * size * heads * seen * len(ragged)
        sliding = sum(layer.nbytes for layer in self.cache.layers if layer.is_sliding)
        require(self.cache.dense_nbytes == dense + sliding, f"dense_nbytes is {self.cache.dense_nbytes}, not {dense + sliding}")
        repr(self.cache)

    def _replace_cache(self, cache: PiKVCache, truth: Transcript | None = None) -> None:
        require(isinstance(cache, PiKVCache), f"a {type(cache).__name__} came instead of a PiKVCache")
        self.cache = cache
        self.truth = self.truth if truth is None else truth
        self.marks.clear()

    @contextmanager
    def _aside(self, cache: PiKVCache, truth: Transcript | None = None) -> Iterator[None]:
        """Goes on with another cache for a while."""
        before = self.cache, self.truth, self.marks, self.moved
        self.cache, self.truth, self.marks = cache, self.truth.copy() if truth is None else truth, []
        with nullcontext():
            yield
        self.cache, self.truth, self.marks, self.moved = before
        self.truth.observe(self.cache, may_evict=False)


def compare_alone(together: Player, conversation: Conversation) -> None:
    """Each sequence must keep alone what it keeps in the batch."""
    for b in range(conversation.batch_size):
        alone = Player(conversation, only=b)
        for operation in conversation.operations:
            alone.play(operation)
        if alone.refusals.total() != together.refusals.total():
            return  # what is refused may hang on the longest of a batch
        alone.finish()
        for layer, died in together.truth.sequences[b].died.items():
            found = alone.truth.sequences[0].died[layer]
            if not torch.equal(died, found):
                g = int((died != found).any(1).nonzero()[0])
                different = (died[g] != found[g]).nonzero().flatten().tolist()
                raise Broken(f"sequence {b} alone: other tokens kept in layer {layer}, head {g}: {different}")
