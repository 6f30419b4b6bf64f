"""`equipoise reconstruct`: answers, pictures and refusals."""

import dataclasses
import pathlib

import numpy as np
import pytest
import torch
from console import Console
from PIL import Image
from toy import PLAIN

import equipoise as eq
from equipoise.cli.reconstruct import _kind
from equipoise.inputs import Envelope
from equipoise.train import Adam, TrainConfig, fit
from equipoise.zoo import DecoderConfig, Hole, Noise, PriorConfig, Reconstruct, psnr
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


def write(path: pathlib.Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Runs of a decoder, a prior and a classifier, and an image that the decoder can make, 40 dB from its start."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in {"decoder": SMALL, "prior": PRIOR}.items():
        fit(config, run_dir=folder / name)
    fit(dataclasses.replace(PLAIN, stop_after=1), run_dir=folder / "classifier")
    model = load(folder / "decoder/model.safetensors").requires_grad_(False)
    truth = model(torch.tensor([[1.0, -0.7]], dtype=torch.float32))
    assert psnr(model(model.latents(1, 4, 4)), truth)[0] < 35
    pixels = (truth[0, 0] * 255).round().numpy()
    mask = np.zeros_like(pixels)
    mask[1:3, :2] = 255
    for image, content in {
        "clean": pixels,
        "mask": mask,
        "torn": np.where(mask > 0, 255 - pixels, pixels),
        "white": np.full((4, 4), 255),
        "tiny": np.full((2, 2), 90),
        "photograph": np.full((10, 21), 90),
    }.items():
        write(folder / f"{image}.png", content)
    return folder


@pytest.mark.parametrize(
    ("task", "flags", "least"),
    [("deblur", ("--sigma", "0.5"), 40), ("superres", ("--factor", "2"), 40), ("denoise", ("--std", "0.02"), 30)],
)
def test_recovery(task: str, flags: tuple[str, ...], least: float, console: Console) -> None:
    words = ("reconstruct", "decoder", "clean.png", "--task", task, *flags, "--simulate", "--out", "picture.png")
    (line,) = console.json(*words)
    assert line["psnr"] > least
    assert line["ssim"] is None or line["ssim"] > 0.9
    assert line["evals"] > 0
    with Image.open("picture.png") as picture:
        assert picture.width > 2.5 * picture.height  # observed, answer and truth


def test_inpainting(console: Console) -> None:
    """The pixels under the mask have no part in the answer."""
    flags = ("--task", "inpaint", "--mask", "mask.png")
    (torn,) = console.json("reconstruct", "decoder", "torn.png", *flags, "--out", "torn-answer.png")
    (whole,) = console.json("reconstruct", "decoder", "clean.png", *flags, "--simulate")
    assert torn["rms"] == pytest.approx(whole["rms"], abs=1e-6)
    assert "psnr" not in torn
    assert whole["psnr"] > 40
    with Image.open("torn-answer.png") as picture:
        assert picture.width < 2 * picture.height  # there is no truth to show


def test_superres_of_a_small_image(console: Console) -> None:
    flags = ("--task", "superres", "--factor", "2")
    (line,) = console.json("reconstruct", "decoder", "tiny.png", *flags)
    assert (line["note"], line["picture"]) == ("", "tiny-superres.png")
    assert "2x2" in console.json("reconstruct", "decoder", "clean.png", *flags)[0]["note"]
    text = console.out("reconstruct", "decoder", "tiny.png", *flags)
    assert "picture tiny-superres.png" in text
    assert "rounds" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("decoder clean.png inpaint", 2, "needs --mask FILE"),
        ("decoder clean.png deblur --mask clean.png", 2, "--mask belongs to --task inpaint"),
        ("decoder clean.png superres --factor 3", 2, "does not divide the 4 pixels"),
        ("decoder clean.png deblur --sigma -1", 2, "sigma=-1.0"),
        ("decoder no-such.png deblur", 1, "no-such.png"),
        (". clean.png deblur", 1, "is not a run folder"),
        ("decoder clean.png inpaint --mask white.png", 2, "nothing was observed"),
        (
            "prior photograph.png superres",
            2,
            "has learned to denoise and inpaint; for --task superres take a run of jiio-generative",
        ),
        ("classifier clean.png deblur", 1, "a run of Classify, and reconstruct needs a decoder"),
    ],
)
def test_reconstruct_refusals(words: str, code: int, message: str, console: Console) -> None:
    run, image, task, *flags = words.split()
    assert message in console.error("reconstruct", run, image, "--task", task, *flags, code=code)


def test_reconstruct_by_prior(console: Console) -> None:
    """Any size, with the data weight of the nearest corruption of the training."""
    (line,) = console.json("reconstruct", "prior", "photograph.png", "--task", "denoise")
    assert "cut to 20x10" in line["note"]
    asked = {Noise(std=0.12): 0, Noise(std=0.25): 1, Hole(size=5): 2}
    assert {corruption: _kind(PRIOR.task, corruption) for corruption in asked} == asked
