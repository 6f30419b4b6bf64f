"""Flags for the fields of a configuration, checked as a configuration file is."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import docstring_parser
import yaml

from equipoise.cli.errors import UsageError
from equipoise.data import Data
from equipoise.train import TrainConfig
from equipoise.train.serialize import from_plain, members, nearest, needs_python, public_path, to_plain
from equipoise.zoo import CLASSES

Option = tuple[str, dict[str, Any]]
"""Name or flag of a command's own option, with keywords of `argparse.ArgumentParser.add_argument`."""


class Parser(argparse.ArgumentParser):
    """Parser of a command's own options; an error is one line that ends with the usage."""

    def __init__(self, own: Sequence[Option], **texts: Any) -> None:
        super().__init__(
            **texts,
            allow_abbrev=False,
            add_help=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        )
        group = self.add_argument_group("options")
        for name, details in own:
            (group if name.startswith("-") else self).add_argument(name, **details)
        group.add_argument("-h", "--help", action="help", help="show this help")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; usage: {self.usage}")


@dataclasses.dataclass(frozen=True)
class Field:
    """Field of a configuration that a flag sets.

    Args:
        flag: name without dashes, such as `solver.max_steps`.
        hint: type.
        value: present value, as plain data.
        text: description.
    """

    flag: str
    hint: Any
    value: Any
    text: str


def parse(
    arguments: Sequence[str],
    base: Callable[[argparse.Namespace | None], TrainConfig],
    *,
    own: Sequence[Option],
    fields: Sequence[str] | None = None,
    classes: Sequence[type] = CLASSES,
    usage: str,
    description: str,
    examples: str,
) -> tuple[TrainConfig, argparse.Namespace]:
    """Read a configuration and a command's own options from a command line.

    Args:
        arguments: words after the command.
        base: returns the configuration that flags change, from the options; from None for the help of the command.
        own: options of the command itself.
        fields: names of the fields of the configuration that have flags; None: all but `name`.
        classes: that flags may name.
        usage: first line of the help.
        description: paragraph of the help, in which {name} stands for the name of the configuration.
        examples: end of the help.

    Raises:
        UsageError: an unknown flag, the nearest known one being named, or a value of another type or out of range.
    """
    words, flags = _separate([spell(argument, own) for argument in arguments], own)
    asked = any(flag.endswith(".help") for flag in flags) or bool({"-h", "--help"} & set(words))
    parser = Parser(own, usage=usage, epilog=examples)
    try:
        options = parser.parse_args([word for word in words if word not in ("-h", "--help")])
    except UsageError:
        if not asked:
            raise
        options = None
    names = [f.name for f in dataclasses.fields(TrainConfig) if f.name != "name"] if fields is None else fields
    start = base(options)
    parser.description = description.format(name=start.name)
    tree = _Tree(to_plain(start), names, classes)
    for flag, text in sorted(flags.items(), key=lambda item: item[0].count(".")):  # a class before its fields
        target = flag.removesuffix(".help")
        try:
            tree.assign(target, text)
        except LookupError:
            known = {name[2:] for name, _ in own if name.startswith("--")} | {"help"}
            for field in tree.fields():
                known |= {field.flag, f"{field.flag}.help"} if family(field.hint) else {field.flag}
            raise UsageError(f"unknown flag --{flag}; {nearest_flag(flag, known)}") from None
        if flag != target:
            _show(Parser((), usage=argparse.SUPPRESS), tree, f"{target}.")
    if asked or options is None:
        _show(parser, tree)
    try:
        return from_plain(TrainConfig, tree.plain, classes), options
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse_own(
    arguments: Sequence[str], own: Sequence[Option], *, usage: str, description: str, examples: str
) -> argparse.Namespace:
    """Read the options of a command that has no configuration; arguments as in `parse`."""
    words, flags = _separate([spell(argument, own) for argument in arguments], own)
    for flag in flags:
        known = {name[2:] for name, _ in own if name.startswith("--")}
        raise UsageError(f"unknown flag --{flag}; {nearest_flag(flag, known)}")
    return Parser(own, usage=usage, description=description, epilog=examples).parse_args(words)


