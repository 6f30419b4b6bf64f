"""`equipoise evaluate` and `equipoise predict` on a tiny run: what is read, what is refused, and how it is told."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from train.toy import PLAIN, Toy

from equipoise.cli import main
from equipoise.train import fit, load
from equipoise.train.loop import to_device


@pytest.fixture(autouse=True)
def _user_defaults() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run of the toy, which classifies 4x4 images by their brightest row."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    fit(PLAIN, run_dir=folder)
    return folder


def gray(folder: pathlib.Path, name: str = "image.png", size: tuple[int, int] = (4, 4)) -> pathlib.Path:
    """A PNG whose second row of four is bright."""
    pixels = np.full((4, 4), 40, dtype=np.uint8)
    pixels[1] = 220
    path = folder / name
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_evaluate_gives_the_numbers_of_the_run(run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    (found,) = lines(capsys.readouterr().out)
    result = json.loads((run / "result.json").read_text())
    assert found["count"] == 15
    assert found["accuracy"] == result["test_accuracy"]
    assert found["mean_steps"] == result["mean_steps"]
    assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-6)
    assert main(["evaluate", str(run)]) == 0
    table = capsys.readouterr().out
    for text in (f"{result['test_accuracy']:.4f}", "mean solver steps per sample", "test images", str(run)[:20]):
        assert text in table


@pytest.mark.parametrize(
    ("flags", "steps"), [(["--solver.max_steps", "2"], 2), (["--solver.max-steps=0"], 0), (["--solver", "Anderson"], 4)]
)
def test_evaluate_takes_another_solver_whatever_the_gradient(
    flags: list[str], steps: int, run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's gradient is Shine, which Anderson cannot serve in training."""
    assert main(["evaluate", str(run), "--split", "train", "--solver.rtol", "0", "--json", *flags]) == 0
    (found,) = lines(capsys.readouterr().out)
    assert found["mean_steps"] == steps
    assert found["count"] == 36
