"""What a decision takes beside the cache, measured on the process, where rows differ most in length."""

import subprocess
import sys
import textwrap

import pytest

CHUNK, TOKENS, HEADS, DIM = 1024, 32_768, 16, 64
BLOCK = TOKENS * DIM * 4 * 2  # the one long row's keys and values
RECTANGLE = HEADS * BLOCK
SCORERS = [
    "streaming",
    "knorm",
    "keydiff",
    "snapkv",
    "tova",
    "h2o",
    "expected",
    "lagkv",
    "leverage",
    "cake",
    "noncausal",
    "random",
]

SCRIPT = """
import psutil, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
import pikv
from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.evaluation.memory import measure_peak, release
from pikv.presses import ScorerPress, get_press

torch.set_num_threads(1)
torch.manual_seed(0)
HEADS, DIM, TOKENS, CHUNK = {heads}, {dim}, {tokens}, {chunk}


class OneLongHead(Budget):
    '''The first head keeps everything, the others 20 tokens.'''

    amount = Amount()

    def target_lengths(self, view):
        lengths = view.num_given.clamp(max=20)
        lengths[:, 0] = view.num_given[:, 0]
        return lengths

    def with_amount(self, amount):
        return self

    def min_kept(self, num_tokens):
        return min(20, num_tokens)


config = LlamaConfig(vocab_size=64, hidden_size=HEADS * DIM, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=2 * TOKENS)
model = LlamaForCausalLM(config).eval()
scorer = get_press(sys.argv[1]).scorer if sys.argv[1] != "none" else None
press = None if scorer is None else ScorerPress(scorer, sharing=OneLongHead())
if press is not None:
    press.budget = OneLongHead()
cache = pikv.PiKVCache(config)
ids = torch.randint(4, 64, (1, TOKENS))
pikv.prefill(model, ids[:, : TOKENS - CHUNK], cache, press, chunk_size=CHUNK)
release()
held = psutil.Process().memory_info().rss
with measure_peak(model.device) as peak:
    pikv.prefill(model, ids[:, TOKENS - CHUNK :], cache, press, chunk_size=CHUNK)
print(peak.nbytes - held, cache.nbytes, cache.lengths(0)[0].tolist()[:2])
"""


def extra_memory(name):
    code = textwrap.dedent(SCRIPT.format(heads=HEADS, dim=DIM, tokens=TOKENS, chunk=CHUNK))
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    extra, nbytes, *_ = done.stdout.split(maxsplit=2)
    return int(extra), int(nbytes), done.stdout


@pytest.mark.parametrize("name", SCORERS)
def test_a_decision_takes_no_more_than_a_block(name):
    extra, nbytes, printed = extra_memory(name)
    assert "[32768, 20]" in printed
    assert nbytes < 1.2 * BLOCK
    # The pass itself, its attention, the growth of the long row (which is copied once), and one block for the decision.
    assert extra < 4 * BLOCK < RECTANGLE / 3