def _show(parser: Parser, tree: _Tree, prefix: str = "") -> NoReturn:
    """Print a help text with the fields whose flags begin with a prefix, and stop."""
    tree.describe(parser, prefix)
    parser.print_help()
    raise SystemExit(0)


def _separate(words: Sequence[str], own: Sequence[Option]) -> tuple[list[str], dict[str, str]]:
    """Split a command line into the command's own words and flags of the configuration with their values."""
    mine, flags = [], {}
    known = {name for name, _ in own} | {"--help"}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("--") or name in known:
            mine.append(word)
            continue
        value = value if equals else next(rest, "--")
        if value.startswith("--"):
            raise UsageError(f"{name}: expected one argument")
        flags[name[2:]] = value
    return mine, flags


@dataclasses.dataclass(frozen=True)
class _Tree:
    """Plain configuration whose fields flags set.

    Args:
        plain: configuration as plain data; changed in place.
        names: fields of the configuration that have flags.
        classes: that flags may name.
    """

    plain: dict[str, Any]
    names: Sequence[str]
    classes: Sequence[type]

    def assign(self, flag: str, text: str) -> None:
        """Set the field of a flag.

        Raises:
            LookupError: there is no such field.
            UsageError: an unknown class, or a field of a class that is not chosen.
        """
        if flag.partition(".")[0] not in self.names:
            raise LookupError(flag)
        plain = self.plain
        cls: Any = TrainConfig
        path = flag.split(".")
        for depth, name in enumerate(path, start=1):
            field = next((field for field in dataclasses.fields(cls) if field.name == name), None)
            hint = typing.get_type_hints(cls).get(name)
            if field is None or needs_python(hint):
                raise LookupError(flag)
            if name not in plain and dataclasses.is_dataclass(field.default):
                plain[name] = to_plain(field.default)
            if depth == len(path):
                plain[name] = self._member(hint, plain.get(name), flag, text) if family(hint) else _read(hint, text)
                return
            chosen = ".".join(path[:depth])
            if not isinstance(plain.get(name), dict):
                if family(hint) is None:
                    raise LookupError(flag)
                raise UsageError(f"--{flag}: --{chosen} is null; name its class first, --{chosen} CLASS")
            cls = self._class(hint, plain[name])
            plain = plain[name].get("init_args", plain[name])

    def fields(self) -> list[Field]:
        """List the fields and the fields inside them."""
        return list(self._fields(TrainConfig, self.plain, self.names, ""))

    def describe(self, parser: argparse.ArgumentParser, prefix: str = "") -> None:
        """Add the fields whose flags begin with a prefix to a help text, with a group for each class."""
        common = group = parser.add_argument_group("fields of the configuration")
        for field in self.fields():
            if not field.flag.startswith(prefix):
                continue
            text, base = field.text, family(field.hint)
            plain_class = base is None and dataclasses.is_dataclass(field.hint)
            if "." not in field.flag:
                group = parser.add_argument_group(text.rstrip(".")) if base is not None or plain_class else common
            if base is not None:
                names = ", ".join(sorted(members(base, self.classes)))
                text += f" One of {names}; its fields follow as --{field.flag}.FIELD."
                group.add_argument(f"--{field.flag}.help", metavar="CLASS", help="show the fields of a class")
            if not plain_class:
                text = f"{text} [{_shown(field.value)}]".replace("%", "%%")
                group.add_argument(f"--{field.flag}", metavar=_type_name(field.hint), help=text)

    def _fields(self, cls: type, plain: dict[str, Any], names: Iterable[str], prefix: str) -> Iterator[Field]:
        hints, texts = typing.get_type_hints(cls), _descriptions(cls)
        for name in names:
            hint, value = hints[name], plain.get(name)
            if needs_python(hint):
                continue
            yield Field(prefix + name, hint, value, texts.get(name, ""))
            if isinstance(value, dict):
                chosen = self._class(hint, value)
                hints_inside = typing.get_type_hints(chosen)
                inside = [f for f in dataclasses.fields(chosen) if not needs_python(hints_inside[f.name])]
                defaults = {f.name: to_plain(f.default) for f in inside if f.default is not dataclasses.MISSING}
                value = defaults | value.get("init_args", value)
                yield from self._fields(chosen, value, [f.name for f in inside], f"{prefix}{name}.")

    def _class(self, hint: Any, plain: dict[str, Any]) -> type:
        """Return the dataclass that a plain value is of."""
        base = family(hint)
        if base is None:
            return typing.cast(type, hint)
        return members(base, self.classes)[plain["class_path"].rpartition(".")[2]]

    def _member(self, hint: Any, old: Any, flag: str, text: str) -> Any:
        """Return the plain form of a class; it keeps the fields that all solvers (optimizers) share."""
        if text == "null":
            return None
        base: Any = family(hint)
        classes, name = members(base, self.classes), text.rpartition(".")[2]
        if name not in classes:
            raise UsageError(f"--{flag}: unknown class {name!r}; {nearest(name, classes)}")
        path = text if "." in text else public_path(classes[name])
        if old is not None and self._class(hint, old) is classes[name]:
            return {**old, "class_path": path}
        # Sources of data share a mean and a split, which belong to one of them.
        shared = set() if issubclass(base, Data) else {field.name for field in dataclasses.fields(base)}
        kept = {key: value for key, value in (old or {"init_args": {}})["init_args"].items() if key in shared}
        return {"class_path": path, "init_args": kept}


