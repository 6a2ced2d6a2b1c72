"""A block holds for the context that entered it: threads on one model go their own ways."""

import asyncio
import contextvars
import functools
import sys
import threading
import warnings

import pytest
import torch
from transformers import DynamicCache

from pikv import PiKVCache, get_press, prefill
from pikv.presses import DuoAttentionPress, KnormPress, NoCompressionPress, SnapKVPress, StreamingLLMPress
from tiny import batch_of, build

EIGHT = ["knorm:0.9", "snapkv:0.5", "h2o:0.25", "duo:0.4", "eplb:0.6", "kvzip:0.5", "streaming:0.3+cake:0.5", "tova:0.7"]


@pytest.fixture
def switching():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(jobs):
    """Runs all jobs at once, each in a thread of its own; returns their results, or raises what one of them raised."""
    results, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def run(index):
        barrier.wait()
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def conversation(model, cache, seed):
    """Two turns of a padded batch and some decoding; all logits, and what the cache holds in the end."""
    logits = []
    ids, mask = batch_of([48, 31], seed=seed)
    turns = [(ids, mask), *((batch_of([size, size], seed=seed + size)[0], None) for size in (9, 1, 1, 1))]
    seen = torch.zeros(2, 0, dtype=torch.long)
    with torch.no_grad():
        for turn, given in turns:
            seen = torch.cat([seen, torch.ones_like(turn) if given is None else given], dim=1)
            logits.append(model(turn, attention_mask=seen, past_key_values=cache).logits[:, -1])
    if isinstance(cache, DynamicCache):
        return torch.stack(logits), cache.get_seq_length()
    positions = [[row.tolist() for row in rows] for layer in range(3) for rows in cache.positions(layer)]
    return torch.stack(logits), positions


def in_a_block(model, press, seed):
    cache = PiKVCache(model.config)
    with press(model):
        return conversation(model, cache, seed)


def carrying(model, press, seed):
    return conversation(model, PiKVCache(model.config, press=press), seed)


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@pytest.mark.filterwarnings("ignore:this thread reads with the full cache")
@pytest.mark.parametrize("how", [in_a_block, carrying])
def test_eight_threads_under_eight_presses_get_what_they_get_alone(llama, switching, how):
    alone = [how(llama, get_press(spec), seed) for seed, spec in enumerate(EIGHT)]
    for _ in range(4):
        jobs = [lambda seed=seed, spec=spec: how(llama, get_press(spec), seed) for seed, spec in enumerate(EIGHT)]
        for found, expected in zip(in_threads(jobs), alone, strict=True):
            assert_same(found, expected)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:this thread reads with the full cache")
def test_a_thread_without_a_press_gets_the_full_cache(llama, switching):
    expected = conversation(llama, DynamicCache(config=llama.config), 7)
    ragged = conversation(llama, PiKVCache(llama.config), 7)
    for _ in range(4):
        jobs = [lambda seed=seed: in_a_block(llama, KnormPress(0.1 * seed + 0.1), seed) for seed in range(6)]
        jobs.append(lambda: conversation(llama, DynamicCache(config=llama.config), 7))
        jobs.append(lambda: conversation(llama, PiKVCache(llama.config), 7))
        *_, plain, own = in_threads(jobs)
        assert_same(plain, expected)
        assert_same(own, ragged)


def test_threads_may_share_one_block(llama, switching):
    """Each forward pass has a session of its own, also where all threads run in copies of one context."""
    alone = [in_a_block(llama, get_press("kvzip:0.5"), seed) for seed in range(6)]
    with get_press("kvzip:0.5")(llama):
        for _ in range(2):
            jobs = []
            for seed in range(6):
                cache, context = PiKVCache(llama.config), contextvars.copy_context()
                jobs.append(functools.partial(context.run, conversation, llama, cache, seed))
            for found, expected in zip(in_threads(jobs), alone, strict=True):
                assert_same(found, expected)


def test_models_in_threads_do_not_meet(switching):
    models = [build(family) for family in ("llama", "qwen3", "gpt2")]
    alone = [in_a_block(model, SnapKVPress(0.5), 1) for model in models]
    found = in_threads([lambda model=model: in_a_block(model, SnapKVPress(0.5), 1) for model in models])
    for one, other in zip(found, alone, strict=True):
        assert_same(one, other)


