"""The kinds of router, one file each; a file that is put here registers its router without being named elsewhere."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
