"""What only a GPU can show, beyond the matrix of ``make gpu``. Skipped where there is none."""

import threading

import pytest
import torch
from cases import PRESSES
from test_matrix import STEPS, conversation

from oracle import assert_matches_oracle
from pikv import PiKVCache, get_press
from tiny import batch_of, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
    pytest.mark.filterwarnings("ignore:the router .* is not calibrated"),
]


@pytest.fixture(autouse=True)
def what_cuda_can_do_deterministically():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("press", PRESSES)
def test_every_press_is_exact(press):
    turns = [(ids.cuda(), mask.cuda()) for ids, mask in conversation()]
    assert_matches_oracle(build("llama", device="cuda"), PRESSES[press](), turns, STEPS, chunk_size=16)


@torch.no_grad()
def test_the_same_tokens_stay_as_on_the_cpu():
    for spec in ("snapkv:0.5", "duo:0.5", "h2o:0.5", "knorm:0.5"):
        kept = []
        for device in ("cpu", "cuda"):
            model, (ids, mask) = build("llama", device=device), batch_of([60, 41], device=device)
            cache = PiKVCache(model.config)
            with get_press(spec)(model):
                model(ids, attention_mask=mask, past_key_values=cache)
            kept.append([[row.tolist() for row in rows] for rows in cache.positions(1)])
        assert kept[0] == kept[1], spec


def test_streams_do_not_disturb_each_other():
    """Caches of several threads, each on a stream of its own and with a model of its own, give what they give alone."""
    specs = ("snapkv:0.5", "duo:0.5", "knorm:0.75", "none")
    alone, together = {}, {}

    def generate(spec, found):
        model, ids = build("llama", device="cuda"), batch_of([200], device="cuda")[0]
        with torch.cuda.stream(torch.cuda.Stream()), get_press(spec)(model):
            found[spec] = model.generate(ids, max_new_tokens=24, do_sample=False).tolist()

    for spec in specs:
        generate(spec, alone)
    threads = [threading.Thread(target=generate, args=(spec, together)) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@torch.no_grad()
def test_evicting_gives_memory_back():
    model = build("llama", device="cuda")
    cache = PiKVCache(model.config)
    model(batch_of([400], device="cuda")[0], past_key_values=cache)
    before, nbytes = torch.cuda.memory_allocated(), cache.nbytes
    for layer in cache.ragged_layers:
        cache.rows(layer).keep([torch.arange(40)] * 4)
    assert before - torch.cuda.memory_allocated() >= 0.8 * (nbytes - cache.nbytes)


@torch.no_grad()
def test_a_plain_step_does_not_wait():
    model = build("llama", device="cuda")
    cache, token = PiKVCache(model.config), torch.tensor([[5]], device="cuda")
    model(batch_of([40], device="cuda")[0], past_key_values=cache)
    for layer in cache.ragged_layers:
        cache.rows(layer).keep([torch.arange(count) for count in (30, 10, 30, 10)])
    for _ in range(3):
        model(token, past_key_values=cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(token, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
