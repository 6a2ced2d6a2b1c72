"""Presses of users: in files outside of the package, registered by a program, brought by other packages."""

import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint

import pytest
import torch

import pikv
from pikv import PiKVCache, get_press, list_presses
from pikv.presses import BasePress, ScorerPress, SnapKVPress, press_info, register_press
from pikv.presses.registry import PRESSES
from pikv.scoring.base import Scorer
from tiny import batch_of

TEN_LINES = '''\
from pikv.presses import ScorerPress


class KeyEntropyPress(ScorerPress):
    """Keeps the tokens whose keys are spread over many channels."""

    def score(self, view):
        def entropy(block):
            shares = block.keys.float().softmax(-1)
            return -(shares * shares.log()).sum(-1)

        return view.by_block(entropy)
'''
# What a file may hold instead, and what is said of it.
BAD_FILES = {
    "missing.py:Mine": (None, "cannot read the press file 'missing.py': No such file or directory"),
    "mine.py:Mine": ("1 / 0", "the press file 'mine.py' cannot be run: ZeroDivisionError: division by zero"),
    "mine.py:Broken": ("class Mine(", "the press file 'mine.py' cannot be run: SyntaxError"),
    "mine.py:KeyEntropPress": (TEN_LINES, "unknown press of mine.py 'KeyEntropPress'; did you mean 'KeyEntropyPress'?"),
    "mine.py:Plain": ("class Plain: pass", "mine.py:Plain is no press: expected a class that derives from BasePress"),
    "mine.py:number": ("number = 3", "mine.py:number is no press: .*got an object of type int"),
    "mine.py:Nothing": ("x = 1", "no press in 'mine.py'"),
    "mine.py:0.5": (TEN_LINES, r"which class of mine\.py\? available: KeyEntropyPress"),
    "mine:KeyEntropyPress:0.5": (TEN_LINES, "a class in a file is written 'mine.py:KeyEntropyPress'"),
    "mine.KeyEntropyPress:0.5": (TEN_LINES, "a class in a file is written 'mine.py:KeyEntropyPress'"),
    "mine": (TEN_LINES, "a class in a file is written 'mine.py:MyPress'"),
    "mine.py": (TEN_LINES, "'mine.py' names a file: say which class, 'mine.py:MyPress'"),
    "mine.py:Raises:0.5": (
        "from pikv.presses import KnormPress\nclass Raises(KnormPress):\n    def __init__(self, compression_ratio): 1 / 0",
        "press 'mine.py:Raises': ZeroDivisionError: division by zero",
    ),
    "mine.py:KeyEntropyPress:2": (TEN_LINES, "must be at least 0 and less than 1"),
}


class NewestFirstScorer(Scorer):
    """Scores a token by its position to some power."""

    def __init__(self, power=1.0):
        self.power = power

    def score(self, view):
        return view.kept.positions.float() ** self.power


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(TEN_LINES)
    return tmp_path / "mine.py"


@pytest.fixture(autouse=True)
def restored_registry(monkeypatch):
    for name in PRESSES.files():
        assert PRESSES[name]  # a module registers its press once only, when it is first imported
    monkeypatch.setattr(PRESSES, "_things", dict(PRESSES._things))


def kept_after(model, press, length=40):
    cache = PiKVCache(model.config)
    with press(model), torch.no_grad():
        model(batch_of([length])[0], past_key_values=cache)
    return cache


def test_ten_lines_outside_of_the_package_make_a_press(llama, own_file):
    press = get_press(f"{own_file}:KeyEntropyPress:0.75")
    assert repr(press) == "KeyEntropyPress(compression_ratio=0.75)"
    cache, full = kept_after(llama, press), kept_after(llama, BasePress())
    assert press.get_stats()["compression_ratio"] == 0.75
    for layer in range(3):
        shares = full.rows(layer).blocks[0].dense()[0].float().softmax(-1)
        best = -(shares * shares.log()).sum(-1)
        for g, positions in enumerate(cache.positions(layer)[0]):
            assert positions.tolist() == sorted(best[g].topk(10).indices.tolist())


def test_it_takes_limits_wraps_and_composes(llama, own_file):
    assert kept_after(llama, get_press("mine.py:KeyEntropyPress", budget=7)).lengths(0).tolist() == [[7] * 4]
    assert kept_after(llama, get_press("adakv(mine.py:KeyEntropyPress):0.5")).lengths(0).sum() == 80
    assert kept_after(llama, get_press("mine.py:KeyEntropyPress:0.5+streaming:0.5")).lengths(0).tolist() == [[10] * 4]


def test_an_edited_file_is_read_again(own_file):
    first = get_press("mine.py:KeyEntropyPress")
    assert type(get_press("mine.py:KeyEntropyPress")) is type(first)
    own_file.write_text(TEN_LINES.replace("many channels", "few channels"))
    assert "few channels" in type(get_press("mine.py:KeyEntropyPress")).__doc__


