"""Result folders: nothing is overwritten, every file appears whole or not at all, and what was computed is never lost."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from pikv.unfinished import remove_unfinished, unfinished_name

_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_PREFIX = ".pikv-"


def choose_folder(wanted: Path | None, kind: str) -> Path:
    """The folder for new results: the one wanted, or a new one under ``out`` named after the time. It is not made yet.

    Raises:
        ValueError: if the wanted folder holds something already, or cannot be written to.
    """
    folder = wanted or Path("out") / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"cannot write to {folder}: it is not a folder")
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir():
            raise ValueError(f"cannot write to {folder}: {nearest} is not a folder")
        if folder.exists():
            remove_unfinished(folder, _PREFIX)
            if any(not path.name.startswith(_PREFIX) for path in folder.iterdir()):
                raise ValueError(f"{folder} exists and is not empty; results are never overwritten, choose another --out")
        with _hidden_folder(nearest) as hidden:
            (hidden / "probe").write_text("a full disk takes a folder, but no file")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {_reason(error)}") from None
    return folder


def save_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` write files to a folder; it gets a hidden one, whose files move when all of them are complete.

    ``write`` may be called twice: where the folder cannot be written to, the files go to a temporary one; where ``write``
    itself fails, those that it wrote before.

    Raises:
        OSError: if the folder could not be written to; the message names the folder that the files are in instead.
        RuntimeError: if ``write`` failed with something else; the message names the folder as well.
    """
    try:
        _save(folder, write)
    except Exception as error:
        rescued = _rescue(write)
        where = f"the results are in {rescued}" if rescued else "nor can any temporary folder be written to"
        kind = OSError if isinstance(error, OSError) else RuntimeError
        raise kind(f"cannot write to {folder}: {_reason(error)}; {where}") from error


def _save(folder: Path, write: Callable[[Path], None]) -> None:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    moved: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder, _PREFIX)
        with _hidden_folder(folder) as hidden:
            write(hidden)
            files = sorted(hidden.iterdir())
            for file in files:
                _flush(file)
            for file in files:
                _move(file, folder / file.name)
                moved.append(folder / file.name)
    except BaseException:
        with suppress(OSError):
            for path in moved:
                path.unlink()
            for path in made:
                path.rmdir()
        raise


def _move(file: Path, target: Path) -> None:
    """Moves a file to a name that nothing has; FileExistsError if something has it."""
    try:
        os.link(file, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists", str(target)) from None
        file.rename(target)


def _flush(file: Path) -> None:
    """Has the system write a file to the disk, which may turn out to be full only then."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _rescue(write: Callable[[Path], None]) -> Path | None:
    for parent in (tempfile.gettempdir(), Path.home(), Path.cwd()):
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="pikv-results-", dir=parent))
            write(folder)
            for file in folder.iterdir():
                _flush(file)
        except Exception as error:
            if folder is None:
                continue
            if any(folder.iterdir()) and getattr(error, "errno", None) not in _OF_THE_DISK:
                return folder  # what failed was not writing: these files are whole
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    return None


@contextmanager
def _hidden_folder(parent: Path) -> Iterator[Path]:
    """A folder inside of another, on the same file system, that goes when the block ends; its name tells whose it is."""
    folder = parent / unfinished_name(_PREFIX)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"
