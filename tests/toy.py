"""A data set and a model so small that a whole training run takes half a second; also a program for other processes."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise import cli, zoo
from equipoise.data import ImageData, Splits, TensorSplit
from equipoise.train import Adam, LRSchedule, Observer, Pretraining, Result, TrainConfig, fit
from equipoise.train.serialize import from_plain, to_plain
from equipoise.zoo import Classify, JacobianPenalty, MDEQConfig, ScaledLayers, SLLLayers, files

MODEL = MDEQConfig(
    image_size=4,
    image_channels=1,
    num_classes=3,
    channels=(4, 4),
    expansion=1,
    num_groups=2,
    dropout=0.2,
    head_channels=(1, 1),
    final_channels=4,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(ImageData):
    """Noise with a bright row whose number is the label."""

    count: int = 36
    mean: tuple[float, ...] = (0.4,)
    std: tuple[float, ...] = (0.3,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, 4, 4)

    def load(self) -> Splits:
        source = torch.Generator().manual_seed(7)
        images = torch.randint(0, 150, (self.count + 15, 1, 4, 4), generator=source, dtype=torch.uint8)
        labels = torch.randint(0, 3, (len(images),), generator=source)
        images[torch.arange(len(images)), 0, labels] += 100
        train, validation = self._carve(images[15:], labels[15:])
        return Splits(train, validation, TensorSplit(images[:15], labels[:15]), ("first", "second", "third"))


CLASSES = (*zoo.CLASSES, Toy)
command_line = functools.partial(cli.main, classes=CLASSES)
read_config = functools.partial(files.read_config, classes=CLASSES)

PLAIN = TrainConfig(
    name="toy",
    data=Toy(),
    model=MODEL,
    task=Classify(),
    solver=eq.Broyden(max_steps=4, memory=4),
    gradient=eq.Shine(),
    optimizer=Adam(lr=0.01),
    epochs=2,
    batch_size=8,
    eval_batch_size=10,
    log_every=3,
    tensorboard=False,
)
"""Four steps in each of two epochs, four images left over."""

FULL = dataclasses.replace(
    PLAIN,
    data=Toy(crop_padding=1, flip=True, validation_fraction=0.1),
    task=Classify(
        pretraining=Pretraining(steps=2, depth=2),
        penalty=JacobianPenalty(weight=0.1, probability=0.5),
        label_smoothing=0.1,
    ),
    optimizer=Adam(lr=0.01, weight_decay=0.01),
    schedule=LRSchedule(warmup_steps=3, final_lr=1e-4),
    clip_norm=1.0,
    ema_decay=0.9,
    checkpoint_every=1,
)
"""Everything at once that has a state or is random."""


def contracting_toys() -> dict[str, TrainConfig]:
    """Runs whose map contracts, one of each kind of layers; the caps are so low that they bind from the beginning."""
    layers = {"scaled": ScaledLayers(slope=0.8, cap=0.5), "tight": SLLLayers(ceiling=0.5)}
    base = dataclasses.replace(FULL, checkpoint_every=None, task=Classify(label_smoothing=0.1))
    return {kind: zoo.contracting(base, each) for kind, each in layers.items()}


Run = Callable[[TrainConfig], Result]


class Interrupted(Exception):
    """Stands for whatever ends a run early."""


class Interrupt(Observer):
    """Ends a run when it has read the loss of a step, and collects what a user is told."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.notes: list[str] = []

    def stepped(self, line: dict[str, Any]) -> None:
        if line["step"] == self.step:
            raise Interrupted

    def noted(self, text: str) -> None:
        self.notes.append(text)


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a log without the times, the only numbers that may differ between equal runs."""
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


class GroupNorm(nn.GroupNorm):
    """Takes the place of BatchNorm2d where the images of a batch are not to look at each other."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__(1, channels, affine=affine)


def main() -> None:
    """Train, or go on, in another process: its arguments are the configuration as JSON and the run folder.

    The variable `TOY_DIES` names the step on which it kills itself; `TOY_ALONE` replaces BatchNorm.
    """

    class Announce(Observer):
        def started(self, *_: object) -> None:
            print("started", flush=True)

        def stepped(self, line: dict[str, Any]) -> None:
            if str(line["step"]) == os.environ.get("TOY_DIES"):
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    if "TOY_ALONE" in os.environ:
        nn.BatchNorm2d = GroupNorm  # type: ignore[assignment, misc]
    config = from_plain(TrainConfig, json.loads(sys.argv[1]), CLASSES)
    fit(config, run_dir=pathlib.Path(sys.argv[2]), resume=True, observer=Announce())


def command(config: TrainConfig, run_dir: pathlib.Path) -> list[str]:
    """The command line of `main`; its process needs the environment `ENVIRONMENT`."""
    return [sys.executable, "-W", "ignore", str(WORKER), json.dumps(to_plain(config)), str(run_dir)]


WORKER = pathlib.Path(__file__).with_name("worker.py")
PATHS = [str(pathlib.Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}


def difference(value: Callable[[], Tensor], weights: Sequence[Tensor], directions: Sequence[Tensor], h: float) -> float:
    """The derivative of `value()` along directions in the weights, by a central difference."""

    def moved(step: float) -> float:
        with torch.no_grad():
            torch._foreach_add_(list(weights), list(directions), alpha=step)
            found = value().item()
            torch._foreach_add_(list(weights), list(directions), alpha=-step)
        return found

    return (moved(h) - moved(-h)) / (2 * h)


def assert_slopes(loss: Callable[[], Tensor], weights: Sequence[Tensor], seed: int = 1) -> None:
    """Check the gradient of each tensor along a random direction against a central difference."""
    slopes = torch.autograd.grad(loss(), weights)
    for weight, slope, direction in zip(weights, slopes, directions(weights, seed), strict=True):
        expected = difference(loss, [weight], [direction], 1e-4)
        assert abs(float((slope * direction).sum()) - expected) <= max(1e-4 * abs(expected), 1e-9)


def directions(weights: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(weight.shape, generator=source) for weight in weights]
