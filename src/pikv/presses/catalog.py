"""What the files of presses and of routers register, read from their text: names are known before anything is imported."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

DECORATOR = "register_press"
ROUTER_DECORATOR = "register_router"
ROUTER_PRESS = ("pikv.presses.moe", "MoERouterPress")
"""The module and the class of the press that every kind of router gives its name to."""
GROUPS = ("baseline", "position", "keys", "attention", "budget", "wrapper", "router", "format", "own")
"""In which order presses are listed: what they go by, presses around others, routers, formats, and what users bring."""


@dataclass(frozen=True, kw_only=True)
class PressInfo:
    """What is said of a press by name.

    Attributes:
        name: what specifications call it
        description: the first line of its documentation
        group: one of ``GROUPS``
        paper: its number on arXiv
        number: the argument that a number behind the name sets; None where the name takes none
        wraps: for presses around another one, the name of the one that they wrap if nothing else is said
        options: arguments that are fixed under this name
        module: where its class is
        class_name: the name of its class
    """

    name: str
    description: str
    group: str = "own"
    paper: str | None = None
    number: str | None = "compression_ratio"
    wraps: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    module: str
    class_name: str


@cache
def catalog() -> Mapping[str, PressInfo]:
    """The presses of this folder and those of the kinds of router, by name, in the order of their groups."""
    found = [info for module, parsed in _sources("presses") for info in _registered(module, parsed)]
    found += [info for _, parsed in _sources("routing/routers") for info in _router_presses(parsed)]
    return {info.name: info for info in sorted(found, key=lambda info: (GROUPS.index(info.group), info.name))}


@cache
def public_classes() -> Mapping[str, str]:
    """The classes of this folder whose names end with ``Press``, and the modules that they are in."""
    return {
        node.name: module
        for module, parsed in _sources("presses")
        for node in parsed.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Press") and not node.name.startswith("_")
    }


def first_line(documentation: str | None) -> str:
    """The first line of a documentation, as plain text."""
    return (documentation or "").strip().split("\n")[0].replace("``", "")


@cache
def _sources(folder: str) -> list[tuple[str, ast.Module]]:
    """The modules of a folder of the package, parsed."""
    package = f"pikv.{folder.replace('/', '.')}"
    return [
        (f"{package}.{path.name.removesuffix('.py')}", ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(files("pikv").joinpath(folder).iterdir(), key=lambda path: path.name)
        if path.name.endswith(".py") and path.name != "__init__.py"
    ]


def _registered(module: str, parsed: ast.Module) -> Iterator[PressInfo]:
    """What the decorators of a file of presses register."""
    for node, name, given in _decorated(parsed, DECORATOR):
        yield PressInfo(name=name, module=module, class_name=node.name, **given)


def _router_presses(parsed: ast.Module) -> Iterator[PressInfo]:
    """The presses that a file of routers gives names to."""
    module, class_name = ROUTER_PRESS
    for _, name, given in _decorated(parsed, ROUTER_DECORATOR):
        if given.pop("is_press", True):
            options = {"router_type": name}
            yield PressInfo(name=name, group="router", options=options, module=module, class_name=class_name, **given)


def _decorated(parsed: ast.Module, decorator: str) -> Iterator[tuple[ast.ClassDef, str, dict[str, Any]]]:
    """The classes below ``@decorator("name", ...)`` with the name, the further arguments and a description."""
    for node in parsed.body:
        for call in getattr(node, "decorator_list", []):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator):
                continue
            assert isinstance(node, ast.ClassDef)
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
            given.setdefault("description", first_line(ast.get_docstring(node)))
            yield node, ast.literal_eval(call.args[0]), given
