"""`equipoise attack`: what it changes, what it tells and draws, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
import torch
from PIL import Image
from toy import PLAIN
from toy import command_line as main

from equipoise.inputs import Envelope
from equipoise.solvers import Picard
from equipoise.train import TrainConfig, fit, save
from equipoise.zoo import Adversarial, DenseConfig
from equipoise.zoo.files import load

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow  # the runs are trained first

SMALL = TrainConfig(
    name="small",
    data=dataclasses.replace(PLAIN.data, mean=(0.0,), std=(1.0,)),
    model=DenseConfig(image_size=4, image_channels=1, num_classes=3, width=12, cap=0.7),
    task=Adversarial(radius=0.4),
    solver=Picard(max_steps=6, rtol=1e-2),
    gradient=Envelope(),
    optimizer=dataclasses.replace(PLAIN.optimizer, lr=0.02),
    batch_size=8,
    epochs=20,
    tensorboard=False,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a run of the toy MDEQ, and one trained against attacks."""
    folder = tmp_path_factory.mktemp("runs")
    fit(PLAIN, run_dir=folder / "mdeq")
    fit(SMALL, run_dir=folder / "robust")
    return folder


@pytest.fixture(autouse=True)
def _user_defaults(runs: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "100")


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["attack", *words, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    line: dict[str, Any] = json.loads(captured.out)
    return line


@pytest.mark.parametrize("run", ["mdeq", "robust"])
def test_the_loss_rises_and_the_accuracy_falls(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = load(f"{run}/model.safetensors").state_dict()
    told = found(capsys, run, "--radius", "1", "--images", "10")
    assert told["images"] == 10
    assert told["robust_loss"] > told["loss"]
    assert told["robust_accuracy"] <= told["accuracy"]
    assert told["evals"] > 10
    assert told["vjps"] > 10
    assert pathlib.Path(told["picture"]) == pathlib.Path(run, "attack.png")
    with Image.open(told["picture"]) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
    small = found(capsys, run, "--radius", "1e-6", "--images", "10")
    assert small["robust_loss"] == pytest.approx(small["loss"], abs=1e-3)
    for name, value in load(f"{run}/model.safetensors").state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_the_ball_of_the_training_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert (found(capsys, "robust")["radius"], found(capsys, "mdeq")["radius"]) == (0.4, 1.0)
    told = found(capsys, "robust", "--norm", "linf", "--radius", "0.2", "--out", "there/picture.png")
    assert (told["norm"], told["radius"], told["picture"]) == ("linf", 0.2, "there/picture.png")
    assert pathlib.Path("there/picture.png").exists()


def test_people_read_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "robust", "--images", "8"]) == 0
    text = capsys.readouterr().out
    for words in (
        "largest change",
        "0.4 (Euclidean)",
        "accuracy under attack",
        "calls of the map",
        "robust/attack.png",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100


def test_images_of_ones_own_are_led_away_from_what_is_said_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    images = SMALL.data.load().test.images
    for number in range(3):
        Image.fromarray(images[number, 0].numpy()).save(f"own-{number}.png")
    told = found(capsys, "robust", "own-0.png", "own-1.png", "own-2.png", "--radius", "2")
    assert told["accuracy"] == 1
    assert told["robust_loss"] > told["loss"]
    assert main(["attack", "robust", "own-0.png", "--radius", "2"]) == 0
    text = capsys.readouterr().out
    assert "own-0.png: " in text
    assert "% -> " in text
    assert "keep their class" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the run folder first: equipoise attack RUN"),
        (["nowhere"], "nowhere is not a run folder"),
        (["robust", "--radius", "0"], "--radius 0: must be > 0"),
        (["robust", "--images", "-1"], "--images -1: must be > 0"),
        (["robust", "--norm", "linf"], "--norm linf needs --radius"),
        (["robust", "missing.png"], "cannot read missing.png"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_model_that_ignores_its_image_is_not_led_astray(capsys: pytest.CaptureFixture[str]) -> None:
    model = load("robust/model.safetensors")
    with torch.no_grad():
        model.head.weight.zero_()
    pathlib.Path("flat").mkdir()
    pathlib.Path("flat/config.yaml").write_text(pathlib.Path("robust/config.yaml").read_text())
    save(model, "flat/model.safetensors")
    told = found(capsys, "flat", "--images", "6")
    assert told["robust_loss"] == pytest.approx(told["loss"])
