"""Flags for the fields of a configuration, made by jsonargparse from the dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import jsonargparse

from equipoise.cli.errors import UsageError
from equipoise.train import TrainConfig
from equipoise.train.serialize import from_plain, members, nearest, needs_python, public_path, to_plain
from equipoise.zoo import CLASSES


def parse(
    arguments: Sequence[str],
    base: TrainConfig,
    *,
    usage: str,
    description: str,
    examples: str,
    own: Sequence[tuple[str, dict[str, Any]]],
    fields: Sequence[str] | None = None,
    classes: Sequence[type] = CLASSES,
) -> tuple[TrainConfig, argparse.Namespace]:
    """The configuration and the other options that a command line gives.

    Args:
        arguments: of the command.
        base: configuration that the flags change.
        usage: first line of the help.
        description: of the command.
        examples: end of the help.
        own: the command's own positionals and flags: name and arguments of `add_argument`.
        fields: those of the configuration that have flags; None: all.
        classes: that flags may name.

    Raises:
        UsageError: an unknown flag (the nearest known one is named), a value of another type or out of range.
    """
    every = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "name"]
    fields = every if fields is None else list(fields)
    arguments = [spell(argument, own) for argument in arguments]
    plain = _choose_classes(to_plain(base), arguments, fields, classes)
    _check_names(plain, arguments, fields, own, classes)
    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        import_path_denylist=["*"],
        import_path_allowlist=["equipoise", *sorted({cls.__module__ for cls in classes})],
    )
    parser = Parser(
        prog="equipoise",
        formatter_class=type("Formatter", (Formatter,), {"classes": classes}),
        usage=usage,
        description=description,
        epilog=examples,
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
    )
    mine = parser.add_argument_group("options")
    for name, details in own:
        (mine if name.startswith("-") else parser).add_argument(name, **details)
    mine.add_argument("-h", "--help", action="help", help="show this help")
    others = {name for name in [*every, "name"] if name not in fields}
    parser.add_argument_group("configuration").add_class_arguments(TrainConfig, as_group=False, skip=others)
    parser.set_defaults({name: plain[name] for name in fields})
    parsed = parser.parse_args(list(arguments)).as_dict()
    options = argparse.Namespace(**{key: value for key, value in parsed.items() if key not in fields})
    changed = {name: _dicts(parsed[name]) for name in fields}
    try:
        return from_plain(TrainConfig, {**plain, **changed}, classes), options
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _dicts(value: Any) -> Any:
    """Namespaces as dicts, also those in lists, where `as_dict` leaves them."""
    if isinstance(value, jsonargparse.Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _dicts(item) for key, item in value.items()}
    return [_dicts(item) for item in value] if isinstance(value, (list, tuple)) else value


class Parser(jsonargparse.ArgumentParser):
    """Parser that tells an error in one line; also of the help texts of classes, which jsonargparse makes itself."""

    def __init__(self, *arguments: Any, **details: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": Formatter, "usage": argparse.SUPPRESS, **details})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r"<class '([\w.]+)'>", r"\1", " ".join(message.split()))
        text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
        text = re.sub(r'^Parser key "([^"]+)": ', r"--\1: ", text)
        text = re.sub(r"^--([\w.]+): --([\w.]+): ", r"--\1.\2: ", text)
        # A field of a class that may be left out: what is wrong with the field, not with the class.
        text = re.sub(
            r"^--([\w.]+): Does not validate .* Errors: - --([\w.]+): (.*?) - Expected .*NestedArg.*",
            r"--\1.\2: \3",
            text,
        )
        text = re.sub(
            r"Does not validate against.* Subtypes: \[(.*?)\] Errors: .* Given value: (.*)", _union_error, text
        )
        text = re.sub(r"Expected a tuple\b", "Expected a list such as [16,32]", text)
        text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text)
        raise UsageError(re.sub(r"Expected an? (.*?)\. Got value: ", r"expected \1, got ", text)) from ex


def _union_error(match: re.Match[str]) -> str:
    names = [name.rpartition(".")[2].replace("NoneType", "null") for name in match[1].split(", ")]
    return f"expected {' or '.join(names)}, got {match[2]}"


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with types left to the metavar and defaults as they would be typed."""

    classes: ClassVar[Sequence[type]] = CLASSES

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest.endswith(".help"):
            return "show the fields of a class"
        text = re.sub(r"\bNone\b", "null", " ".join((action.help or "").split()))  # as it is typed here
        text = _without_tex(text)
        hint = getattr(action, "_typehint", None)
        family = _family(hint)
        if family is not None:
            names = ", ".join(sorted(members(family, self.classes)))
            text += f" One of {names}; its fields follow as --{action.dest}.FIELD."
        if hint is None or action.default is argparse.SUPPRESS:
            return text.replace("%", "%%")
        return f"{text} [{_shown(action.default)}]".replace("%", "%%")

    def start_section(self, heading: str | None) -> None:
        super().start_section(_without_tex(heading) if heading else heading)

    def _format_action(self, action: argparse.Action) -> str:
        # Whole groups from a file, as jsonargparse offers them, would be a second way to do what --config does.
        # A function cannot be given in words, nor can tensors.
        if type(action).__name__ == "_ActionConfigLoad" or needs_python(getattr(action, "_typehint", None)):
            return ""
        return super()._format_action(action)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if action.dest.endswith(".help"):
            return lambda size: ("CLASS",) * size
        hint = getattr(action, "_typehint", None)
        if hint is not None and action.choices is None and action.metavar is None:
            name = _type_name(hint)
            return lambda size: (name,) * size
        return super()._metavar_formatter(action, default_metavar)