def _read(hint: Any, text: str) -> Any:
    """Read a value that is no class: a string as it is, all else as YAML."""
    options = typing.get_args(hint) or (hint,)
    if text == "null" and type(None) in options:
        return None
    if str in options or typing.get_origin(hint) is typing.Literal:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # refused later, with the type that the field has


def _descriptions(cls: type) -> dict[str, str]:
    """Read the descriptions of fields from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        if dataclasses.is_dataclass(kind):
            for entry in docstring_parser.parse_from_object(kind).params:
                text = re.sub(r"\$([^$]*)\$", lambda formula: formula[1].replace("\\", ""), entry.description or "")
                found[entry.arg_name] = re.sub(r"\bNone\b", "null", " ".join(text.split()))  # as a flag spells it
    return found


def _shown(value: Any) -> str:
    """Return a plain value as a flag spells it."""
    if isinstance(value, dict):
        items = value.get("init_args", value).items()
        inside = ", ".join(f"{key}={_shown(item)}" for key, item in items if item is not None)
        return f"{value.get('class_path', '').rpartition('.')[2]}({inside})"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_shown, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type_name(hint: Any) -> str:
    base = family(hint)
    if base is not None:
        return base.__name__.upper()
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        return "[A,B,...]"
    names = [getattr(option, "__name__", str(option)) for option in typing.get_args(hint) or (hint,)]
    return "|".join("null" if name == "NoneType" else name for name in names)


def family(hint: Any) -> type | None:
    """Return the abstract class whose members a field takes, None for another field."""
    if typing.get_origin(hint) is tuple:  # several of them are written as a list
        return None
    for option in typing.get_args(hint) or (hint,):
        if inspect.isclass(option) and inspect.isabstract(option) and dataclasses.is_dataclass(option):
            return option
    return None


def spell(argument: str, own: Sequence[Option]) -> str:
    """Return a flag with underscores, or as the command spells its own."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    for known, _ in own:
        if known.replace("-", "_") == name.replace("-", "_"):
            return known + equals + value
    return "--" + name[2:].replace("-", "_") + equals + value


def nearest_flag(given: str, known: set[str]) -> str:
    """End a message about an unknown flag: the most similar one, first among the fields of the same class."""
    head, _, tail = given.rpartition(".")
    fields = {name.rpartition(".")[2] for name in known if head and name.rpartition(".")[0] == head} - {"help"}
    prefix, wanted, names = (f"--{head}.", tail, fields) if fields else ("--", given, known)
    close = difflib.get_close_matches(wanted, sorted(names), n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix + close[0]}?"
    return f"known: {', '.join(prefix + name for name in sorted(names))}" if fields else "--help lists all"
