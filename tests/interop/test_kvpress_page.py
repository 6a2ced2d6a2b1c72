"""What docs/kvpress.md promises holds: its table, and where kvpress is installed, what classes and loops keep beside it."""

import inspect
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pikv
from pikv import presses
from pikv.presses.kvpress.names import COUNTERPARTS, table
from pikv.presses.settings import remembering
from tiny import batch_of

PAGE = (Path(__file__).parents[2] / "docs" / "kvpress.md").read_text()
beside_kvpress = pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress is not installed: make test-kvpress")


def test_the_table_is_that_of_the_package():
    assert table() in PAGE


@pytest.mark.parametrize("name", [name for name, found in COUNTERPARTS.items() if found.ours])
def test_names_resolve(name):
    ours = getattr(presses, COUNTERPARTS[name].ours)
    assert getattr(pikv, name) is getattr(presses, name) is ours


@pytest.mark.parametrize("name", [name for name, found in COUNTERPARTS.items() if not found.ours])
def test_names_without_a_counterpart_say_what_to_use(name):
    for package in (pikv, presses):
        with pytest.raises(ImportError, match=f"kvpress's {name} has no counterpart in PiKV: ...") as caught:
            getattr(package, name)
        assert "\n" not in str(caught.value)


def test_importing_pikv_imports_no_press():
    code = "import sys, pikv; assert 'torch' not in sys.modules and 'pikv.presses' not in sys.modules; pikv.KnormPress"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchPress'"):
        pikv.NoSuchPress  # noqa: B018


@beside_kvpress
def test_every_class_of_kvpress_has_a_line():
    assert set(import_module("kvpress").__all__) == set(COUNTERPARTS)


@beside_kvpress
@pytest.mark.parametrize("name", [name for name, found in COUNTERPARTS.items() if found.ours and name != "BasePress"])
def test_arguments_and_defaults_are_those_of_kvpress_or_named_in_the_table(name):
    ours, found = getattr(presses, name), COUNTERPARTS[name]
    parameters = inspect.signature(ours).parameters
    takes_scorer = ours is presses.ScorerPress
    for each in inspect.signature(getattr(import_module("kvpress"), name)).parameters.values():
        if each.name.startswith("_"):
            continue
        own = ours.further_names.get(each.name, each.name)
        assert (own in parameters) == (each.name not in found.missing), each.name
        if own in parameters and not takes_scorer:
            assert (parameters[own].default == each.default) == (each.name not in found.defaults), each.name


@beside_kvpress
@pytest.mark.parametrize("style", ["score", "compress", "masks"])
def test_classes_written_for_kvpress_keep_the_same_tokens(llama, style):
    """One source, run with either import."""
    from peer import our_kept, peer_kept

    made = {}
    for library in ("kvpress", "pikv"):
        made[library] = {}
        exec(OWN_CLASSES.format(library=library), made[library])
    ids = 4 + torch.randperm(90, generator=torch.Generator().manual_seed(1))[None, :80]
    build = {"score": "ByKey(compression_ratio=0.5)", "compress": "FirstAndLast(2, n_last=18)", "masks": "Hidden(0.5)"}[style]
    theirs, ours = (eval(build, made[library]) for library in ("kvpress", "pikv"))
    kept, cache = our_kept(llama, ours, ids)
    assert kept == peer_kept(llama, theirs, ids)
    assert repr(ours) == repr(theirs)
    assert int(cache.lengths(0).sum()) == sum(map(len, kept[0])) < 4 * 80


OWN_CLASSES = """
from dataclasses import dataclass

import torch
from {library} import BasePress, ScorerPress


@dataclass
class ByKey(ScorerPress):
    compression_ratio: float = 0.0
    sign: float = -1.0

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert hidden_states.shape[1] == keys.shape[2] and module.head_dim == keys.shape[3]
        return self.sign * keys.norm(dim=-1)


@dataclass
class FirstAndLast(BasePress):
    n_first: int = 1
    n_last: int = 8

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        mask = torch.ones(keys.shape[-2], dtype=torch.bool)
        mask[self.n_first : -self.n_last] = False
        return keys[:, :, mask, :], values[:, :, mask, :]


@dataclass
class Hidden(BasePress):
    compression_ratio: float = 0.0

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = values.norm(dim=-1)
        mask = scores < torch.quantile(scores, self.compression_ratio)
        module.masked_key_indices = torch.nonzero(mask, as_tuple=True)
        return keys, values
"""


@beside_kvpress
def test_an_evaluation_loop_keeps_the_same_tokens(llama):
    """As kvpress's evaluation does: presses made once, attributes set."""
    from peer import our_kept, peer_kept

    kvpress = import_module("kvpress")
    ids, _ = batch_of([80])
    pairs = [(library.SnapKVPress(window_size=8), library.AdaKVPress(library.KnormPress())) for library in (kvpress, pikv)]
    for ratio in (0.25, 0.5):
        for theirs, ours in zip(*pairs, strict=True):
            for press in (theirs, ours):
                assert hasattr(press, "compression_ratio")
                press.compression_ratio = ratio
            assert our_kept(llama, ours, ids)[0] == peer_kept(llama, theirs, ids)


@beside_kvpress
def test_decoding_presses_are_made_alike(llama):
    kvpress = import_module("kvpress")
    ids, _ = batch_of([40])
    for library in (kvpress, pikv):
        decoding = library.DecodingPress(
            base_press=library.KnormPress(), compression_interval=8, target_size=20, hidden_states_buffer_size=0
        )
        press = library.PrefillDecodingPress(prefilling_press=library.KnormPress(0.25), decoding_press=decoding)
        with press(llama):
            out = llama.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
        cache = out.past_key_values
        held = cache.lengths(0).tolist()[0] if library is pikv else [cache.layers[0].keys.shape[2]] * 4
        assert held == [20] * 4


def test_arguments_under_both_names_are_refused():
    class Plain(presses.StreamingLLMPress):
        pass

    with pytest.raises(TypeError, match="Plain got 'sink_size' twice"):
        Plain(0.5, sink_size=4, n_sink=4)
    assert remembering(Plain.__init__).__name__ == "__init__"
