"""Files of training: models with their configuration, resumable states. Nothing here runs code."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import equipoise
from equipoise.files import CheckpointError, read_facts, read_tensors, write_tensors
from equipoise.train.config import TrainConfig
from equipoise.train.model import ModelConfig
from equipoise.train.proof import prove
from equipoise.train.serialize import to_plain

KEEP = 2  # resumable checkpoints in a run folder


def save(model: Any, path: str | os.PathLike[str], *, about: Mapping[str, Any] | None = None) -> None:
    """Save a model with its configuration, solver, gradient and certificate in one safetensors file, atomically.

    The certificates of the map, in evaluation and in training, are among the facts, or the reason why there are none.

    Args:
        model: a module whose `config` is a `ModelConfig` that builds it.
        path: of the file; its folder exists.
        about: further facts as plain JSON data, such as class names.

    Raises:
        ValueError: the model is of another kind, or its solver or gradient holds what a file cannot.
        CertificateError: the solver was given a Lipschitz constant that the weights do not prove.
        OSError: the file cannot be written; an older one of the same name stays.

    Example:
        >>> import tempfile, pathlib, equipoise as eq
        >>> from equipoise.train import save
        >>> from equipoise.zoo import MDEQClassifier, MDEQConfig
        >>> from equipoise.zoo.files import load
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save(MDEQClassifier(MDEQConfig.digits(), solver=eq.Broyden(memory=18)), path)
        >>> load(path).deq.solver.memory
        18
    """
    if not _rebuilds(model):
        raise ValueError(
            f"cannot save a {type(model).__name__}: its `config` is no ModelConfig that builds it. Save its state_dict"
        )
    config = {
        "config": to_plain(model.config),
        "solver": to_plain(model.deq.solver),
        "gradient": to_plain(model.deq.gradient),
        "certificate": prove(model).as_dict(),
        "about": dict(about or {}),
    }
    write_tensors(Path(path), model.state_dict(), {"kind": "model", "version": equipoise.__version__, **config})


def _rebuilds(model: Any) -> bool:
    """Whether a model's configuration builds models of its class."""
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return False
    with torch.random.fork_rng([]):
        return type(config.build()) is type(model)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts saved with a model: class, configuration, solver, gradient, certificate, what was passed as `about`."""
    return read_facts(Path(path))


def written_by(facts: Mapping[str, Any]) -> str:
    """End of a message about a file of another version; empty if this version wrote it."""
    version = facts.get("version", "0.1.0")
    return "" if version == equipoise.__version__ else f". Equipoise {version} wrote it; that version reads it"


@dataclasses.dataclass(frozen=True)
class State:
    """All that a run needs to go on: tensors by name (weights, average, moments) and plain facts (place, sums)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write_state(folder: Path, step: int, state: State) -> Path:
    """Add a resumable checkpoint to a folder and keep the last two."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.safetensors"
    write_tensors(path, state.tensors, {"kind": "state", **state.facts})
    for old in states(folder)[KEEP:]:
        old.unlink()
    for left_over in folder.glob(".*.tmp"):  # of processes that were killed
        left_over.unlink(missing_ok=True)
    return path


def read_newest_state(folder: Path) -> tuple[State | None, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with newer ones."""
    problems: list[str] = []
    for path in states(folder):
        try:
            tensors, facts = read_tensors(path)
            if facts.get("kind") != "state":
                raise CheckpointError(f"{path} is no checkpoint of a run")
            return State(tensors, facts), problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def model_of_state(state: State, config: TrainConfig) -> Any:
    """The model of a run in a resumable checkpoint (its moving average if there is one), in evaluation mode.

    Raises:
        CheckpointError: the checkpoint is of another configuration.
    """
    model = config.build()
    kind = "average." if any(name.startswith("average.") for name in state.tensors) else "model."
    tensors = {name.removeprefix(kind): value for name, value in state.tensors.items() if name.startswith(kind)}
    try:
        model.to(next(t.dtype for t in tensors.values() if t.is_floating_point())).load_state_dict(tensors)
    except (RuntimeError, StopIteration) as error:
        raise CheckpointError(f"the checkpoint does not fit the configuration: {error}") from error
    return model.eval()


def states(folder: Path) -> list[Path]:
    """The resumable checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and plain facts."""
    content = optimizer.state_dict()
    tensors, plain = {}, {}
    for number, entries in content["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{name}"] = value
            else:
                plain[f"{number}.{name}"] = value
    return tensors, {"state": plain, "groups": content["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Restore what `pack_optimizer` gave."""
    state: dict[int, dict[str, Any]] = {}
    named = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    for key, value in {**named, **facts["state"]}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
