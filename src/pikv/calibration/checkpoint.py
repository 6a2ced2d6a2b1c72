"""Checkpoints of an unfinished training: one file, written whole or not at all."""

import os
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from tempfile import NamedTemporaryFile
from typing import Any

import torch


class Checkpoint:
    """The file that a training leaves its state in, and goes on from."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
        with NamedTemporaryFile(prefix=f"{self.path.name}-", dir=self.path.parent, delete=False) as part:
            try:
                part.write(content.getbuffer())
                part.flush()
                os.replace(part.name, self.path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(part.name)
                raise
