"""The operations of a conversation, each on the cache and in the transcript."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import tempfile
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from abuses import attempt
from grammar import changes_tokens
from passes import MAX_BATCH_SIZE, MAX_COLUMNS, Passes, is_clear
from plan import Conversation, Operation
from stored_tokens import attention_compared, check_same, selected, tokens_of
from transcript import PropertyError, Transcript, require

from pikv import PiKVCache


class Player(Passes):
    """Carries operations out, by their names."""

    def play(self, operation: Operation) -> None:
        """Carries one operation out.

        Raises:
            PropertyError: if a property does not hold.
            UnusableCacheError: if it makes no sense to go on.
            Exception: whatever is no clear error.
        """
        with torch.no_grad(), warnings.catch_warnings(), attention_compared() if self.stores else nullcontext():
            warnings.simplefilter("ignore")
            getattr(self, operation.kind)(Random(operation.seed), **operation.options)
            self._check()
        self.refused_by_operation.append(self.refusals.total())

    def finish(self) -> None:
        """A last step, and all logits so far."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.truth.columns:
                self.decode(Random(0), steps=1, padding=False, press=None)
            self.truth.compare(self.model)
        # A cache that carries a press may need them as long as it lives, also one of an earlier conversation on this model.
        if self._num_hooks() and not self.conversation.carries:
            gc.collect()
            require(self._num_hooks() == 0, f"{self._num_hooks()} hooks were left on the model")

    def _num_hooks(self) -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in self.model.modules())

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

        def run() -> None:
            self._read(ids, whole, how, chunk_size, press, with_mask, with_positions, in_bools)

        self._with_press(press, run, outer=outer, own=how != "prefill")

    def decode(self, rng: Random, steps: int, padding: bool, press: int | None) -> None:
        if not self.truth.columns or self.truth.columns + steps > MAX_COLUMNS + 40:
            return

        def run() -> None:
            for _ in range(steps):
                ids, mask = self._text(rng, 1, "some" if padding else "none")
                whole = torch.cat([self.truth.mask, mask], 1)
                with_mask, with_positions = rng.random() < 0.5, rng.random() < 0.5
                with_mask |= not bool(whole.all())
                self._read(ids, whole, "whole", None, press, with_mask, with_positions)

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
        tokens = tokens_of(self.cache)
        if self._asks(lambda: self.cache.crop(-columns if from_end else left)):
            check_same(tokens, self.cache, "a crop")
            self.truth.crop(left)
            self.moved += 1

    def mark(self, rng: Random) -> None:
        self.marks.append((self.cache.mark(), self.truth.copy(), tokens_of(self.cache)))

    def rewind(self, rng: Random, mark: int) -> None:
        if not self.marks:
            return
        mark, before, tokens = self.marks[mark % len(self.marks)]
        if self._asks(lambda: self.cache.rewind(mark)):
            check_same(tokens, self.cache, "going to a mark")
            moved = self.truth.tokens_changed
            self.truth = before.copy()
            self.truth.tokens_changed |= moved
            self.moved += 1

    def reset(self, rng: Random) -> None:
        self.cache.reset()
        self.truth = self._new_truth(len(self.truth.sequences))
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
        check_same(tokens_of(self.cache), loaded, "a file")
        if rng.random() < 0.7:
            self._replace_cache(loaded)
        else:
            self.truth.copy().observe(loaded, may_evict=False)
            require(self.cache is before, "saving replaced the cache")

    def copy(self, rng: Random) -> None:
        copied = copy.deepcopy(self.cache)
        check_same(tokens_of(self.cache), copied, "a copy")
        self._replace_cache(copied)

    def pickle(self, rng: Random) -> None:
        cache = pickle.loads(pickle.dumps(self.cache))
        cache.attach_to(self.model.config)
        if cache.press is not None:  # a copy of the one that the cache carried
            self.presses = [cache.press, *self.presses[1:]]
            self._forget_stats()
        self._replace_cache(cache)

    def detour(self, rng: Random, columns: int, padding: str, press: int | None, how: str, chunk_size: int | None) -> None:
        """A copy goes another way; the cache must not notice."""
        tokens = tokens_of(self.cache)
        with self._aside(copy.deepcopy(self.cache)):
            self.turn(rng, columns, padding, press, how, chunk_size)
            self.decode(rng, 2, False, None)
            self.truth.compare(self.model)
        check_same(tokens, self.cache, "another way of a copy")

    def select(self, rng: Random) -> None:
        size = len(self.truth.sequences)
        indices = [rng.randrange(size) for _ in range(rng.randint(1, min(size + 1, MAX_BATCH_SIZE)))]
        if not self.truth.columns:
            return
        chosen = self.cache.select(indices if rng.random() < 0.5 else torch.tensor(indices))
        self.truth.observe(self.cache, may_evict=False)
        check_same(selected(tokens_of(self.cache), indices, self.truth.num_kv_heads), chosen, "a selection")
        self._replace_cache(chosen, self.truth.select(indices))

    def repeat(self, rng: Random, times: int) -> None:
        size = len(self.truth.sequences)
        if not self.truth.columns or size * times > MAX_BATCH_SIZE:
            return
        repeated, indices = self.cache.repeat(times), [b for b in range(size) for _ in range(times)]
        check_same(selected(tokens_of(self.cache), indices, self.truth.num_kv_heads), repeated, "a repetition")
        self._replace_cache(repeated, self.truth.select(indices))

    def concat(self, rng: Random, columns: int, padding: str, press: int | None) -> None:
        """What a copy of some sequences became on a way of its own comes back beside the others."""
        size = len(self.truth.sequences)
        indices = [rng.randrange(size) for _ in range(rng.randint(1, 2))]
        if not self.truth.columns or size + len(indices) > MAX_BATCH_SIZE:
            return
        with self._aside(self.cache.select(indices), self.truth.select(indices)):
            self.turn(rng, columns, padding, press, "whole", None)
            other, other_truth = self.cache, self.truth
        is_first = rng.random() < 0.5
        caches, truths = (
            ([self.cache, other], (self.truth, other_truth)) if is_first else ([other, self.cache], (other_truth, self.truth))
        )
        try:
            joined, truth = PiKVCache.concat(caches), truths[0].joined(truths[1])
        except ValueError as error:
            require("turned to positions without gaps" in str(error), str(error))
            return
        check_same(tokens_of(caches[0]), joined, "a concatenation")
        if joined.forward_pass.is_padded_in_front:
            counts = joined.attention_mask().sum(1)
            require(torch.equal(counts, truth.mask.sum(1)), f"attention_mask() has {counts.tolist()} tokens")
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
        # Some passes end after their masks, before any layer was reached.
        hook = layers[0].register_forward_pre_hook(stop) if rng.random() < 0.2 else layers[layer].register_forward_hook(stop)
        whole = torch.cat([self.truth.mask, mask], 1)
        with suppress(KeyboardInterrupt):
            try:
                self._with_press(press, lambda: self._read(ids, whole, "whole", None, press, True, True))
            finally:
                hook.remove()
        may_evict = press is not None or self._is_carried
        shown = self._shown()
        self._settle()
        require(shown == self._shown(), "what the cache shows of an interrupted pass changes when it is undone")
        seen = {layer.get_seq_length() for layer in self.cache.layers}
        whole_or_none = [{self.truth.columns}, {self.truth.columns + columns}]
        require(seen in whole_or_none, f"after an interruption layers have seen {sorted(seen)} columns")
        if seen == whole_or_none[1]:
            self.truth.read(ids, mask)
        self.truth.tokens_changed |= press is not None and changes_tokens(self.conversation.presses[press])
        self.truth.observe(self.cache, may_evict)
        self._forget_stats()

    def _shown(self) -> Any:
        """What the cache shows of its tokens, or why it shows nothing."""
        try:
            kept = [[[row.tolist() for row in heads] for heads in self.cache.positions(i)] for i in self.cache.ragged_layers]
            lengths = [self.cache.lengths(index).tolist() for index in self.cache.ragged_layers]
        except ValueError as error:
            return str(error)
        return self.cache.get_seq_length(), kept, lengths

    def compare(self, rng: Random) -> None:
        self.truth.compare(self.model)

    def abuse(self, rng: Random, how: str) -> None:
        """Something wrong, which must be refused in one line and change nothing."""
        try:
            attempt(how, self.model, self.cache, self.truth)
        except (ValueError, RuntimeError) as error:
            # Of a ready-made mask that a model with sliding layers was given, these say that a pass was interrupted.
            documented = isinstance(error, RuntimeError) and re.match("PiKVCache needs|the layers of this cache", str(error))
            if not is_clear(error) and not documented:
                raise
            self._refused(error)
        self._check_usable()


