"""Settings of presses: what their constructors take can be read, and set afterwards."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from itertools import count
from typing import Any, ClassVar

from pikv.checks import plain
from pikv.registry import unknown

_changes = count(1)


class Adjustable:
    """Something whose constructor's arguments are attributes that can be set.

    Setting one makes another object with it, so that it is checked as the constructor checks it, and takes over what that made
    of its arguments. This goes for the classes of this package, and for what users' classes inherit from them; further
    attributes of users' classes are plain.
    """

    further_names: ClassVar[Mapping[str, str]] = {}
    """Other names of arguments, such as those of kvpress."""

    alternatives: ClassVar[tuple[str, ...]] = ("compression_ratio", "budget", "max_bytes", "head_compression_ratio")
    """Arguments of which setting one takes back the others."""

    made_of_settings: ClassVar[tuple[str, ...]] = ("scorer", "budget", "amount", "trigger", "spans", "format")
    """Attributes that a constructor makes of several arguments, and that follow when one of these is set."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls) and _is_of_package(cls):
            cls.__init__ = remembering(cls.__init__)  # type: ignore[method-assign]

    def last_change(self) -> int:
        """A number that is another one after a setting was changed, here or in anything that this one holds."""
        held = [each for value in vars(self).values() for each in (value if isinstance(value, list) else [value])]
        changes = [each.last_change() for each in held if isinstance(each, Adjustable)]
        return max([int(vars(self).get("_changed", 0)), *changes])

    def _note(self, name: str, value: Any) -> None:
        """Notes a setting that was changed."""
        vars(self)["_changed"] = next(_changes)
        settings, parameters = vars(self).get("_settings"), inspect.signature(_kind_of(self)).parameters
        takes_further = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        if settings is not None and (name in parameters or takes_further):  # else it is one of what this one holds
            vars(self)["_settings"] = {**_without_alternatives(self, settings, name), name: value}

    def _adjust(self, name: str, value: Any) -> None:
        """Sets an argument of the constructor."""
        kind = _kind_of(self)
        if inspect.isabstract(kind):  # a user's class of a kind of its own
            object.__setattr__(self, name, value)
        else:
            settings = {**_without_alternatives(self, vars(self)["_settings"], name), name: value}
            made = vars(kind(**settings))
            vars(self).update({each: made[each] for each in (name, *self.made_of_settings) if each in made})
        self._note(name, value)

    def _further_settings(self) -> str:
        """For ``repr``: plain settings that are not what they are by default, without amounts."""
        defaults = inspect.signature(_kind_of(self)).parameters
        said = [
            f", {name}={value!r}"
            for name, value in (vars(self).get("_settings") or {}).items()
            if name not in (*self.alternatives, "scorer")
            and isinstance(value, bool | int | float | str)
            and (name not in defaults or value != defaults[name].default)
        ]
        return "".join(said)

    def __setattr__(self, name: str, value: Any) -> None:
        settings = vars(self).get("_settings")
        name, value = self.further_names.get(name, name), plain(value)
        is_property = isinstance(getattr(type(self), name, None), property)
        if name.startswith("_") or settings is None or is_property or name == "compression_ratio":
            object.__setattr__(self, name, value)
            if name == "compression_ratio" and not is_property:  # a user's class has an attribute in the place of ours
                self._note(name, value)
        elif name in settings and "_making" not in vars(self):
            self._adjust(name, value)
        elif name in vars(self) or hasattr(type(self), name) or not _is_of_package(type(self)) or "_making" in vars(self):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(str(unknown(f"setting of {type(self).__name__}", name, sorted(settings))))

    def __getattr__(self, name: str) -> Any:
        # Asked for what is no attribute: arguments that the constructor handed on.
        settings, own_name = vars(self).get("_settings") or {}, self.further_names.get(name, name)
        if own_name in settings:
            return getattr(self, own_name) if own_name != name else settings[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def remembering(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that knows the ``further_names`` of its arguments, and remembers what it was given."""
    signature = inspect.signature(init)
    assert all(each.kind is not each.VAR_POSITIONAL for each in signature.parameters.values())

    @wraps(init)
    def make(self: Adjustable, *args: Any, **options: Any) -> None:
        args = tuple(plain(value) for value in args)
        options = {name: plain(value) for name, value in _with_own_names(type(self), options).items()}
        if "_making" in vars(self):  # called by the constructor of a subclass, whose arguments are the settings
            init(self, *args, **options)
            return
        vars(self)["_making"] = True
        try:
            init(self, *args, **options)
        finally:
            del vars(self)["_making"]
        vars(self)["_settings"] = dict(_arguments(signature, (self, *args), options))

    return make


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments of a call by name, defaults included, without that of the object itself."""
    bound = signature.bind(*args, **options)
    bound.apply_defaults()
    for name, value in list(bound.arguments.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _with_own_names(kind: type[Adjustable], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under the names that the constructor has for them; TypeError for one that is given under both."""
    for name, own in kind.further_names.items():
        if name in options and own in options:
            raise TypeError(f"{kind.__name__} got {own!r} twice: {name!r} is another name of it")
    return {kind.further_names.get(name, name): value for name, value in options.items()}


def _without_alternatives(adjustable: Adjustable, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings once one of this name is to be set: those that it replaces are as if they had not been given."""
    if name not in adjustable.alternatives:
        return dict(settings)
    defaults = inspect.signature(_kind_of(adjustable)).parameters
    kept = {each: value for each, value in settings.items() if each not in adjustable.alternatives}
    return kept | {each: defaults[each].default for each in adjustable.alternatives if each in defaults}


def _is_of_package(kind: type) -> bool:
    return kind.__module__.startswith("pikv.") or "made_by_package" in vars(kind)


def _kind_of(adjustable: Adjustable) -> type[Adjustable]:
    """The class of this package that something is, or derives from."""
    return next(kind for kind in type(adjustable).__mro__ if _is_of_package(kind))
