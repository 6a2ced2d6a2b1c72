"""Result folders: nothing is overwritten, every file appears whole or not at all, and what was computed is never lost."""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
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
            _remove_leftovers(folder)
            if any(not path.name.startswith(_PREFIX) for path in folder.iterdir()):
                raise ValueError(f"{folder} exists and is not empty; results are never overwritten, choose another --out")
        with _hidden_folder(nearest) as hidden:
            (hidden / "probe").write_text("a full disk takes a folder, but no file")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {_reason(error)}") from None
    return folder


def save_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` write files to a folder; it gets a hidden one, whose files move when all of them are complete.

    ``write`` may be called twice: where the folder cannot be written to, the files go to a temporary one.

    Raises:
        OSError: if the folder could not be written to; the message names the folder that the files are in instead.
    """
    try:
        _save(folder, write)
    except OSError as error:
        rescued = _rescue(write)
        where = f"the results are in {rescued}" if rescued else "nor can any temporary folder be written to"
        raise OSError(f"cannot write to {folder}: {_reason(error)}; {where}") from error


def _save(folder: Path, write: Callable[[Path], None]) -> None:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    moved: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
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
        except OSError:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    return None


@contextmanager
def _hidden_folder(parent: Path) -> Iterator[Path]:
    """A folder inside of another, on the same file system, that goes when the block ends; its name tells whose it is."""
    prefix = f"{_PREFIX}{os.getpid()}-{socket.gethostname()}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes hidden folders of processes of this machine that were killed."""
    for path in folder.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and path.name.startswith(f"{_PREFIX}{pid}-{socket.gethostname()}-") and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
