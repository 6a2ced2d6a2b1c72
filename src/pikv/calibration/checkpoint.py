"""Checkpoints of an unfinished training: one file, written whole or not at all."""

import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from pikv.unfinished import remove_unfinished, unfinished_name


class Checkpoint:
    """The file that a training leaves its state in, and goes on from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part_names = f".{path.name}.", ".part"
        self._has_warned = False

    def read(self) -> Any:
        """The state in the file; None if there is no file.

        Raises:
            ValueError: if it cannot be read.
        """
        if not self.path.is_file():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            raise ValueError(f"cannot read the checkpoint {self.path}; remove it to begin anew") from error

    def write(self, state: Any) -> None:
        """Writes a state; what was there stays until the new one is whole.

        Where that is impossible, as on a full disk, it warns once: training goes on without.
        """
        try:
            self._write(state)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                reason = error.strerror or error
                warnings.warn(f"cannot write the checkpoint {self.path} ({reason}); training goes on without", stacklevel=2)

    def _write(self, state: Any) -> None:
        content = BytesIO()
        torch.save(state, content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path.parent, *self._part_names)
        part = self.path.with_name(unfinished_name(*self._part_names))
        try:
            part.write_bytes(content.getbuffer())
            part.replace(self.path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Removes the file, if that is possible, and what a process that was killed left of one."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        remove_unfinished(self.path.parent, *self._part_names)