@pytest.mark.parametrize("spec", BAD_FILES)
def test_what_is_wrong_with_a_file_is_one_line(own_file, spec):
    text, message = BAD_FILES[spec]
    if text is not None:
        own_file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        get_press(spec)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_one_command_compares_it(own_file):
    arguments = "--context-length 256 --long-context-length 512 --num-contexts 1 --num-records 8 --num-questions 4".split()
    arguments += "--num-new-tokens 4 --repeats 1 --methods none,snapkv:0.75,mine.py:KeyEntropyPress:0.75".split()
    command = [sys.executable, "-c", "from pikv.cli.main import main; main()", "compare", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=own_file.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert "KeyEntropyPress:0.75" in done.stdout


def test_a_program_registers_its_own(llama):
    @pikv.register_press("newest", paper="2309.17453", options={"power": 2.0})
    class Newest(NewestFirstScorer):
        """Keeps the newest tokens."""

    press = get_press("newest:0.5")
    assert (press.scorer.power, press.compression_ratio) == (2.0, 0.5)
    assert [row.tolist() for row in kept_after(llama, press).positions(0)[0]] == [list(range(20, 40))] * 4
    assert list_presses()[-1] == "newest"
    info = press_info("newest")
    assert (info.description, info.group, info.paper) == ("Keeps the newest tokens.", "own", "2309.17453")
    with pytest.raises(ValueError, match=r"unknown press 'newset'; did you mean 'newest'?"):
        get_press("newset")
    register_press("outer", type("Outer", (pikv.presses.AdaKVPress,), {}), wraps="newest")
    assert isinstance(get_press("outer:0.25").press.scorer, Newest)


@pytest.mark.parametrize("name", ["", "a:b", "a+b", "a(b", "a b", "a,b"])
def test_names_that_specifications_could_not_hold(name):
    with pytest.raises(ValueError, match="cannot be the name of a press"):
        register_press(name, SnapKVPress)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (int, {}, "mine is no press: .* got the class int"),
        (SnapKVPress(), {}, "mine is no press: .* got an object of type SnapKVPress"),
        (SnapKVPress, {"group": "attenton"}, "unknown group 'attenton'; available: baseline"),
    ],
)
def test_what_is_no_press_is_refused_when_it_is_registered(kind, options, message):
    with pytest.raises(ValueError, match=message):
        register_press("mine", kind, **options)


def test_another_package_brings_presses(llama, monkeypatch):
    found = [
        EntryPoint("entropy", "collections_of_presses:Newest", "pikv.presses"),
        EntryPoint("gone", "no_such_module:Press", "pikv.presses"),
        EntryPoint("odd", "collections:OrderedDict", "pikv.presses"),
    ]
    monkeypatch.setattr("pikv.registry.entry_points", lambda group: found if group == "pikv.presses" else [])
    monkeypatch.setitem(sys.modules, "collections_of_presses", type(sys)("collections_of_presses"))
    sys.modules["collections_of_presses"].Newest = NewestFirstScorer
    assert {"entropy", "gone", "odd"} <= set(list_presses())
    assert kept_after(llama, get_press("entropy:0.5")).lengths(0).tolist() == [[20] * 4]
    with pytest.raises(ValueError, match="press 'gone' of another package cannot be loaded: ModuleNotFoundError"):
        get_press("gone")
    with pytest.raises(ValueError, match=r"odd is no press: .* got the class OrderedDict"):
        get_press("odd")


def test_an_own_press_stays_when_the_package_has_one_of_that_name():
    code = """
        import sys
        import pikv
        from pikv.presses import BasePress
        assert "pikv.presses.adakv" not in sys.modules
        class Mine(BasePress):
            pass
        pikv.register_press("adakv", Mine)
        from pikv.presses import AdaKVPress
        assert AdaKVPress is not Mine and type(pikv.get_press("adakv")) is Mine
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


class FreePress(BasePress):
    """Keeps what it is told."""

    def __init__(self, kept):
        self.kept = kept
        super().__init__()

    def compress(self, view):
        return self.kept

    def min_kept(self, num_tokens):
        return 1


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([torch.arange(4)] * 3, "for each of the 4 rows its tokens to keep; it returned 3 of them"),
        (torch.ones(1, 4, 40, dtype=torch.bool), r"it returned a tensor \[1, 4, 40\] of bool"),
        ([[1, 2]] * 4, "as a tensor .* of int64; one is 2 of them"),
        ([torch.arange(4.0)] * 4, r"one is a tensor \[4\] of float32"),
        ([torch.tensor([3, 2])] * 4, "ascending numbers below its length"),
        ([torch.tensor([3, 3])] * 4, "ascending numbers below its length"),
        ([torch.tensor([-1, 3])] * 4, "ascending numbers below its length"),
        ([torch.tensor([39, 40])] * 4, "ascending numbers below its length; one does not ascend, or leaves its 40"),
    ],
)
def test_what_compress_returns_is_checked(llama, kept, message):
    with pytest.raises(ValueError, match=f"compress of FreePress.* must return, or None, .*{message}") as caught:
        kept_after(llama, FreePress(kept))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scores", "message"),
    [(torch.ones(1, 4, 39), r"a tensor \[1, 4, 39\] of float32"), (None, "an object of type NoneType")],
)
def test_what_score_returns_is_checked(llama, scores, message):
    class Odd(Scorer):
        def score(self, view):
            return scores

    with pytest.raises(ValueError, match=rf"Odd of ScorerPress.* must return scores \[1, 4, 40\].* it returned {message}"):
        kept_after(llama, ScorerPress(Odd(), 0.5))


def test_a_scorer_press_needs_a_score():
    with pytest.raises(ValueError, match=r"Mine needs a scorer, or a method score\(view\) of its own"):
        type("Mine", (ScorerPress,), {})(0.5)


def test_names_are_known_and_help_is_there_before_torch_is_imported():
    code = """
        import sys
        import pikv.presses
        from pikv.presses.catalog import catalog
        assert len(catalog()) > 25 and "SnapKVPress" in dir(pikv.presses) and "SnapKVPress" in pikv.presses.__all__
        assert "torch" not in sys.modules
        pikv.presses.KnormPress
        assert "pikv.presses.snapkv" not in sys.modules and "pikv.presses.moe" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
