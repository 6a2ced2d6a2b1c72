"""Names of files and folders that are still being written, and removal of those whose process was killed."""

import os
import secrets
import shutil
import socket
from contextlib import suppress
from hashlib import sha256
from pathlib import Path


def unfinished_name(prefix: str, suffix: str = "") -> str:
    """A name that no other thread, process or machine takes; it tells whose it is."""
    return f"{prefix}{_host()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"


def remove_unfinished(folder: Path, prefix: str, suffix: str = "") -> None:
    """Removes from ``folder``, as far as possible, what has such a name and belongs to a killed process of this machine."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(prefix) and path.name.endswith(suffix):
                host, _, rest = path.name[len(prefix) : len(path.name) - len(suffix)].partition("-")
                process = rest.partition("-")[0]
                if host == _host() and process.isdecimal() and not _is_running(int(process)):
                    _remove(path)


def _host() -> str:
    """Short for the name of this machine, which may share its file system with others."""
    return sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)