def _without_tex(text: str) -> str:
    return re.sub(r"\$([^$]*)\$", lambda formula: formula[1].replace("\\", ""), text)


def _shown(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, jsonargparse.Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        items = value.get("init_args", {}).items()
        # Fields of plain dataclasses would make the line too long; they have flags of their own.
        shown = {key: item for key, item in items if item is not None and not _is_plain(item)}
        inside = ", ".join(f"{key}={_shown(item)}" for key, item in shown.items())
        return f"{value['class_path'].rpartition('.')[2]}({inside})"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_shown, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, dict) and "class_path" not in value


def _type_name(hint: Any) -> str:
    family = _family(hint)
    if family is not None:
        return family.__name__.upper()
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        return "[A,B,...]"
    names = [getattr(option, "__name__", str(option)) for option in typing.get_args(hint) or (hint,)]
    return "|".join("null" if name == "NoneType" else name for name in names)


def _family(hint: Any) -> type | None:
    """The abstract class whose members a field takes, if it is such a field."""
    if typing.get_origin(hint) is tuple:  # several of them are written as a list
        return None
    for option in typing.get_args(hint) or (hint,):
        if inspect.isclass(option) and inspect.isabstract(option) and dataclasses.is_dataclass(option):
            return option
    return None


def spell(argument: str, own: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A flag with underscores, or as the command spells its own."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    for known, _ in own:
        if known.replace("-", "_") == name.replace("-", "_"):
            return known + equals + value
    return "--" + name[2:].replace("-", "_") + equals + value


def _values(arguments: Sequence[str]) -> dict[str, str]:
    """Flags without dashes and what follows them."""
    found = {}
    for position, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            found[name] = value if equals else following
    return found


def _choose_classes(
    plain: dict[str, Any], arguments: Sequence[str], fields: Sequence[str], classes: Sequence[type]
) -> dict[str, Any]:
    """The base with another class where a flag names one: it keeps the fields that all solvers (optimizers) share."""
    values = _values(arguments)
    hints = typing.get_type_hints(TrainConfig)
    plain = dict(plain)
    for name in fields:
        family = _family(hints[name])
        chosen = values.get(name, "").rpartition(".")[2]
        if family is None:
            continue
        found = members(family, classes)
        asked = values.get(f"{name}.help", "").rpartition(".")[2]
        if asked and not asked.startswith("-") and asked not in found:
            raise UsageError(f"--{name}.help: unknown class {asked!r}; {nearest(asked, found)}")
        if not chosen or chosen == "null":
            continue
        if chosen not in found:
            raise UsageError(f"--{name}: unknown class {chosen!r}; {nearest(chosen, found)}")
        path, old = public_path(found[chosen]), plain[name]
        if old is not None and old["class_path"] != path:
            shared = {field.name for field in dataclasses.fields(family)} if name != "data" else set()
            kept = {key: value for key, value in old["init_args"].items() if key in shared}
            plain[name] = {"class_path": path, "init_args": kept}
    return plain


def _check_names(
    plain: dict[str, Any],
    arguments: Sequence[str],
    fields: Sequence[str],
    own: Sequence[tuple[str, dict[str, Any]]],
    classes: Sequence[type],
) -> None:
    values = _values(arguments)
    hints = typing.get_type_hints(TrainConfig)
    known = {name[2:] for name, _ in own if name.startswith("--")} | {"help"}
    for name in fields:
        known |= _names(name, hints[name], plain.get(name), values, classes)
    for given in values:
        if given and given not in known:
            raise UsageError(f"unknown flag --{given}; {nearest_flag(given, known)}")


def _names(name: str, hint: Any, value: Any, values: dict[str, str], classes: Sequence[type]) -> set[str]:
    """Flags of a field and of the fields inside it."""
    names = {name}
    family = _family(hint)
    if family is not None:
        names.add(f"{name}.help")
        found = members(family, classes)
        given = values.get(name, "").rpartition(".")[2]
        if given.isidentifier() and given not in {*found, "null"}:
            raise UsageError(f"--{name}: unknown class {given!r}; {nearest(given, found)}")
        chosen = given or (value or {}).get("class_path", "").rpartition(".")[2]
        if chosen not in found:
            return names
        cls, inside = found[chosen], (value or {}).get("init_args", {})
        if not inside:
            inside = {
                field.name: to_plain(field.default)
                for field in dataclasses.fields(cls)
                if dataclasses.is_dataclass(field.default)
            }
    elif inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        cls, inside = hint, value or {}
    else:
        return names
    for inner, inner_hint in typing.get_type_hints(cls).items():
        if inner in {field.name for field in dataclasses.fields(cls)} and not needs_python(inner_hint):
            names |= _names(f"{name}.{inner}", inner_hint, inside.get(inner), values, classes)
    return names


def nearest_flag(given: str, known: set[str]) -> str:
    """End of a message about an unknown flag: the most similar one, first among the fields of the same class."""
    head, _, tail = given.rpartition(".")
    fields = {name.rpartition(".")[2] for name in known if head and name.rpartition(".")[0] == head} - {"help"}
    prefix, wanted, names = (f"--{head}.", tail, fields) if fields else ("--", given, known)
    close = difflib.get_close_matches(wanted, sorted(names), n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix + close[0]}?"
    return f"known: {', '.join(prefix + name for name in sorted(names))}" if fields else "--help lists all"
