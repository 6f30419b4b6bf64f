"""Files that survive: atomic writing, tensors with facts, the folder of the data. Nothing that is read can run code."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

CHECKSUM = "crc32"  # of the tensors, among the facts in a file


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or does not fit."""


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class DataError(ValueError):
    """Data that is missing or damaged; the message says what was looked for and what to do."""


def data_root() -> Path | None:
    """The folder that `EQUIPOISE_DATA` names, if any."""
    value = os.environ.get("EQUIPOISE_DATA")
    return Path(value) if value else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts to one safetensors file, atomically, with a checksum."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry, for safetensors writes several in random order: equal content is to give equal files.
    header = {"equipoise": json.dumps({**facts, CHECKSUM: _checksum(plain)})}
    write_atomic(path, to_bytes(plain, header))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file of `write_tensors`.

    Raises:
        CheckpointError: it is missing, truncated, damaged or of another kind.
    """
    facts = _header(path)
    with _readable(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the handle is no mapping
        if facts.pop(CHECKSUM, None) != _checksum(tensors):
            raise CheckpointError(f"{path} is damaged: its checksum is wrong")
    return tensors, facts


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone of a file of `write_tensors`; its tensors are neither read nor checked.

    Raises:
        CheckpointError: it is missing, truncated or of another kind.
    """
    facts = _header(path)
    facts.pop(CHECKSUM, None)
    return facts


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file by another content, at once or not at all, whenever the process or the machine stops.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), total))
    return total


def _header(path: Path) -> dict[str, Any]:
    with _readable(path) as file:
        text = (file.metadata() or {}).get("equipoise")
    if text is None:
        raise CheckpointError(f"{path} was not written by equipoise: it has tensors, but no configuration")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its configuration cannot be read ({error})") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path} is damaged: its configuration is not a mapping")
    return facts


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or no safetensors file ({error}); pickled checkpoints are never read"
        ) from error
