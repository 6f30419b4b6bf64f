"""Folder of a run: configuration, log, checkpoints and result."""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equipoise
from equipoise.files import RunError, write_atomic
from equipoise.train import checkpoint
from equipoise.train.config import TrainConfig
from equipoise.train.serialize import to_plain

# Fields that may differ when a run is resumed: where and how it is executed and logged.
FREE = (
    *("version", "name", "accelerator", "devices", "num_nodes", "strategy", "eval_batch_size"),
    *("log_every", "checkpoint_every", "tensorboard"),
)
PLACES = {"data.root", "data.source"}  # data may have moved; the caller vouches that it is the same


def write_config(config: TrainConfig, path: Path) -> None:
    """Write a configuration as YAML, atomically."""
    write_atomic(path, config_yaml(config).encode())


def config_yaml(config: TrainConfig) -> str:
    """Format a configuration, and the version that wrote it, as YAML."""
    import yaml

    return yaml.safe_dump({"version": equipoise.__version__, **to_plain(config)}, sort_keys=False, allow_unicode=True)


def read_plain(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file as plain data.

    Raises:
        RunError: it is missing, no YAML, or no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} must hold the fields of a configuration, got {type(content).__name__}")
    return content


def read_lines(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a run's `metrics.jsonl`, without one that a crash cut off."""
    path = Path(folder) / "metrics.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


@dataclasses.dataclass
class RunFolder:
    """An open run folder.

    Args:
        path: of the folder.
        config: of the run.
        writes: whether this process writes; one of several does.
        note: called with messages for the user.
    """

    path: Path
    config: TrainConfig
    writes: bool
    note: Callable[[str], None]
    events: Any = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the resumable checkpoints."""
        return self.path / "checkpoints"

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Take the folder for this run.

        Raises:
            RunError: it holds a run and neither `resume` nor `overwrite` is set, or the configurations differ.
            OSError: it cannot be written.
        """
        found = self.path / "config.yaml"
        if found.exists() and not (resume or overwrite):
            raise RunError(
                f"{self.path} already holds a run; continue it with --resume, replace it with --overwrite, or choose "
                "another --run-dir"
            )
        if found.exists() and resume:
            old, new = read_plain(found), to_plain(self.config)
            differences = _differences(old, new)
            if differences and checkpoint.written_by(old):
                raise RunError(f"{self.path} cannot be resumed{checkpoint.written_by(old)}")
            if differences:
                raise RunError(
                    f"{self.path} cannot be resumed with another configuration: {'; '.join(differences)}. Drop these "
                    "flags, or start a new run in another --run-dir"
                )
            if old != {"version": old.get("version"), **new}:  # in free fields
                write_config(self.config, found)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        own = [self.path / name for name in ("result.json", "metrics.jsonl", "model.safetensors", "report.html")]
        for file in (*checkpoint.states(self.checkpoints), *own, *self.path.glob("events.out.tfevents.*")):
            file.unlink(missing_ok=True)
        write_config(self.config, found)

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop lines of the log after a step, and the final evaluation; return the others."""
        kept = [line for line in read_lines(self.path) if line["step"] <= step and line["split"] != "test"]
        if self.writes:
            for left_over in self.path.rglob(".*.tmp"):  # of processes that were killed
                left_over.unlink(missing_ok=True)
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomic(self.path / "metrics.jsonl", text.encode())
            if self.config.tensorboard:
                self.events = _event_writer(self.path, step)
        return kept

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl` and to the TensorBoard events."""
        if not self.writes:
            return
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.events is not None:
            prefix = line["split"] if line["kind"] == "epoch" else f"{line['split']}_{line['kind']}"
            for name, value in line.items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                    self.events.add_scalar(f"{prefix}/{name}", value, line["step"])
            self.events.flush()

    def finish(self, result: dict[str, Any]) -> None:
        """Write `result.json`, the last file of a run."""
        if self.writes:
            write_atomic(self.path / "result.json", (json.dumps(result, indent=2) + "\n").encode())

    def close(self) -> None:
        """Close the event file."""
        if self.events is not None:
            self.events.close()


def new_folder(name: str) -> Path:
    """Return the first free folder `runs/<name>-<number>`."""
    paths = (Path("runs") / f"{name}-{number}" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def _event_writer(path: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError(
            "TensorBoard events need tensorboard: pip install 'equipoise[train]', or pass --tensorboard false"
        ) from error
    return SummaryWriter(str(path), purge_step=step + 1 if step else None)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        if not prefix and key in FREE:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b and (name := (prefix + key).replace(".init_args", "")) not in PLACES:
            found.append(f"{name} was {a} and is {b} now")
    return found
