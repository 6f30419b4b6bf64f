"""`equipoise evaluate` and `equipoise predict` on a tiny run: images, answers and refusals."""

import dataclasses
import json
import pathlib
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from console import PREFIX, Console
from PIL import Image
from toy import PLAIN, Interrupt, Interrupted

from equipoise.train import fit, save
from equipoise.train.checkpoint import describe
from equipoise.zoo.files import load

PIXELS = np.full((4, 4), 40, dtype=np.uint8)
PIXELS[1] = 255
SOURCE = np.random.default_rng(1)


def close(classes: dict[str, float]) -> object:
    """Probabilities of pixels that are rounded to the next level."""
    return pytest.approx(classes, abs=4e-4)


def write(name: str, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of the toy, whose images are 4x4 and gray."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    fit(PLAIN, run_dir=folder)
    return str(folder)


@pytest.fixture(scope="module")
def sharp(run: str) -> str:
    """The same run with larger logits, so that a small change of the pixels changes the probabilities."""
    folder = pathlib.Path(run).with_name("sharp")
    shutil.copytree(run, folder)
    path = folder / "model.safetensors"
    model = load(path)
    with torch.no_grad():
        model.get_parameter("head.final.5.weight").mul_(30)
    save(model, path, about=describe(path)["about"])
    return str(folder)


@pytest.fixture
def png(console: Console) -> str:
    """An image as the model takes it."""
    write("image.png", PIXELS)
    return "image.png"


def test_evaluate(run: str, console: Console) -> None:
    (found,) = console.json("evaluate", run)
    result = json.loads(pathlib.Path(run, "result.json").read_text())
    assert [found[name] for name in ("count", "accuracy", "mean_steps")] == [
        15,
        result["test_accuracy"],
        result["mean_steps"],
    ]
    assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-6)
    table = console.out("evaluate", run)
    words = (f"{result['test_accuracy']:.4f}", "mean solver steps per sample", "test samples")
    assert all(part in table for part in words)
    (double,) = console.json("evaluate", run, "--precision", "64-true")
    assert 0 < abs(double["loss"] / found["loss"] - 1) < 1e-4


@pytest.mark.parametrize(
    ("flags", "steps"), [(["--solver.max_steps", "2"], 2), (["--solver.max-steps=0"], 0), (["--solver", "Anderson"], 4)]
)
def test_evaluate_by_another_solver(flags: list[str], steps: int, run: str, console: Console) -> None:
    """The run's gradient is Shine, which Anderson cannot serve in training."""
    (found,) = console.json("evaluate", run, "--split", "train", "--solver.rtol", "0", *flags)
    assert (found["mean_steps"], found["count"]) == (steps, 36)


def test_missing_splits(run: str, console: Console) -> None:
    assert "set no validation samples aside" in console.error("evaluate", run, "--split", "validation")
    assert "dev" in console.error("evaluate", run, "--split", "dev", code=2)


def test_unfinished_run(console: Console) -> None:
    with pytest.raises(Interrupted):
        fit(dataclasses.replace(PLAIN, checkpoint_every=2), run_dir="half", observer=Interrupt(3))
    assert "the run is not finished: its checkpoint at step 2 is used" in console.out("evaluate", "half")
    shutil.rmtree("half/checkpoints")
    assert console.error("evaluate", "half") == "half has no model yet: its run has saved no checkpoint"


def test_damaged_model(run: str, png: str, console: Console) -> None:
    shutil.copytree(run, "copy")
    model = pathlib.Path("copy/model.safetensors")
    model.write_bytes(model.read_bytes()[:-100])
    for words in (["evaluate", "copy"], ["predict", "copy", png]):
        assert console.error(*words).startswith("copy/model.safetensors is truncated")


