"""Forward passes of a real cache under presses, held against the transcript."""

from __future__ import annotations

import inspect
import pickle
import re
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache as cached
from pathlib import Path
from random import Random
from typing import Any

import torch
from grammar import NAMESPACE, changes_tokens, stores
from plan import Conversation
from stored_tokens import Tokens, check_bytes
from torch import Tensor
from transcript import Transcript, require

import pikv
from calibrated import random_calibration
from pikv import PiKVCache
from pikv.routing import use_calibration
from tiny import build

# Whether forward passes are interrupted, and refusals in the middle of one must leave the cache usable.
INTERRUPTIONS = True
MAX_COLUMNS = 200
MAX_BATCH_SIZE = 6
VOCABULARY = 512  # so many different words that keys of a context do not tie
_FEW_WORDS = 3
_PACKAGE = Path(pikv.__file__).parent


class UnusableCacheError(Exception):
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


class Passes:
    """One cache, its transcript, and the presses; ``only`` plays one sequence of the batch alone."""

    def __init__(self, conversation: Conversation, only: int | None = None) -> None:
        self.conversation = conversation
        self.only = only
        self.model = model_of(conversation.family)
        self.refusals: Counter[str] = Counter()
        self.refused_by_operation: list[int] = []  # how much was refused up to the end of each
        self.num_layers = len(PiKVCache(self.model.config).ragged_layers)
        self.presses = [self._build(press) for press in conversation.presses]
        self.stores = any(stores(press) for press in conversation.presses)
        self.evicted: list[Counter[int]] = [Counter() for _ in self.presses]
        self.moved = 0  # how often the text goes on elsewhere, so that it does not repeat what was taken back
        self.marks: list[tuple[Any, Transcript, Tokens]] = []
        self.cache = self._new_cache()
        self.truth = self._new_truth(conversation.batch_size if only is None else 1)

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

    def _new_truth(self, batch_size: int) -> Transcript:
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return Transcript(batch_size, list(self.cache.ragged_layers), heads)

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
        untouched = None
        try:
            with ExitStack() as stack:
                if around is not None and used is not None:
                    stack.enter_context(around(self.model))
                    untouched = around.get_stats() if outer != press else None
                if used is not None and own and not self._is_carried:
                    stack.enter_context(used(self.model))
                stack.enter_context(self._following(press))
                run()
            if around is not None and untouched is not None:
                require(around.get_stats() == untouched, "a press around the one at work counted what that did")
        except (ValueError, RuntimeError) as error:
            if not is_clear(error):
                raise
            self._refused(error)
            self._forget_stats()
            self.truth.tokens_changed |= press is not None and changes_tokens(self.conversation.presses[press])
            self._check_usable(press is not None)

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
            self.truth.tokens_changed |= stores(text) or (acts and changes_tokens(text))
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
        self._settle()
        columns = {layer.get_seq_length() for layer in self.cache.layers}
        if columns != {self.truth.columns} and not INTERRUPTIONS:
            raise UnusableCacheError("a refusal left layers that have seen different numbers of tokens")
        require(
            columns == {self.truth.columns}, f"after a refusal layers have seen {sorted(columns)}, not {self.truth.columns}"
        )
        self.truth.observe(self.cache, may_have_evicted)

    def _settle(self) -> None:
        """Has what an interrupted pass left taken back, as the next operation would."""
        self.cache.undo_interrupted()

    def _check(self) -> None:
        """What always holds."""
        self.truth.observe(self.cache, may_evict=False)
        config = self.model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if not self.truth.columns:
            return
        ragged = self.cache.ragged_layers
        kept = sum(int(self.cache.lengths(layer).sum()) for layer in ragged)
        if not self.stores:
            require(self.cache.nbytes >= 2 * 4 * size * kept, f"{self.cache.nbytes} bytes hold {kept} tokens of {size} numbers")
        check_bytes(self.cache)
        seen = sum(sequence.seen for sequence in self.truth.sequences)
        dense = 2 * 4 * size * self.truth.num_kv_heads * seen * len(ragged)
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
        yield
        self.cache, self.truth, self.marks, self.moved = before
        self.truth.observe(self.cache, may_evict=False)
