"""One run from training to prediction, through the command line alone."""

import json
import pathlib
import re

import pytest
import torch
from PIL import Image

from equipoise.cli import main
from equipoise.zoo.files import load, read_config

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = (
    *("--model.channels", "[8,8]", "--model.head_channels", "[2,2]", "--model.final_channels", "8"),
    *("--solver.max_steps", "3", "--stop_after", "3", "--log_every", "1", "--data.validation_fraction", "0.1"),
)


def test_journey(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def said(*words: str) -> str:
        assert main(list(words)) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    text = said("train", "mdeq-digits", *TINY, "--run-dir", "runs/one")
    result = json.loads(pathlib.Path("runs/one/result.json").read_text())
    table = {
        "test accuracy": f"{result['test_accuracy']:.4f}",
        "mean solver steps per sample": f"{result['mean_steps']:.1f}",
        "share of time in backward": f"{result['backward_share']:.0%}",
        "time": r"\d+ s",
        "run folder": "runs/one",
    }
    for name, value in table.items():
        assert re.search(rf"│ {name} +│ {value} +│", text), name
    lines = [f"epoch   1  {split}  " for split in ("train", "validation", "test")]
    order = [text.index(part) for part in ("run folder runs/one", *lines, "┌")]
    assert order == sorted(order)
    assert result["steps"] == 3
    assert "<svg" in pathlib.Path("runs/one/report.html").read_text()
    saved = read_config("runs/one/config.yaml")
    assert (saved.stop_after, saved.model.channels, saved.data.validation_fraction) == (3, (8, 8), 0.1)

    assert json.loads(said("evaluate", "runs/one", "--json"))["accuracy"] == result["test_accuracy"]
    assert json.loads(said("evaluate", "runs/one", "--solver.max_steps", "2", "--json"))["mean_steps"] == 2
    pixels = saved.data.load().test.images[0, 0]
    Image.fromarray(pixels.numpy()).save("digit.png")
    model = load("runs/one/model.safetensors")
    with torch.no_grad():
        best = int(model(saved.data.prepare(pixels[None, None])).argmax())
    assert said("predict", "runs/one", "digit.png").startswith(f"digit.png: {best} ")