def test_predict(run: str, png: str, console: Console) -> None:
    model = load(pathlib.Path(run, "model.safetensors"))
    pixels = (torch.tensor(PIXELS, dtype=torch.float32)[None, None] / 255 - 0.4) / 0.3
    with torch.no_grad():
        expected = dict(zip(("first", "second", "third"), model(pixels).softmax(1)[0].tolist(), strict=True))
    best = max(expected, key=expected.__getitem__)
    (found,) = console.json("predict", run, png)
    assert (found["image"], found["note"]) == (png, "")
    assert list(found["classes"].values()) == sorted(found["classes"].values(), reverse=True)
    assert found["classes"] == pytest.approx(expected, rel=1e-5)
    converged = "converged" if found["converged"] else "not converged"
    told = f"{png}: {best} {expected[best]:.1%}  ({found['steps']} solver steps, {converged})\n"
    assert console.out("predict", run, png, "--top", "1") == told
    (short,) = console.json("predict", run, png, "--solver.max_steps", "1")
    assert (short["steps"], short["converged"]) == (1, False)


def test_conversions(sharp: str, png: str, console: Console) -> None:
    """Sixteen bits, colors, palettes, transparency and floats of one picture: one prediction."""
    gray, clear = Image.fromarray(PIXELS), np.full((4, 4, 4), 40, dtype=np.uint8)
    clear[..., 3] = 255
    clear[1] = 0  # transparent, which becomes white
    images = {
        "rgb.png": (gray.convert("RGB"), "4x4 RGB"),
        "jpeg.bmp": (gray.convert("RGB"), "4x4 RGB"),
        "rgba.png": (Image.fromarray(clear), "4x4 RGBA"),
        "palette.png": (gray.convert("P"), "4x4 P"),
        "deep.png": (Image.fromarray(PIXELS.astype(np.uint16) * 257), "4x4 I;16"),
        "float.tiff": (Image.fromarray(PIXELS.astype(np.float32) / 255), "4x4 F"),
        "noextension": (gray.convert("RGB"), "4x4 RGB"),
    }
    for name, (image, _) in images.items():
        image.save(name, format="PNG" if "." not in name else None)
    bright = PIXELS.copy()
    bright[0] += 6
    write("bright.png", bright)
    reference, other, *found = console.json("predict", sharp, png, "bright.png", *images)
    assert other["classes"] != close(reference["classes"])
    for line, (name, (_, before)) in zip(found, images.items(), strict=True):
        assert (line["image"], line["classes"]) == (name, close(reference["classes"]))
        assert line["note"] == f"{before} was converted to 4x4 grayscale"


def test_larger_image(sharp: str, console: Console) -> None:
    """Averaged as by the interpolation of torch, which is written independently of Pillow's."""
    large = SOURCE.integers(0, 255, (32, 32), dtype=np.uint8)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(large).double()[None, None], size=(4, 4), mode="bilinear", antialias=True
    )
    nearest = Image.fromarray(large).resize((4, 4), Image.Resampling.NEAREST)
    for name, pixels in {"large": large, "small": small[0, 0].round().byte().numpy(), "nearest": nearest}.items():
        write(f"{name}.png", np.asarray(pixels))
    found, expected, other = console.json("predict", sharp, "large.png", "small.png", "nearest.png")
    assert found["classes"] == close(expected["classes"])
    assert found["classes"] != close(other["classes"])
    assert found["note"] == "32x32 L was converted to 4x4 grayscale"


def test_oblong_image(run: str, console: Console) -> None:
    """Of an oblong image the central square is taken."""
    wide = np.full((4, 12), 255, dtype=np.uint8)
    wide[:, 4:8] = PIXELS
    for name, pixels in {"square": PIXELS, "wide": wide, "turned": PIXELS.T, "tall": wide.T}.items():
        write(f"{name}.png", pixels)
    square, cut, turned, tall = console.json("predict", run, "square.png", "wide.png", "turned.png", "tall.png")
    assert cut["classes"] == square["classes"]
    assert tall["classes"] == turned["classes"] != square["classes"]
    assert cut["note"] == "12x4 L was converted to 4x4 grayscale (the central square)"


