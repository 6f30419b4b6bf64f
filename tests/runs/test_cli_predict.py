"""`equipoise evaluate` and `equipoise predict` on a tiny run: what is read, what is refused, and how it is told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import PLAIN, Interrupt, Interrupted
from toy import command_line as main

from equipoise.train import fit, save
from equipoise.train.checkpoint import describe
from equipoise.zoo.files import load

PIXELS = np.full((4, 4), 40, dtype=np.uint8)
PIXELS[1] = 255
TOLERANCE = 4e-4  # of probabilities, for pixels that are rounded to the next level


@pytest.fixture(autouse=True)
def _user_defaults(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


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
def png() -> str:
    """An image as the model takes it."""
    Image.fromarray(PIXELS).save("image.png")
    return "image.png"


def json_of(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[dict[str, Any]]:
    assert main([*words, "--json"]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_evaluate_gives_the_numbers_of_the_run(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = json_of(capsys, "evaluate", run)
    result = json.loads(pathlib.Path(run, "result.json").read_text())
    assert found["count"] == 15
    assert found["accuracy"] == result["test_accuracy"]
    assert found["mean_steps"] == result["mean_steps"]
    assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-6)
    assert main(["evaluate", run]) == 0
    table = capsys.readouterr().out
    for text in (f"{result['test_accuracy']:.4f}", "mean solver steps per sample", "test images"):
        assert text in table


@pytest.mark.parametrize(
    ("flags", "steps"), [(["--solver.max_steps", "2"], 2), (["--solver.max-steps=0"], 0), (["--solver", "Anderson"], 4)]
)
def test_evaluate_takes_another_solver_whatever_the_gradient(
    flags: list[str], steps: int, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's gradient is Shine, which Anderson cannot serve in training."""
    (found,) = json_of(capsys, "evaluate", run, "--split", "train", "--solver.rtol", "0", *flags)
    assert (found["mean_steps"], found["count"]) == (steps, 36)


