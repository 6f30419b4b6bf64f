"""Progress, callbacks and result of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.train.task import SCORES


@dataclasses.dataclass(frozen=True)
class Result:
    """Training result.

    Args:
        model: the trained model (its moving average if there is one), in evaluation mode.
        history: one dict per epoch and split, as in `metrics.jsonl`.
        test: content of `result.json`.
        run_dir: folder of the run.
    """

    model: Any
    history: list[dict[str, Any]]
    test: dict[str, Any]
    run_dir: Path

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the test scores, the main one first; in `test` they have the prefix `test_`."""
        return tuple(name for name in SCORES if f"test_{name}" in self.test)

    @property
    def test_accuracy(self) -> float:
        """Share of the test images that are classified correctly."""
        return float(self.test["test_accuracy"])


class Observer:
    """Training callbacks; the base class does nothing."""

    def started(self, folder: Path, total_steps: int, done_steps: int, parameters: int) -> None:
        """Training begins or resumes."""

    def stepped(self, line: dict[str, Any]) -> None:
        """The loss was read; the line is as in `metrics.jsonl`."""

    def evaluating(self, split: str, done: int, total: int) -> None:
        """`done` images of a split are evaluated."""

    def logged(self, line: dict[str, Any]) -> None:
        """An epoch, or an evaluation, is over."""

    def noted(self, text: str) -> None:
        """A message for the user."""

    def finished(self, result: Result) -> None:
        """The run is over and saved."""


@dataclasses.dataclass
class Meter:
    """Sums over batches, and the times at their start.

    Args:
        sums: of the objective, float64 on the device; a list of those of all processes in a checkpoint.
        seconds: of training at the start.
        backward_seconds: of gradients at the start.
    """

    sums: Tensor
    seconds: float = 0.0
    backward_seconds: float = 0.0


@dataclasses.dataclass
class Progress:
    """Position in a run: everything that the loop changes, except weights and moments.

    Args:
        epoch_meter: sums since the start of the epoch.
        window_meter: sums since the last line of the log.
        step: optimizer steps made.
        epoch: epochs completed.
        batch: batches of the present epoch.
        seconds: of training.
        backward_seconds: of gradients.
    """

    epoch_meter: Meter
    window_meter: Meter
    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    backward_seconds: float = 0.0

    @classmethod
    def from_plain(cls, facts: Mapping[str, Any], device: torch.device) -> Progress:
        """Restore the progress in a checkpoint."""
        progress = cls(**{**facts, **{name: Meter(**facts[name]) for name in ("epoch_meter", "window_meter")}})
        for meter in (progress.epoch_meter, progress.window_meter):
            meter.sums = torch.tensor(meter.sums, dtype=torch.float64, device=device)
        return progress

    def meter(self, sums: Tensor) -> Meter:
        """Start a meter now."""
        return Meter(sums, self.seconds, self.backward_seconds)
