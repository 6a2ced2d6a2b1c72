"""What a decision takes beside the cache, measured on the process, where rows differ most in length."""

import json
import os
import subprocess
import sys

import pytest

CHUNK, TOKENS, HEADS, DIM = 512, 32_768, 8, 128
BLOCK = TOKENS * DIM * 4 * 2  # bytes of the one long row's keys and values
SCRIPT = f"""
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
from pikv.attention.params import AttentionParams
from pikv.budget.select import select
from pikv.cache.rows import RaggedRows
from pikv.core import AttentionCall, LayerView
from pikv.evaluation.memory import measure_peak, release, resident
from pikv.presses import get_press

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
HEADS, DIM, CHUNK = {HEADS}, {DIM}, {CHUNK}
ALONE = "streaming random knorm keydiff lagkv leverage snapkv tova cake expected noncausal h2o criticalkv adakv chunkkv".split()
NAMES = [*ALONE, "eplb"]  # several scorers together
model = LlamaForCausalLM(LlamaConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_hidden_layers=2, vocab_size=8,
                                     intermediate_size=8, max_position_embeddings={TOKENS}))


def a_cache(num_tokens, num_new):
    # The first head keeps everything that comes, the others 20 tokens, and then comes the last chunk.
    rows = RaggedRows(1, HEADS, torch.empty(0, DIM), torch.empty(0, DIM))
    for num in [CHUNK] * ((num_tokens - num_new) // CHUNK) + [num_new]:
        rows.keep([torch.arange(int(n) if row == 0 else min(int(n), 20)) for row, n in enumerate(rows.lengths[0])])
        rows.append(*torch.randn(2, 1, HEADS, num, DIM))
    target = torch.full((1, HEADS), 20)
    target[0, 0] = num_tokens
    return rows, torch.randn(1, HEADS, num_new, DIM), torch.randn(1, num_new, HEADS * DIM), target


def decide(stage, rows, queries, hidden_states, target):
    call = AttentionCall(module=model.model.layers[0].self_attn, layer_idx=0, rows=rows, queries=queries, is_token=None,
                         params=AttentionParams(scaling=0.1), logsumexp=None, state={{}}, hidden_states=hidden_states,
                         arguments={{}}, num_new=queries.shape[2])
    view = LayerView.of(call, rank=0, num_layers=2, budget=target)
    scores = stage.scorer.score(view)
    if hasattr(stage.budget, "preference"):
        stage.budget.preference(view)
    select(scores, stage.budget.counts(view, scores, target) if hasattr(stage.budget, "counts") else target, rows.lengths)


large, small = a_cache({TOKENS}, CHUNK), a_cache(300, 300)
extra = {{}}
for name in NAMES:
    stage = get_press(name).bind(model)[0]
    decide(stage, *small)  # torch's own code is loaded when it is first used
    release()
    before = resident()
    with measure_peak(torch.device("cpu")) as peak:
        decide(stage, *large)
    extra[name] = peak.nbytes - before
print(json.dumps([extra, large[0].nbytes, large[0].lengths[0].tolist()]))
"""


# What is freed goes back to the system at once: fragments that malloc keeps differ from run to run.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


@pytest.fixture(scope="module")
def measured():
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    extra, nbytes, lengths = json.loads(done.stdout)
    assert lengths == [TOKENS] + [20 + CHUNK] * (HEADS - 1)
    return extra, nbytes


def test_a_decision_takes_no_more_than_one_block(measured):
    """The rectangle of all rows would be 8 times the block, and a float32 copy of each key twice that."""
    extra, nbytes = measured
    assert nbytes < 1.8 * BLOCK
    blocks = {name: round(taken / BLOCK, 2) for name, taken in extra.items()}
    assert max(blocks.values()) <= 1, blocks