def compare_alone(together: Player, conversation: Conversation) -> None:
    """Each sequence must keep alone what it keeps in the batch."""
    for b in range(conversation.batch_size):
        alone = Player(conversation, only=b)
        for operation in conversation.operations:
            alone.play(operation)
        # What is refused, and after how many chunks, may hang on the longest of a batch, or on another sequence.
        if (alone.refused_by_operation, alone.truth.columns) != (together.refused_by_operation, together.truth.columns):
            continue
        alone.finish()
        if difference := _difference(together.truth, b, alone.truth):
            raise PropertyError(f"sequence {b} alone: {difference}")


def _difference(together: Transcript, b: int, alone: Transcript) -> str | None:
    """The first eviction of sequence ``b`` that was another one alone, unless scores must have tied."""
    here, there = together.sequences[b], alone.sequences[0]
    different = []
    for layer, died in here.died.items():
        require(died.shape == there.died[layer].shape, f"sequence {b} alone has other tokens")
        times = torch.minimum(died, there.died[layer])
        different += [(int(times[g, p]), layer, int(g)) for g, p in (died != there.died[layer]).nonzero()]
    if not different:
        return None
    time, layer, g = min(different)
    kept = [sequence.died[layer][g, :time] > time for sequence in (here, there)]
    words = alone.ids[0, alone.mask[0].bool()][:time]
    only_here, only_there = (words[one & ~other].sort().values for one, other in (kept, kept[::-1]))
    # Equal words may have equal scores, and some scores of two tokens are equal whatever they are.
    if int(kept[0].sum()) <= 2 or torch.equal(only_here, only_there):
        return None
    return f"of {time} tokens, head {g} of layer {layer} kept {only_here.tolist()} in the batch and {only_there.tolist()} alone"
