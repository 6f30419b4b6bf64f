"""Files of training: models with their configuration, resumable checkpoints. Nothing that is read can run code."""

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
from equipoise.train.proof import prove
from equipoise.train.serialize import to_plain
from equipoise.train.task import ModelConfig

KEEP = 2  # resumable checkpoints in a run folder


def save(model: Any, path: str | os.PathLike[str], *, about: Mapping[str, Any] | None = None) -> None:
    """Save a model with its configuration, solver, gradient and certificate in one safetensors file, atomically.

    The file also holds the certificates of the map, in evaluation and in training, or the reason why there are none.

    Args:
        model: a module whose `config` is a `ModelConfig` that builds it.
        path: of the file; its folder exists.
        about: further facts as plain JSON data, such as class names.

    Raises:
        ValueError: the model is of another kind, or its solver or gradient holds a value that a file cannot.
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
    facts = {
        "kind": "model",
        "version": equipoise.__version__,
        "config": to_plain(model.config),
        "solver": to_plain(model.deq.solver),
        "gradient": to_plain(model.deq.gradient),
        "certificate": prove(model).as_dict(),
        "about": dict(about or {}),
    }
    write_tensors(Path(path), model.state_dict(), facts)


def _rebuilds(model: Any) -> bool:
    """Return whether a model's configuration builds models of its class."""
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return False
    with torch.random.fork_rng([]):
        return type(config.build()) is type(model)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the facts saved with a model: class, configuration, solver, gradient, certificate, `about`."""
    return read_facts(Path(path))


def written_by(facts: Mapping[str, Any]) -> str:
    """End a message about a file with the version that wrote it; empty if it is this version."""
    version = facts.get("version", "0.1.0")
    return "" if version == equipoise.__version__ else f". Equipoise {version} wrote it; that version reads it"


@dataclasses.dataclass(frozen=True)
class State:
    """Resumable state of a run.

    Args:
        tensors: weights, moving average and moments of the optimizer, by name.
        facts: progress and plain values of the optimizer.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, kind: str) -> dict[str, Tensor]:
        """Return the tensors of one kind, `model`, `average` or `optimizer`."""
        return {name.removeprefix(f"{kind}."): t for name, t in self.tensors.items() if name.startswith(f"{kind}.")}


def write_state(folder: Path, step: int, state: State) -> Path:
    """Add a resumable checkpoint to a folder and keep the last two."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.safetensors"
    write_tensors(path, state.tensors, {"kind": "state", **state.facts})
    for old in states(folder)[KEEP:]:
        old.unlink()
    return path


def read_newest_state(folder: Path) -> tuple[State | None, list[str]]:
    """Read the newest undamaged checkpoint; return it, and the problems of newer ones."""
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
    """Return the model in a resumable checkpoint (its moving average if there is one), in evaluation mode.

    Raises:
        CheckpointError: the checkpoint is of another configuration.
    """
    model = config.build()
    tensors = state.part("average") or state.part("model")
    try:
        model.to(next(t.dtype for t in tensors.values() if t.is_floating_point())).load_state_dict(tensors)
    except (RuntimeError, StopIteration) as error:
        raise CheckpointError(f"the checkpoint does not fit the configuration: {error}") from error
    return model.eval()


def states(folder: Path) -> list[Path]:
    """List the resumable checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state of an optimizer into named tensors and plain facts."""
    content = optimizer.state_dict()
    state = {f"{number}.{name}": v for number, entries in content["state"].items() for name, v in entries.items()}
    tensors = {f"optimizer.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    return tensors, {"state": plain, "groups": content["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, saved: State) -> None:
    """Restore the state of an optimizer from a checkpoint."""
    facts, state = saved.facts["optimizer"], dict[int, dict[str, Any]]()
    for key, value in {**saved.part("optimizer"), **facts["state"]}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
