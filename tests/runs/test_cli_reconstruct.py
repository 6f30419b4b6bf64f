"""`equipoise reconstruct`: the answer it gives, what it draws, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import PLAIN
from toy import command_line as main

import equipoise as eq
from equipoise.cli.reconstruct import _kind
from equipoise.inputs import Envelope
from equipoise.train import Adam, TrainConfig, fit
from equipoise.zoo import Corruption, DecoderConfig, Hole, Noise, PriorConfig, Reconstruct, psnr
from equipoise.zoo.files import load

pytest.importorskip("matplotlib")

SMALL = TrainConfig(
    name="small",
    data=dataclasses.replace(PLAIN.data, mean=(0.0,), std=(1.0,)),
    model=DecoderConfig(image_size=4, image_channels=1, latent_size=2, width=16),
    task=Reconstruct(),
    solver=eq.Anderson(memory=8, max_steps=60, rtol=1e-5, ridge=1e-6),
    gradient=Envelope(),
    optimizer=Adam(lr=0.02),
    batch_size=8,
    epochs=1,
    stop_after=3,
    tensorboard=False,
)
PRIOR = dataclasses.replace(
    SMALL,
    model=PriorConfig(image_size=4, channels=(4, 4), num_corruptions=3),
    task=Reconstruct(corruptions=(Noise(std=0.1), Noise(std=0.3), Hole(size=2))),
    gradient=eq.Implicit(solver=eq.GMRES(max_steps=20, rtol=0.0, atol=1e-2)),
    solver=eq.Anderson(memory=8, max_steps=20, rtol=1e-3),
    stop_after=1,
)
LATENT = torch.tensor([[1.0, -0.7]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a run of a decoder, and an image that the decoder can make."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_default_dtype(torch.float32)
    fit(SMALL, run_dir=folder / "decoder")
    fit(PRIOR, run_dir=folder / "prior")
    with torch.no_grad():
        image = load(folder / "decoder" / "model.safetensors")(LATENT)[0, 0]
    Image.fromarray((image * 255).round().byte().numpy()).save(folder / "clean.png")
    return folder


@pytest.fixture(autouse=True)
def _user_defaults(runs: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "100")


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["reconstruct", "decoder", *words, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    line: dict[str, Any] = json.loads(captured.out)
    return line


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> str:
    assert main(["reconstruct", *words]) == code
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [("deblur", "--sigma", "0.5"), ("superres", "--factor", "2"), ("denoise", "--std", "0.02")],
    ids=lambda words: words[0],
)
def test_an_image_that_the_decoder_can_make_is_recovered(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    line = found(capsys, "clean.png", "--task", *words, "--simulate", "--out", "picture.png")
    assert line["psnr"] > (30 if words[0] == "denoise" else 40)
    assert line["ssim"] is None or line["ssim"] > 0.9
    assert line["evals"] > 0
    with Image.open("picture.png") as picture:
        assert picture.width > 2.5 * picture.height  # observed, answer and truth


def test_missing_pixels_are_filled_and_not_believed(capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.array(Image.open("clean.png"))
    mask = np.zeros_like(pixels)
    mask[1:3, :2] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(np.where(mask > 0, 255 - pixels, pixels)).save("torn.png")
    torn = found(capsys, "torn.png", "--task", "inpaint", "--mask", "mask.png", "--out", "torn-answer.png")
    whole = found(capsys, "clean.png", "--task", "inpaint", "--mask", "mask.png", "--simulate")
    assert torn["rms"] == pytest.approx(whole["rms"], abs=1e-6)  # what is under the mask has no part in it
    assert "psnr" not in torn
    assert whole["psnr"] > 40
    with Image.open("torn-answer.png") as picture:
        assert picture.width < 2 * picture.height  # there is no truth to show


def test_superres_takes_the_small_image_itself(capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((2, 2), 90, dtype=np.uint8)).save("tiny.png")
    line = found(capsys, "tiny.png", "--task", "superres", "--factor", "2")
    assert line["note"] == ""
    assert line["picture"] == "tiny-superres.png"
    assert "2x2" in found(capsys, "clean.png", "--task", "superres", "--factor", "2")["note"]
    assert main(["reconstruct", "decoder", "tiny.png", "--task", "superres", "--factor", "2"]) == 0
    told = capsys.readouterr().out
    assert "picture tiny-superres.png" in told
    assert "rounds" in told


def test_the_answer_explains_better_than_the_start() -> None:
    model = load(pathlib.Path("decoder", "model.safetensors"))
    truth = model(LATENT).detach()
    assert psnr(model(model.latents(1, 4, 4)).detach(), truth)[0] < 35  # so 40 dB above were not there from the start


def test_what_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    image = ("decoder", "clean.png", "--task")
    assert "needs --mask FILE" in refused(capsys, *image, "inpaint", code=2)
    assert "--mask belongs to --task inpaint" in refused(capsys, *image, "deblur", "--mask", "clean.png", code=2)
    assert "does not divide the 4 pixels" in refused(capsys, *image, "superres", "--factor", "3", code=2)
    assert "sigma=-1.0" in refused(capsys, *image, "deblur", "--sigma", "-1", code=2)
    assert "no-such.png" in refused(capsys, "decoder", "no-such.png", "--task", "deblur", code=1)
    assert "is not a run folder" in refused(capsys, str(tmp_path), "clean.png", "--task", "deblur", code=1)
    Image.fromarray(np.full((4, 4), 255, dtype=np.uint8)).save("white.png")
    assert "nothing was observed" in refused(capsys, *image, "inpaint", "--mask", "white.png", code=2)


def test_an_inverse_run_takes_any_size_and_the_weight_of_what_it_was_trained_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(np.full((10, 21), 90, dtype=np.uint8)).save("photograph.png")
    words = ["reconstruct", "prior", "photograph.png", "--json", "--task"]
    assert main([*words, "denoise"]) == 0
    assert "cut to 20x10" in json.loads(capsys.readouterr().out)["note"]
    told = refused(capsys, "prior", "photograph.png", "--task", "superres", code=2)
    assert "has learned to denoise and inpaint; for --task superres take a run of jiio-generative" in told
    asked: dict[Corruption, int] = {Noise(std=0.12): 0, Noise(std=0.25): 1, Hole(size=5): 2}
    assert isinstance(PRIOR.task, Reconstruct)
    assert {corruption: _kind(PRIOR.task, corruption) for corruption in asked} == asked


@pytest.mark.slow
def test_a_classifier_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    fit(PLAIN, run_dir="classifier")
    assert "a run of Classify, and reconstruct needs a decoder" in refused(
        capsys, "classifier", "clean.png", "--task", "deblur", code=1
    )
