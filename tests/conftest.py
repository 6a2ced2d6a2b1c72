"""Shared fixtures: tiny random models, and memory that shows when it is read before it is written."""

import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on CUDA

import pytest
import torch

from tiny import CORE_FAMILIES, build

torch.set_num_threads(1)  # tests run side by side
# With deterministic algorithms torch fills uninitialised memory with NaN, so reading a free slot spoils the result.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(params=CORE_FAMILIES)
def model(request):
    """A tiny random model of each core family."""
    return build(request.param)


@pytest.fixture
def llama():
    """A tiny random Llama with grouped queries."""
    return build("llama")


@pytest.fixture(scope="session")
def demo():
    """The bundled model and its tokenizer."""
    from pikv.models import load_demo

    return load_demo()


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command that must be refused, in an empty folder, and returns the one line that it ends with."""
    from transformers.utils import logging

    from pikv.cli.main import main

    logging.disable_progress_bar()  # the command does so too, but by a variable that is read only once
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pikv", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
        assert line.startswith("error: ")
        return line

    return run
