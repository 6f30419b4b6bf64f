"""Files of the zoo: saved models and configurations, built from known classes alone."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from equipoise.files import CheckpointError, RunError, read_tensors
from equipoise.gradients import Gradient
from equipoise.solvers import Solver
from equipoise.train import ModelConfig, TrainConfig
from equipoise.train.checkpoint import written_by
from equipoise.train.proof import prove
from equipoise.train.run_folder import read_plain
from equipoise.train.serialize import from_plain, to_plain
from equipoise.zoo import CLASSES


def load(path: str | os.PathLike[str], *, classes: Iterable[type] = CLASSES) -> Any:
    """Load a model that `save` wrote, in evaluation mode, on the CPU.

    Only safetensors are read, and only the given classes are built; nothing in the file can run code. The certificates
    are computed again.

    Args:
        path: of the file.
        classes: that the file may name; for a model of your own `(*CLASSES, MyConfig)`.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, of another kind, names another class, or claims a
            contraction that its weights do not prove.
    """
    tensors, facts = read_tensors(Path(path))
    if facts.get("kind") != "model":
        raise CheckpointError(f"{path} is no saved model but {facts.get('kind', 'something else')!r}")
    try:
        config = from_plain(ModelConfig, facts["config"], classes, "model")
        model = config.build(
            solver=from_plain(Solver, facts["solver"], classes, "solver"),
            gradient=from_plain(Gradient, facts["gradient"], classes, "gradient"),
        )
        dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
        model.to(dtype).load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not describe a model of this version: {error}{written_by(facts)}"
        ) from error
    try:
        prove(model.eval()).supports(facts.get("certificate") or {})  # files of older versions claim nothing
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is not what it says: {error}") from error
    return model


def read_config(
    path: str | os.PathLike[str], base: TrainConfig | None = None, *, classes: Iterable[type] = CLASSES
) -> TrainConfig:
    """Read a configuration from a YAML file.

    Args:
        path: of the file.
        base: source of the fields that the file does not name; None: the file names all that have no default.
        classes: that the file may name.

    Raises:
        RunError: the file is missing or no YAML, a key or class is unknown (the nearest known one is named), a value
            is of another type or out of range.
    """
    content = read_plain(path)
    written = written_by(content) if base is None and "name" in content else ""
    content.pop("version", None)
    if base is not None:
        content = overlay(to_plain(base), content)
    try:
        return from_plain(TrainConfig, content, classes)
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: {error}{written}") from error


def folder_config(folder: Path, *, classes: Iterable[type] = CLASSES) -> TrainConfig:
    """Read the configuration of the run in a folder.

    Args:
        folder: of the run.
        classes: that its configuration may name.

    Raises:
        RunError: it holds none, or one of another kind; the message says what to use.
    """
    if (folder / "config.yaml").is_file():
        return read_config(folder / "config.yaml", classes=classes)
    if (folder / "config.json").is_file():
        raise RunError(
            f"{folder} holds a model of `equipoise tune`. It takes rows, in Python: from equipoise.estimators import "
            f"load, read_rows; model = load({str(folder / 'model.safetensors')!r}); "
            "model.predict(read_rows('new.csv', model.encoding_))"
        )
    raise RunError(f"{folder} is not a run folder: it has no config.yaml")


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one plain configuration over another; a class that differs replaces the one below with all its fields.

    Fields without a class are those of the class below: `model: {dropout: 0}`.
    """
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and "class_path" in old and "class_path" not in value:
            value = {"class_path": old["class_path"], "init_args": value.get("init_args", value)}
        if isinstance(value, dict) and isinstance(old, dict) and value.get("class_path") == old.get("class_path"):
            merged[key] = overlay(old, value)
        else:
            merged[key] = value
    return merged
