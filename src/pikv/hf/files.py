"""Files of tensors, written whole or not at all."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pikv.unfinished import remove_unfinished, unfinished_name


def write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside its place and moves it there when it is whole; what was there stays until then.

    A symbolic link is followed. What killed processes left behind is removed.

    Raises:
        OSError: if the file cannot be written, or there is something in its place that is no file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is no regular file")
    if not target.parent.is_dir():
        raise OSError(f"there is no folder {target.parent}")
    prefix, suffix = f".{target.name}.", ".part"
    remove_unfinished(target.parent, prefix, suffix)
    part = target.with_name(unfinished_name(prefix, suffix))
    try:
        part.touch()
        usual_mode = part.stat().st_mode
        save_file(tensors, part, metadata=metadata)
        part.chmod(usual_mode)  # some releases of safetensors let nobody but the owner read
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
