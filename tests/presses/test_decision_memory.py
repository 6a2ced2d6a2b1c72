"""What a decision takes beside the cache, measured on the process, where rows differ most in length."""

import json
import subprocess
import sys

import pytest

CHUNK, TOKENS, HEADS, DIM = 1024, 32_768, 8, 128
BLOCK = TOKENS * DIM * 4 * 2  # bytes of the one long row's keys and values
SCRIPT = f"""
import gc, json, torch
from torch import nn
from pikv.budget.select import select
from pikv.cache.rows import RaggedRows
from pikv.core import AttentionCall, Decision, LayerView
from pikv.attention.params import AttentionParams
from pikv.evaluation.memory import measure_peak, release, resident
from pikv.presses import get_press

torch.set_num_threads(1)
torch.manual_seed(0)
HEADS, DIM, TOKENS, CHUNK = {HEADS}, {DIM}, {TOKENS}, {CHUNK}
NAMES = "streaming random knorm keydiff lagkv leverage snapkv tova cake expected noncausal h2o".split()

# The first head keeps everything that comes, the others 20 tokens, chunk by chunk: no rectangle of all rows ever exists.
rows = RaggedRows(1, HEADS, torch.empty(0, DIM), torch.empty(0, DIM))
for start in range(0, TOKENS, CHUNK):
    keys, values, queries = torch.randn(3, 1, HEADS, CHUNK, DIM)
    rows.append(keys, values)
    if start + CHUNK < TOKENS:
        rows.keep([torch.arange(int(n)) if row == 0 else torch.arange(20) for row, n in enumerate(rows.lengths[0])])
target = torch.full((1, HEADS), 20)
target[0, 0] = TOKENS
extra = {{}}
for name in ["nothing", *NAMES]:
    call = AttentionCall(module=nn.Identity(), layer_idx=0, rows=rows, queries=queries, params=AttentionParams(scaling=0.1),
                         is_token=None, logsumexp=None, state={{}}, hidden_states=torch.zeros(1, CHUNK, 8), arguments={{}},
                         num_new=CHUNK)
    view = LayerView.of(call, rank=0, num_layers=1, budget=target)
    release()
    before = resident()
    with measure_peak(torch.device("cpu")) as peak:
        if name != "nothing":
            select(get_press(name).scorer.score(view), target, rows.lengths)
    extra[name] = peak.nbytes - before
print(json.dumps([extra, rows.nbytes, rows.lengths[0].tolist()]))
"""


@pytest.fixture(scope="module")
def measured():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    extra, nbytes, lengths = json.loads(done.stdout)
    assert lengths == [TOKENS] + [20 + CHUNK] * (HEADS - 1)
    return extra, nbytes


def test_a_decision_takes_no_more_than_one_block(measured):
    """The rectangle of all rows would be 8 times the block, and a float32 copy of each key twice that."""
    extra, nbytes = measured
    assert nbytes < 1.8 * BLOCK
    # H2O works through tiles of a fixed size, whatever the length; the others compute one row's keys in several copies,
    # leverage in double precision.
    limits = {"h2o": 6 * BLOCK, "leverage": 3 * BLOCK, "lagkv": 1.6 * BLOCK, "expected": 1.6 * BLOCK}
    too_much = {name: round(taken / BLOCK, 2) for name, taken in extra.items() if taken > limits.get(name, BLOCK)}
    assert not too_much, f"{too_much} blocks of {extra}"
