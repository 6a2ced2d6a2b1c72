"""Files of tensors, written whole or not at all."""

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside its place and moves it there when it is whole; what was there stays until then."""
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        part.touch()
        usual_mode = part.stat().st_mode
        save_file(tensors, part, metadata=metadata)
        part.chmod(usual_mode)  # some releases of safetensors let nobody but the owner read
        part.replace(path)