def test_inverted_image(sharp: str, console: Console) -> None:
    """Dark ink on bright paper is noticed."""
    for name, pixels in {"ink": 255 - PIXELS, "light": PIXELS}.items():
        write(f"{name}.png", pixels.repeat(2, 0).repeat(2, 1))
    ink, light = console.json("predict", sharp, "ink.png", "light.png")
    (inverted,) = console.json("predict", sharp, "ink.png", "--invert")
    assert "try --invert" in ink["note"]
    assert "invert" not in light["note"] + inverted["note"]
    assert inverted["classes"] == close(light["classes"])
    assert inverted["classes"] != close(ink["classes"])


def test_bad_files(run: str, png: str, console: Console) -> None:
    """Each is named once, and the others are predicted."""
    write("noise.png", SOURCE.integers(0, 255, (50, 50), dtype=np.uint8))
    whole = pathlib.Path(png).read_bytes()
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + whole[24:29]
    bad = {
        "empty.png": (b"", "empty.png is empty"),
        "text.png": (b"no image", "text.png is not an image that Pillow can read"),
        "cut.png": (pathlib.Path("noise.png").read_bytes()[:900], "cut.png is a damaged image: .*"),
        "bomb.png": (
            whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:],
            "bomb.png has too many pixels: .*1600000000 pixels.*",
        ),
    }
    for name, (content, _) in bad.items():
        pathlib.Path(name).write_bytes(content)
    said = [message for _, message in bad.values()]
    names = ["empty.png", "text.png", png, "cut.png", "bomb.png", "missing.png", "noise.png"]
    text, errors = console.both("predict", run, *names, code=1)
    for line, message in zip(
        errors.splitlines(), [*said, "cannot read missing.png: No such file or directory"], strict=True
    ):
        assert re.fullmatch(f"{PREFIX}{message}", line), line
    assert re.findall(r"^\S+(?=: )", text, re.MULTILINE) == [png, "noise.png"]
    assert console.error("predict", run, "empty.png") == "empty.png is empty"


def test_large_image(run: str, png: str, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from its limit on, which is no reason to refuse, and refuses from twice as much on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    assert console.json("predict", run, png)[0]["note"] == ""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    assert console.error("predict", run, png).startswith("image.png has too many pixels: ")


def test_image_folders(run: str, png: str, console: Console) -> None:
    folder = pathlib.Path("folder")
    (folder / "inner.png").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "c.tiff"):
        Image.fromarray(PIXELS).save(folder / name, format="PNG")
    (folder / "notes.txt").write_text("not an image, and not meant as one")
    found = console.json("predict", run, "folder", png, "folder/b.png")
    assert [line["image"] for line in found] == ["folder/a.JPG", "folder/b.png", "folder/c.tiff", png]
    (folder / "z.png").touch()
    assert console.both("predict", run, "folder", "--json", code=1)[0].count("\n") == 3
    assert console.error("predict", run, "folder/inner.png").startswith("folder/inner.png holds no image files")


def test_many_images(run: str, console: Console) -> None:
    """The run evaluates ten images at once; here are 23."""
    names = [f"{number:02}.png" for number in range(23)]
    for name in names:
        write(name, SOURCE.integers(0, 255, (4, 4), dtype=np.uint8))
    found = console.json("predict", run, ".")
    assert [line["image"] for line in found] == names
    assert console.json("predict", run, names[17])[0]["classes"] == pytest.approx(found[17]["classes"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("RUN", "IMAGE"),
        ("RUN x.png --top 0", "--top 0: must be >= 1"),
        ("RUN x.png --top two", "--top.*two"),
        ("RUN x.png --epochs 2", "unknown flag --epochs"),
        ("RUN x.png --solver.max_steps -1", "max_steps=-1"),
        ("x.png", "required: IMAGE; usage: equipoise predict RUN IMAGE"),
    ],
)
def test_predict_mistakes(words: str, message: str, run: str, console: Console) -> None:
    assert re.search(message, console.error("predict", *words.replace("RUN", run).split(), code=2))
