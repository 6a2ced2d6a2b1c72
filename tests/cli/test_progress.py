"""Ctrl-C while libraries are imported."""

import signal

import pytest

from pikv.cli import progress


@pytest.fixture
def as_in_a_shell():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("then", [None, ModuleNotFoundError("Could not import module")])
def test_an_interrupt_that_an_import_swallows_is_raised_all_the_same(as_in_a_shell, monkeypatch, then):
    def swallowing(name):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if then:
                raise then from None

    monkeypatch.setattr(progress, "import_module", swallowing)
    with pytest.raises(KeyboardInterrupt):
        progress.load_libraries()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_missing_is_not_taken_for_an_interrupt(as_in_a_shell, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(progress, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="pikv"):
        progress.load_libraries()