def test_a_thread_that_begins_inside_is_told_once_that_it_takes_no_part(llama):
    ids, _ = batch_of([40])
    with KnormPress(0.5)(llama):
        for expected in (1, 0):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                (out,) = in_threads([lambda: llama(ids)])
            assert isinstance(out.past_key_values, DynamicCache)
            assert [str(each.message)[:41] for each in said] == ["this thread reads with the full cache: it"] * expected
            assert out.past_key_values.get_seq_length() == 40


@pytest.mark.filterwarnings("error")
def test_a_thread_with_a_context_or_a_press_of_its_own_is_told_nothing(llama):
    ids, _ = batch_of([40])
    with KnormPress(0.5)(llama):
        context = contextvars.copy_context()
        carried = PiKVCache(llama.config, press=KnormPress(0.75))
        (out,) = in_threads([lambda: context.run(llama, ids)])
        in_threads([lambda: llama.generate(ids, past_key_values=carried, max_new_tokens=2, do_sample=False)])
        in_threads([lambda: in_a_block(llama, KnormPress(0.25), 1)])
    assert out.past_key_values.lengths(0).tolist() == [[20] * 4]
    assert carried.lengths(0).tolist() == [[11] * 4]


def test_a_context_that_was_handed_on_ends_with_the_block(llama):
    ids, _ = batch_of([40])
    with KnormPress(0.5)(llama):
        context = contextvars.copy_context()
    assert isinstance(context.run(llama, ids).past_key_values, DynamicCache)


def test_tasks_of_an_event_loop_go_their_own_ways(llama):
    ids, _ = batch_of([40])

    async def ask(press):
        with press(llama):
            await asyncio.sleep(0.01)
            length = llama(ids).past_key_values.lengths(0)[0, 0].item()
            await asyncio.sleep(0.01)
            return length

    async def both():
        return await asyncio.gather(*(ask(StreamingLLMPress(ratio)) for ratio in (0.5, 0.75, 0.25)))

    assert asyncio.run(both()) == [20, 10, 30]


def test_leaving_a_block_in_another_context_closes_it(llama):
    ids, _ = batch_of([40])
    block = KnormPress(0.5)(llama)
    contextvars.copy_context().run(block.__enter__)
    block.__exit__(None, None, None)
    block = KnormPress(0.5)(llama)
    block.__enter__()
    contextvars.copy_context().run(block.__exit__, None, None, None)
    assert isinstance(llama(ids).past_key_values, DynamicCache)
    assert llama.config._attn_implementation == "sdpa"
    assert not llama.model._forward_pre_hooks


def test_heads_are_found_beside_a_block_of_another_thread(llama, switching):
    """DuoAttention runs the model to find its heads when it is applied; nobody's press acts on that."""
    expected = in_a_block(build("llama"), DuoAttentionPress(0.5), 0)
    found, _ = in_threads([lambda: in_a_block(llama, DuoAttentionPress(0.5), 0), lambda: in_a_block(llama, KnormPress(0.9), 1)])
    assert_same(found, expected)


def test_reading_in_chunks_in_threads(llama, switching):
    ids, _ = batch_of([90])

    def read(ratio):
        cache = PiKVCache(llama.config)
        logits = prefill(llama, ids, cache, StreamingLLMPress(ratio), chunk_size=32)
        return logits, cache.positions(0)[0][0].tolist()

    ratios = [0.1, 0.3, 0.5, 0.7]
    for found, ratio in zip(in_threads([lambda ratio=ratio: read(ratio) for ratio in ratios]), ratios, strict=True):
        assert_same(found, read(ratio))


def test_nothing_is_left_behind_after_an_interruption(llama):
    ids, _ = batch_of([40])

    def interrupt(*args):
        raise KeyboardInterrupt

    for press in (KnormPress(0.5), NoCompressionPress()):
        with press(llama):
            handle = llama.model.layers[1].mlp.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                llama(ids)
            handle.remove()
            assert isinstance(llama(ids).past_key_values, PiKVCache)
    assert isinstance(llama(ids).past_key_values, DynamicCache)
    assert llama.config._attn_implementation == "sdpa"
