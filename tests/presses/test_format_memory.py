"""What formats take, measured on the process: while a context is read in chunks, and once it was read."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pikv import PiKVCache, get_press, prefill

TOKENS, CHUNK = 4_096, 512
SCRIPT = f"""
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from pikv import PiKVCache, get_press, prefill
from pikv.evaluation.memory import measure_peak, release, resident

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
# Wide heads and little else: the cache is most of what a chunk needs.
model = LlamaForCausalLM(LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=128, vocab_size=64,
                                     num_hidden_layers=4, intermediate_size=8, max_position_embeddings={TOKENS}))
found = {{}}
for spec in ["none", *sys.argv[1:]]:
    ids, press = torch.randint(64, (1, {TOKENS})), get_press(spec)
    prefill(model, ids[:, :1024], PiKVCache(model.config), press, chunk_size={CHUNK})  # torch's own code is loaded at first use
    cache = PiKVCache(model.config)
    release()
    before = resident()
    with measure_peak(torch.device("cpu")) as peak:
        prefill(model, ids, cache, press, chunk_size={CHUNK})
    release()
    found[spec] = dict(peak=peak.nbytes - before, held=resident() - before, nbytes=cache.nbytes, dense=cache.dense_nbytes)
    del cache
print(json.dumps(found))
"""
# What is freed goes back to the system at once: fragments that malloc keeps differ from run to run.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
SPECS = ("int8", "int4", "turbo:3", "snapkv:0.5+int4")


@pytest.fixture(scope="module")
def measured():
    command = [sys.executable, "-c", SCRIPT, *SPECS]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_given_back_to_the_process(measured, spec):
    found = measured[spec]
    assert found["nbytes"] <= 0.35 * found["dense"]
    assert found["held"] <= found["nbytes"] + 0.05 * found["dense"]


@pytest.mark.parametrize("spec", SPECS)
def test_reading_in_chunks_never_takes_more_than_the_dense_cache(measured, spec):
    assert measured[spec]["peak"] <= measured["none"]["peak"]


@torch.no_grad()
def test_half_of_the_tokens_in_four_bits_beside_a_dense_cache_in_bfloat16():
    shape = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=128, num_hidden_layers=2)
    config = LlamaConfig(vocab_size=64, intermediate_size=8, max_position_embeddings=16_384, **shape)
    model, cache = LlamaForCausalLM(config).bfloat16(), PiKVCache(config)
    ids = torch.randint(64, (1, 16_384), generator=torch.Generator().manual_seed(0))
    prefill(model, ids, cache, get_press("snapkv:0.5+int4"))
    assert cache.nbytes <= 0.16 * cache.dense_nbytes
