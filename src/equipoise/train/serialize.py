"""Configurations as plain data: dataclasses to JSON types and back, never by importing what a file names."""

from __future__ import annotations

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
    """A configuration as dicts, lists, strings, numbers and None.

    A plain dataclass becomes the dict of its fields; a member of an abstract family (a solver, a gradient, a data
    source, an optimizer) becomes `{"class_path": ..., "init_args": {...}}`. A function, where the
    field is one for functions, becomes None: `observe` only watches, `outer` belongs to one batch.

    Raises:
        ValueError: the value has no plain form, such as a tensor or a function in another field.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        contents = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        hints = typing.get_type_hints(type(value))
        fields = {
            name: None if callable(content) and needs_python(hints[name]) else to_plain(content)
            for name, content in contents.items()
        }
        if isinstance(value, abc.ABC):
            return {"class_path": public_path(type(value)), "init_args": fields}
        return fields
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, Tensor):
        raise ValueError("a configuration that holds a tensor cannot be saved; pass None or a named gradient instead")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a {type(value).__name__} cannot be part of a saved configuration: {value!r}")


def from_plain(hint: Any, value: Any, where: str = "") -> Any:
    """The inverse of `to_plain`, checked against a type.

    Only dataclasses that the running program already knows are built; no module is imported because a file names it.

    Args:
        hint: the type that is wanted.
        value: plain data.
        where: name of the value in messages.

    Raises:
        ValueError: an unknown or missing key (the nearest known one is named), an unknown class, or a value of another
            type.
    """
    where = where or "configuration"
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _from_union(hint, value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where} is {value!r}; choose one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        item, *more = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        if more and more != [Ellipsis]:
            if len(value) != 1 + len(more):
                raise ValueError(f"{where} must have {1 + len(more)} entries, got {value!r}")
            return tuple(
                from_plain(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip([item, *more], value, strict=True))
            )
        return tuple(from_plain(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        return _from_dict(hint, value, where)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def known_classes(family: type) -> dict[str, type]:
    """The concrete public classes of an abstract family that are loaded, by name."""
    found: dict[str, type] = {}
    cls: type
    for cls in family.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found[cls.__name__] = cls
        found.update(known_classes(cls))
    return found


def public_path(cls: type) -> str:
    """Where users find a class: `equipoise.Anderson`, not the module that defines it."""
    package = cls.__module__.split(".")
    if package[0] != "equipoise":
        return f"{cls.__module__}.{cls.__name__}"
    whole = getattr(equipoise, cls.__name__, None) is cls
    return f"equipoise.{'' if whole else f'{package[1]}.'}{cls.__name__}"


def nearest(name: str, known: Iterable[str]) -> str:
    """End of a message about an unknown name: the most similar known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _from_union(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    # Tensors and functions have no plain form; what remains is at most one type that can be read.
    readable = [option for option in options if option not in (type(None), Tensor) and not needs_python(option)]
    if not readable:
        raise ValueError(f"{where} cannot be given in a file; set it in Python")
    if len(readable) == 1:
        return from_plain(readable[0], value, where)
    for option in readable:
        try:
            return from_plain(option, value, where)
        except ValueError:
            continue
    raise ValueError(f"{where} must be {hint}, got {value!r}")


def needs_python(hint: Any) -> bool:
    """Whether a field of this type is a function or a tuple of tensors, which have no plain form."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return any(
        typing.get_origin(option) is collections.abc.Callable or Tensor in typing.get_args(option)
        for option in (typing.get_args(hint) if union else (hint,))
    )


def _from_dict(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold the fields of {cls.__name__}, got {value!r}")
    if issubclass(cls, abc.ABC):
        if set(value) - {"class_path", "init_args"} or not isinstance(value.get("class_path"), str):
            raise ValueError(f"{where} must have the keys class_path and init_args, got {sorted(map(str, value))}")
        family = known_classes(cls) | ({} if inspect.isabstract(cls) else {cls.__name__: cls})
        module, _, name = value["class_path"].rpartition(".")
        paths = ("", public_path(family[name]).rpartition(".")[0], family[name].__module__) if name in family else ()
        if module not in paths:
            raise ValueError(f"{where}: unknown class {value['class_path']!r}; {nearest(name, family)}")
        cls, value = family[name], value.get("init_args") or {}
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
    return cls(**{key: from_plain(hints[key], item, prefix + key) for key, item in value.items()})