def test_evaluate_in_another_precision_agrees(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    (single,) = json_of(capsys, "evaluate", run)
    (double,) = json_of(capsys, "evaluate", run, "--precision", "64-true")
    assert double["loss"] == pytest.approx(single["loss"], rel=1e-4)
    assert double["loss"] != single["loss"]


def test_a_split_that_the_run_has_not_is_refused(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", run, "--split", "validation"]) == 1
    assert "set no validation images aside" in capsys.readouterr().err
    assert main(["evaluate", run, "--split", "dev"]) == 2
    assert "dev" in capsys.readouterr().err


def test_an_unfinished_run_is_evaluated_at_its_newest_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(Interrupted):
        fit(dataclasses.replace(PLAIN, checkpoint_every=2), run_dir="half", observer=Interrupt(3))
    assert main(["evaluate", "half"]) == 0
    assert "the run is not finished: its checkpoint at step 2 is used" in capsys.readouterr().out
    shutil.rmtree("half/checkpoints")
    assert main(["evaluate", "half"]) == 1
    assert capsys.readouterr().err == "equipoise: error: half has no model yet: its run has saved no checkpoint\n"


def test_a_damaged_model_is_refused(run: str, png: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, "copy")
    model = pathlib.Path("copy/model.safetensors")
    model.write_bytes(model.read_bytes()[:-100])
    for words in (["evaluate", "copy"], ["predict", "copy", png]):
        assert main(words) == 1
        assert re.fullmatch(r"equipoise: error: copy/model.safetensors is truncated.*\n", capsys.readouterr().err)


def test_predict_is_the_model_on_the_pixels(run: str, png: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(pathlib.Path(run, "model.safetensors"))
    pixels = (torch.tensor(PIXELS, dtype=torch.float32)[None, None] / 255 - 0.4) / 0.3
    with torch.no_grad():
        expected = model(pixels).softmax(1)[0].tolist()
    (found,) = json_of(capsys, "predict", run, png)
    assert found["image"] == png
    assert found["note"] == ""
    assert list(found["classes"].values()) == sorted(found["classes"].values(), reverse=True)
    names = ("first", "second", "third")
    assert found["classes"] == pytest.approx(dict(zip(names, expected, strict=True)), rel=1e-5)
    assert main(["predict", run, png, "--top", "1"]) == 0
    text = capsys.readouterr().out
    best = max(range(3), key=expected.__getitem__)
    assert text == (
        f"{png}: {names[best]} {expected[best]:.1%}  ({found['steps']} solver steps, "
        f"{'' if found['converged'] else 'not '}converged)\n"
    )
    (short,) = json_of(capsys, "predict", run, png, "--solver.max_steps", "1")
    assert (short["steps"], short["converged"]) == (1, False)


def test_files_of_every_kind_are_converted_and_it_is_said(
    sharp: str, png: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sixteen bits, colors, palettes, transparency and floats of one picture: one prediction."""
    gray = Image.fromarray(PIXELS)
    clear = np.full((4, 4, 4), 40, dtype=np.uint8)
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
    Image.fromarray(bright).save("bright.png")
    reference, other, *found = json_of(capsys, "predict", sharp, png, "bright.png", *images)
    assert other["classes"] != pytest.approx(reference["classes"], abs=TOLERANCE)
    assert [line["image"] for line in found] == list(images)
    for line, (name, (_, before)) in zip(found, images.items(), strict=True):
        assert line["classes"] == pytest.approx(reference["classes"], abs=TOLERANCE), name
        assert line["note"] == f"{before} was converted to 4x4 grayscale"


def test_a_larger_image_is_averaged_down(sharp: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the interpolation of torch, which is written independently of Pillow's."""
    large = np.random.default_rng(2).integers(0, 255, (32, 32), dtype=np.uint8)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(large).double()[None, None], size=(4, 4), mode="bilinear", antialias=True
    )
    Image.fromarray(large).save("large.png")
    Image.fromarray(small[0, 0].round().byte().numpy()).save("small.png")
    Image.fromarray(large).resize((4, 4), Image.Resampling.NEAREST).save("nearest.png")
    found, expected, other = json_of(capsys, "predict", sharp, "large.png", "small.png", "nearest.png")
    assert found["classes"] == pytest.approx(expected["classes"], abs=TOLERANCE)
    assert found["classes"] != pytest.approx(other["classes"], abs=TOLERANCE)
    assert found["note"] == "32x32 L was converted to 4x4 grayscale"


def test_of_an_oblong_image_the_central_square_is_taken(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    wide = np.full((4, 12), 255, dtype=np.uint8)
    wide[:, 4:8] = PIXELS
    Image.fromarray(wide).save("wide.png")
    Image.fromarray(wide.T).save("tall.png")
    Image.fromarray(PIXELS).save("square.png")
    Image.fromarray(PIXELS.T).save("turned.png")
    square, wide_one, turned, tall = json_of(capsys, "predict", run, "square.png", "wide.png", "turned.png", "tall.png")
    assert wide_one["classes"] == square["classes"]
    assert tall["classes"] == turned["classes"] != square["classes"]
    assert wide_one["note"] == "12x4 L was converted to 4x4 grayscale (the central square)"


def test_dark_ink_is_noticed_and_inverted_on_request(sharp: str, png: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(255 - PIXELS).resize((8, 8), Image.Resampling.NEAREST).save("ink.png")
    Image.fromarray(PIXELS).resize((8, 8), Image.Resampling.NEAREST).save("light.png")
    (ink,) = json_of(capsys, "predict", sharp, "ink.png")
    assert "try --invert" in ink["note"]
    (light,) = json_of(capsys, "predict", sharp, "light.png")
    (inverted,) = json_of(capsys, "predict", sharp, "ink.png", "--invert")
    assert "invert" not in light["note"] + inverted["note"]
    assert inverted["classes"] == pytest.approx(light["classes"], abs=TOLERANCE)
    assert inverted["classes"] != pytest.approx(ink["classes"], abs=TOLERANCE)


def bad_files() -> dict[str, str]:
    """Files that are no images, with what is said of them."""
    whole = pathlib.Path("image.png").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50), dtype=np.uint8)).save("noise.png")
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + whole[24:29]
    bomb = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    pathlib.Path("empty.png").touch()
    pathlib.Path("text.png").write_text("no image")
    pathlib.Path("cut.png").write_bytes(pathlib.Path("noise.png").read_bytes()[:900])
    pathlib.Path("bomb.png").write_bytes(bomb)
    return {
        "empty.png": "empty.png is empty",
        "text.png": "text.png is not an image that Pillow can read",
        "cut.png": "cut.png is a damaged image: .*",
        "bomb.png": "bomb.png has too many pixels: .*1600000000 pixels.*",
        "missing.png": "cannot read missing.png: No such file or directory",
    }


def test_each_bad_file_is_named_once_and_the_others_are_predicted(
    run: str, png: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = bad_files()
    names = list(bad)
    assert main(["predict", run, *names[:2], png, *names[2:], "noise.png"]) == 1
    captured = capsys.readouterr()
    for line, said in zip(captured.err.splitlines(), bad.values(), strict=True):
        assert re.fullmatch(f"equipoise: error: {said}", line), line
    assert re.findall(r"^\S+(?=: )", captured.out, re.MULTILINE) == [png, "noise.png"]
    assert main(["predict", run, "empty.png"]) == 1
    assert capsys.readouterr() == ("", "equipoise: error: empty.png is empty\n")


def test_an_image_of_a_hundred_megapixels_is_read_without_a_warning(
    run: str, png: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow warns from here on, and refuses from twice as much on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    (found,) = json_of(capsys, "predict", run, png)
    assert found["note"] == ""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    assert main(["predict", run, png]) == 1
    assert re.fullmatch(r"equipoise: error: image.png has too many pixels: .*\n", capsys.readouterr().err)


def test_a_folder_stands_for_the_images_in_it(run: str, png: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pathlib.Path("folder")
    (folder / "inner.png").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "c.tiff"):
        Image.fromarray(PIXELS).save(folder / name, format="PNG")
    (folder / "notes.txt").write_text("not an image, and not meant as one")
    found = json_of(capsys, "predict", run, "folder", png, "folder/b.png")
    assert [line["image"] for line in found] == ["folder/a.JPG", "folder/b.png", "folder/c.tiff", png]
    (folder / "z.png").touch()
    assert len(json_of(capsys, "predict", run, "folder", code=1)) == 3
    assert main(["predict", run, "folder/inner.png"]) == 1
    assert re.fullmatch(r"equipoise: error: folder/inner.png holds no image files.*\n", capsys.readouterr().err)


def test_many_images_are_classified_batch_by_batch_with_the_same_answers(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run evaluates ten images at once; here are 23."""
    source = np.random.default_rng(1)
    names = [f"{number:02}.png" for number in range(23)]
    for name in names:
        Image.fromarray(source.integers(0, 255, (4, 4), dtype=np.uint8)).save(name)
    found = json_of(capsys, "predict", run, ".")
    assert [line["image"] for line in found] == names
    (alone,) = json_of(capsys, "predict", run, names[17])
    assert alone["classes"] == pytest.approx(found[17]["classes"], rel=1e-4)


def test_predict_says_what_is_wrong_with_the_command_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, pattern in (
        (["predict", run], 2, "IMAGE"),
        (["predict", run, "x.png", "--top", "0"], 2, "--top 0: must be >= 1"),
        (["predict", run, "x.png", "--top", "two"], 2, "--top.*two"),
        (["predict", run, "x.png", "--epochs", "2"], 2, "unknown flag --epochs"),
        (["predict", run, "x.png", "--solver.max_steps", "-1"], 2, "max_steps=-1"),
        (["predict", "x.png"], 2, "required: IMAGE; usage: equipoise predict RUN IMAGE"),
    ):
        assert main(words) == code, words
        captured = capsys.readouterr()
        assert re.fullmatch(rf"equipoise: error: .*{pattern}.*\n", captured.err), captured.err
        assert captured.out == ""
