"""The command, run in the process of the tests."""

import sys
import warnings

import pytest
from transformers.utils import logging

from pikv.cli.main import main


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command that must be refused, in an empty folder, and returns the one line that it ends with."""
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
