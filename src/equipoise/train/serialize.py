"""Configurations as plain data: dataclasses to JSON types and back, no module is imported because a file names it."""

import abc
import collections.abc
import contextlib
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterable
from typing import Any

from torch import Tensor

import equipoise


def to_plain(value: Any) -> Any:
    """Convert a configuration to dicts, lists, strings, numbers and None.

    A plain dataclass becomes the dict of its fields; a member of an abstract family (a solver, a gradient, a data
    source, an optimizer) becomes `{"class_path": ..., "init_args": {...}}`. A function in a field for functions becomes
    None: `observe` only watches, `outer_loss` belongs to one batch.

    Raises:
        ValueError: the value has no plain form, such as a tensor or a function in another field.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        contents = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        fields = {
            name: None if callable(content) and needs_python(hints[name]) else to_plain(content)
            for name, content in contents.items()
        }
        abstract = isinstance(value, abc.ABC)
        return {"class_path": public_path(type(value)), "init_args": fields} if abstract else fields
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a {type(value).__name__} cannot be part of a saved configuration: {value!r}")


def from_plain(hint: Any, value: Any, classes: Iterable[type] = (), where: str = "configuration") -> Any:
    """Build a value from the result of `to_plain`, checked against a type.

    No module is imported, and no class built, because a file names it: a member of an abstract family is one of
    `classes`. The path before its name is that of this package, as of another version, or the module of the class.

    Args:
        hint: the type that is wanted.
        value: plain data.
        classes: members of abstract families that may be built.
        where: name of the value in messages.

    Raises:
        ValueError: an unknown or missing key or another class (the nearest known one is named), or a value of another
            type.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        # Tensors and functions have no plain form.
        readable = [option for option in options if option not in (type(None), Tensor) and not needs_python(option)]
        if len(readable) != 1:
            raise ValueError(f"{where} cannot be given in a file; set it in Python")
        return from_plain(readable[0], value, classes, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where} is {value!r}; choose one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(value) != len(items):
            raise ValueError(f"{where} must have {len(items)} entries, got {value!r}")
        pairs = enumerate(zip(items, value, strict=True))
        return tuple(from_plain(item, entry, classes, f"{where}[{i}]") for i, (item, entry) in pairs)
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        return _from_dict(hint, value, classes, where)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def members(family: type, classes: Iterable[type]) -> dict[str, type]:
    """Return the members of a family by name."""
    return {cls.__name__: cls for cls in classes if issubclass(cls, family)}


def public_path(cls: type) -> str:
    """Return the public path of a class: `equipoise.Anderson`, not the module that defines it."""
    package = cls.__module__.split(".")
    if package[0] != "equipoise":
        return f"{cls.__module__}.{cls.__name__}"
    if getattr(equipoise, cls.__name__, None) is cls:
        return f"equipoise.{cls.__name__}"
    return f"equipoise.{package[1]}.{cls.__name__}"


def nearest(name: str, known: Iterable[str]) -> str:
    """End a message about an unknown name: with the most similar known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def needs_python(hint: Any) -> bool:
    """Return whether a field of this type holds a function or tensors, which have no plain form."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return any(
        typing.get_origin(option) is collections.abc.Callable or Tensor in typing.get_args(option)
        for option in (typing.get_args(hint) if union else (hint,))
    )


def _from_dict(cls: type, value: Any, classes: Iterable[type], where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold the fields of {cls.__name__}, got {value!r}")
    if issubclass(cls, abc.ABC):
        if set(value) - {"class_path", "init_args"} or not isinstance(value.get("class_path"), str):
            raise ValueError(f"{where} must have the keys class_path and init_args, got {sorted(map(str, value))}")
        cls, value = _named(cls, value["class_path"], classes, where), value.get("init_args") or {}
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    prefix = "" if where == "configuration" else f"{where}."
    for key in value:
        if key not in fields:
            raise ValueError(f"unknown key {prefix + str(key)!r}; {nearest(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ValueError(f"{prefix}{name} is missing")
    return cls(**{key: from_plain(hints[key], item, classes, prefix + key) for key, item in value.items()})


def _named(family: type, path: str, classes: Iterable[type], where: str) -> type:
    """Find the member of a family that a file names."""
    module, _, name = path.rpartition(".")
    package = module.partition(".")[0]
    known = [cls for cls in classes if issubclass(cls, family)]
    for cls in known:
        ours = package == cls.__module__.partition(".")[0] == "equipoise"  # the class may have moved
        if name == cls.__name__ and (ours or module in ("", cls.__module__)):
            return cls
    raise ValueError(f"{where}: unknown class {path!r}; {nearest(name, [cls.__name__ for cls in known])}")
