"""Two processes train, log and resume like one that is given both halves of each batch."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import ENVIRONMENT, MODEL, PLAIN, GroupNorm, Toy, command, timeless

from equipoise.data import derive_seed, generator
from equipoise.train import SGD, TrainConfig, checkpoint, evaluate, fit
from equipoise.train.run_folder import read_lines
from equipoise.zoo import MDEQClassifier
from equipoise.zoo.files import load

CONFIG = dataclasses.replace(
    PLAIN,
    data=Toy(validation_fraction=0.2),
    optimizer=SGD(lr=0.05),
    ema_decay=0.9,
    precision="64-true",
    accelerator="cpu",
    log_every=4,
    checkpoint_every=1,
)
"""Three steps in each of two epochs; seven images for validation, fifteen for the test: no process gets half."""
TWO = dataclasses.replace(CONFIG, devices=2, strategy="ddp")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def launch(config: TrainConfig, run_dir: pathlib.Path, torchrun: bool = False, **variables: str) -> int:
    """Trains, or goes on, in processes of their own; the exit status."""
    line = command(config, run_dir)
    if torchrun:
        options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        line = [sys.executable, "-W", "ignore", *options, *line[-3:]]
    done = subprocess.run(line, env={**ENVIRONMENT, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or variables, done.stderr[-4000:]
    return done.returncode


def state(run_dir: pathlib.Path) -> checkpoint.State:
    found, problems = checkpoint.read_newest_state(run_dir / "checkpoints")
    assert found is not None
    assert not problems
    return found


def by_hand(steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights, moments and losses of one process that averages the gradients of the halves of each batch.

    Each half has its own batch statistics and its own dropout, as on a device of its own.
    """
    split = CONFIG.data.load().train
    torch.manual_seed(derive_seed(0))
    torch.set_default_dtype(torch.float32)
    model = MDEQClassifier(MODEL, solver=CONFIG.solver, gradient=CONFIG.gradient).double()
    torch.set_default_dtype(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    losses = []
    for step in range(steps):
        epoch, batch = divmod(step, 3)
        rows = torch.randperm(29, generator=generator(0, epoch))[8 * batch : 8 * batch + 8]
        total = 0.0
        for rank in (0, 1):
            half = rows[rank::2]
            torch.manual_seed(derive_seed(0, step, rank, 3))
            images = CONFIG.data.prepare(split.images[half]).double()  # type: ignore[attr-defined]
            loss = F.cross_entropy(model(images), split.labels[half]) / 2  # type: ignore[attr-defined]
            loss.backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.schedule.lr(step, 6, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    weights = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    moments = {
        f"optimizer.{n}.momentum_buffer": optimizer.state[p]["momentum_buffer"]
        for n, p in enumerate(model.parameters())
    }
    return weights | moments, losses


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that Fabric launches, that dies in its last step, and that torchrun ends."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    assert launch(TWO, folder, TOY_DIES="6") != 0
    assert state(folder).facts["progress"]["step"] == 5
    launch(TWO, folder, torchrun=True)
    return folder


def test_steps(resumed: pathlib.Path) -> None:
    expected, losses = by_hand(6)
    found = state(resumed).tensors
    torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=1e-6, atol=1e-9)
    lines = read_lines(resumed)
    counts = [(line["kind"], line["split"], line["step"], line["count"]) for line in lines]
    assert counts == [
        ("epoch", "train", 3, 24),
        ("epoch", "validation", 3, 7),
        ("step", "train", 4, 32),
        ("epoch", "train", 6, 24),
        ("epoch", "validation", 6, 7),
        ("epoch", "test", 6, 15),
    ]
    train = [line["loss"] for line in lines if line["split"] == "train"]
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 3), (0, 4), (3, 6))]
    assert train == pytest.approx(means, rel=1e-5)


def test_result(resumed: pathlib.Path) -> None:
    found = json.loads((resumed / "result.json").read_text())
    assert found["world_size"] == 2
    again = evaluate(load(resumed / "model.safetensors"), CONFIG.data.load().test, CONFIG)
    assert again["count"] == 15
    assert found["test_accuracy"] == again["accuracy"]
    assert found["test_loss"] == pytest.approx(again["loss"], rel=1e-6)
    assert found["mean_steps"] == pytest.approx(again["mean_steps"])


def assert_close(found: checkpoint.State, expected: checkpoint.State, **near: float) -> None:
    for name, value in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], value, **near, msg=name)


@pytest.mark.extended
@pytest.mark.parametrize("torchrun", [False, True])
def test_killed(torchrun: bool, resumed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Runs that die twice, once or never end alike."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    for step in ("2", "6"):
        assert launch(TWO, run, torchrun, TOY_DIES=step) != 0
    for folder in (whole, run):
        launch(TWO, folder, torchrun)
        assert_close(state(folder), state(resumed), rtol=1e-9, atol=1e-12)
    ours, theirs = (timeless(read_lines(folder)) for folder in (run, whole))
    for one, other in zip(ours, theirs, strict=True):
        assert one == {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in other.items()}


def test_without_batch_statistics(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then two processes equal one."""
    one, two = (dataclasses.replace(each, model=dataclasses.replace(MODEL, dropout=0.0)) for each in (CONFIG, TWO))
    launch(two, tmp_path / "2", TOY_ALONE="1")
    monkeypatch.setattr(nn, "BatchNorm2d", GroupNorm)
    fit(one, run_dir=tmp_path / "1")
    assert_close(state(tmp_path / "2"), state(tmp_path / "1"), rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(read_lines(tmp_path / "1"), read_lines(tmp_path / "2"), strict=True):
        assert (ours["count"], ours["loss"]) == (theirs["count"], pytest.approx(theirs["loss"], rel=1e-5))
