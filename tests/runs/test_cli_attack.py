"""`equipoise attack`: changed images, table, picture and refusals."""

import dataclasses
import pathlib

import pytest
import torch
from console import Console
from PIL import Image
from toy import PLAIN

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
    epochs=12,
    tensorboard=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of the toy MDEQ, one trained against attacks, and one whose model ignores its image."""
    folder = tmp_path_factory.mktemp("runs")
    fit(PLAIN, run_dir=folder / "mdeq")
    fit(SMALL, run_dir=folder / "robust")
    model = load(folder / "robust/model.safetensors")
    with torch.no_grad():
        model.head.weight.zero_()
    (folder / "flat").mkdir()
    (folder / "flat/config.yaml").write_text((folder / "robust/config.yaml").read_text())
    save(model, folder / "flat/model.safetensors")
    for number, image in enumerate(SMALL.data.load().test.images[:3, 0]):
        Image.fromarray(image.numpy()).save(folder / f"own-{number}.png")
    return folder


@pytest.mark.parametrize("run", ["mdeq", "robust"])
def test_attack(run: str, console: Console) -> None:
    before = pathlib.Path(run, "model.safetensors").read_bytes()
    (found,) = console.json("attack", run, "--radius", "1", "--images", "10")
    assert found["images"] == 10
    assert found["robust_loss"] > found["loss"]
    assert found["robust_accuracy"] <= found["accuracy"]
    assert min(found["evals"], found["vjps"]) > 10
    assert found["picture"] == f"{run}/attack.png"
    with Image.open(found["picture"]) as picture:
        assert (picture.format, picture.width > 500) == ("PNG", True)
    (small,) = console.json("attack", run, "--radius", "1e-6", "--images", "10")
    assert small["robust_loss"] == pytest.approx(small["loss"], abs=1e-3)
    assert pathlib.Path(run, "model.safetensors").read_bytes() == before


def test_attack_defaults(console: Console) -> None:
    """The ball is that of the training, and one of radius 1 for other runs."""
    assert [console.json("attack", run)[0]["radius"] for run in ("robust", "mdeq")] == [0.4, 1.0]
    (found,) = console.json("attack", "robust", "--norm", "linf", "--radius", "0.2", "--out", "there/picture.png")
    assert (found["norm"], found["radius"], found["picture"]) == ("linf", 0.2, "there/picture.png")
    assert pathlib.Path("there/picture.png").exists()


def test_attack_table(console: Console) -> None:
    text = console.out("attack", "robust", "--images", "8")
    words = "largest change|0.4 (Euclidean)|accuracy under attack|calls of the map|robust/attack.png"
    assert all(part in text for part in words.split("|"))
    assert max(map(len, text.splitlines())) <= 110


def test_attack_of_own_images(console: Console) -> None:
    """The class that the model predicts is the one to be led away from."""
    (found,) = console.json("attack", "robust", "own-0.png", "own-1.png", "own-2.png", "--radius", "2")
    assert found["accuracy"] == 1
    assert found["robust_loss"] > found["loss"]
    text = console.out("attack", "robust", "own-0.png", "--radius", "2")
    assert all(part in text for part in ("own-0.png: ", "% -> ", "keep their class"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments are required: RUN, IMAGE; usage: equipoise attack RUN"),
        (["nowhere"], "nowhere is not a run folder"),
        (["robust", "--radius", "0"], "--radius 0: must be > 0"),
        (["robust", "--images", "-1"], "--images -1: must be > 0"),
        (["robust", "--norm", "linf"], "--norm linf needs --radius"),
        (["robust", "missing.png"], "cannot read missing.png"),
    ],
)
def test_attack_refusals(words: list[str], message: str, console: Console) -> None:
    assert message in console.error("attack", *words, code=1 if message.startswith(("nowhere", "cannot")) else 2)


def test_attack_without_slope(console: Console) -> None:
    (found,) = console.json("attack", "flat", "--images", "6")
    assert found["robust_loss"] == pytest.approx(found["loss"])
