"""Files of tensors, written whole or not at all."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside its place and moves it there when it is whole; what was there stays until then.

    A symbolic link is followed. What killed processes left behind is removed.

    Raises:
        OSError: if the file cannot be written, or there is something in its place that is no file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is no regular file")
    remove_leftovers(target)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.touch()
        usual_mode = part.stat().st_mode
        save_file(tensors, part, metadata=metadata)
        part.chmod(usual_mode)  # some releases of safetensors let nobody but the owner read
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(target: Path) -> None:
    """Removes half-written files that belong to ``target`` and to no living process."""
    for left in target.parent.glob(f".{target.name}.*.part"):
        number = left.name.removesuffix(".part").rpartition(".")[2]
        if number.isdecimal() and not _is_running(int(number)):
            left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
