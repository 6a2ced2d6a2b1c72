"""Result folders: made whole or not at all, never overwritten."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path


def choose_folder(wanted: Path | None, kind: str) -> Path:
    """The folder for new results: the one wanted, or a new one under ``out`` named after the time.

    Raises:
        ValueError: if the wanted folder holds something already, or cannot be made.
    """
    folder = wanted or Path("out") / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; results are never overwritten, choose another --out")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ValueError(f"cannot write to {folder}: {parent} is not a folder")
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes its name only when the block ends well."""
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}") from None
    try:
        yield part
        part.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
