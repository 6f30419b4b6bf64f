"""`equipoise tune`: help, runs from end to end and their folders, errors and interrupts."""

import errno
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_breast_cancer

from equipoise.cli import main
from equipoise.estimators import load, read_rows

CSV = "width,color,label\n" + "".join(
    f"{i % 7},{'red' if i % 3 else 'blue'},{'yes' if (i % 7 > 3) != (i % 11 == 0) else 'no'}\n" for i in range(120)
)


@pytest.fixture(autouse=True)
def _user_defaults(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def result_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    text = shown(capsys, "tune", *words, "--json")
    assert text.count("\n") == 1
    return json.loads(text)


def history_of(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in pathlib.Path(folder, "history.jsonl").read_text().splitlines()]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "tune", "--help")
    assert re.findall(r"^usage: .*$", text, re.M) == ["usage: equipoise tune DATA [flags]"]
    for word in ("--validation-fraction", "--max-steps", "diabetes", "equipoise tune breast-cancer"):
        assert word in text
    assert "tune " in shown(capsys, "--help")
    assert not any(pathlib.Path().iterdir())


def test_classification(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "tune", "breast-cancer", "--run-dir", "run", "--max_steps", "6")
    result = json.loads(pathlib.Path("run/result.json").read_text())
    assert "569 rows, 30 features; classification, as the labels are 2 different integers" in text
    step = r"^step +\d+  alpha \S+  held-out loss \S+  accuracy 0\.9\d+ .*gradients \d+  \d+\.\d s$"
    assert len(re.findall(step, text, re.M)) == result["outer_steps"]
    assert re.search(rf"test accuracy +│ {result['test_accuracy']:.4f}, 114 rows", text)
    assert re.search(rf"held-out loss +│ {result['held_out_loss']:.6g}", text)
    assert re.search(rf"held-out accuracy +│ {result['held_out_accuracy']:.4f}", text)
    assert min(result["test_accuracy"], result["held_out_accuracy"]) > 0.93
    lines = history_of("run")
    assert [line["step"] for line in lines] == [*range(1, result["outer_steps"] + 1)]
    assert min(line["held_out_loss"] for line in lines) < 0.7 * lines[0]["held_out_loss"]
    assert lines[-1]["gradient_evals"] == result["gradient_evals"]
    for line in lines:  # a share of the 114 held-out rows
        assert abs(line["held_out_accuracy"] * 114 - round(line["held_out_accuracy"] * 114)) < 1e-9
    best = min(lines, key=lambda line: line["held_out_loss"])
    assert abs(best["held_out_accuracy"] - result["held_out_accuracy"]) < 1.5 / 114
    with Image.open("run/loss.png") as picture:
        assert picture.width > 600
    assert {path.name for path in pathlib.Path("run").iterdir()} == {
        "config.json", "history.jsonl", "loss.png", "model.safetensors", "result.json",
    }  # fmt: skip
    model = load("run/model.safetensors")
    X, y = load_breast_cancer(return_X_y=True)
    assert model.alpha_ == result["alpha"][0]
    assert np.mean((model.predict(X / X.std(0)) > 0) == (y == 1)) > 0.95


def test_new_rows(capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("rows.csv").write_text(CSV)
    result = result_of(capsys, "rows.csv", "--max-steps", "4", "--test-fraction", "0.25")
    assert result["task"] == "classification"
    assert result["run_dir"] == "runs/tune-rows-1"
    model = load("runs/tune-rows-1/model.safetensors")
    pathlib.Path("new.csv").write_text("color,width\nred,0\nred,6\n")
    assert model.predict(read_rows("new.csv", model.encoding_)).tolist() == ["no", "yes"]
    assert result_of(capsys, "rows.csv", "--max-steps", "1")["run_dir"] == "runs/tune-rows-2"


def test_regression(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(capsys, "diabetes", "--penalty", "per-feature", "--gradient", "Implicit", "--max-steps", "5")
    assert result["task"] == "regression"
    assert len(result["alpha"]) == 10
    assert min(result["test_r2"], result["held_out_r2"]) > 0.2
    assert max(result["test_r2"], result["held_out_r2"]) < 0.7
    lines = history_of(result["run_dir"])
    best = min(lines, key=lambda line: line["held_out_loss"])
    assert abs(best["held_out_loss"] / result["held_out_loss"] - 1) < 0.01  # in the units of the target
    assert abs(best["held_out_r2"] - result["held_out_r2"]) < 0.01
    assert "test_accuracy" not in result
    assert result_of(capsys, "diabetes", "--test-fraction", "0", "--max-steps", "2")["test_r2"] is None


def test_seed(capsys: pytest.CaptureFixture[str]) -> None:
    found = [result_of(capsys, "diabetes", "--max-steps", "1", "--seed", seed) for seed in ("0", "0", "1")]
    for result in found:
        result.pop("seconds"), result.pop("run_dir")
    assert found[0] == found[1]
    assert found[0]["held_out_loss"] != found[2]["held_out_loss"]


def test_penalty_per_class(capsys: pytest.CaptureFixture[str]) -> None:
    source = np.random.default_rng(0)
    X = source.normal(size=(90, 3))
    np.savez("rows.npz", X=X, y=(X @ source.normal(size=(3, 3))).argmax(1))
    result = result_of(capsys, "rows.npz", "--penalty", "per-class", "--gradient", "JacobianFree", "--max-steps", "2")
    assert len(result["alpha"]) == 3
    text = shown(capsys, "tune", "rows.npz", "--penalty", "per-class", "--max-steps", "2", "--overwrite")
    assert re.search(r"penalty alpha +│ \S+ to \S+ \(3\)", text)


USAGE = [
    ((), "arguments are required: DATA; usage: equipoise tune DATA"),
    (("rows.csv", "--labels", "x"), r"unknown flag --labels; did you mean --label\?"),
    (("rows.csv", "--xyzzy", "x"), "unknown flag --xyzzy; --help lists all"),
    (("rows.csv", "--penalty", "per-clas"), r"--penalty: unknown 'per-clas'; did you mean 'per-class'\?"),
    (("rows.csv", "--gradient", "Shin"), r"--gradient: unknown 'Shin'; did you mean 'Shine'\?"),
    (("rows.csv", "--task", "ranking"), "--task: invalid choice: 'ranking'"),
    (("rows.csv", "--validation-fraction", "1"), "--validation-fraction 1: must lie between 0 and 1"),
    (("rows.csv", "--test-fraction", "-1"), "--test-fraction -1: must be at least 0"),
    (("rows.csv", "--max-steps", "0"), "--max-steps 0: must be >= 1"),
    (("rows.csv", "--max-steps", "few"), "--max-steps: invalid int value: 'few'"),
    (("rows.csv", "--task", "regression"), "the labels are strings; name a numeric column with --label"),
    (("diabetes", "--task", "classification"), "labels are 214 different numbers, not integers"),
    (("breast-cancer", "--penalty", "per-class"), "needs three or more classes"),
]
DATA = [
    (("brest-cancer",), "there is no file brest-cancer, nor a data set of this name; named sets: breast-"),
    (("rows.csv", "--label", "colour"), "rows.csv has no column 'colour'; it has width, color, label"),
    (("torn.csv",), "torn.csv, line 3: 1 fields, but the header has 2"),
    (("one.csv",), "one.csv: all labels are the same"),
    (("few.csv",), "few.csv cannot be split: .*--test-fraction 0"),
]


@pytest.mark.parametrize(
    ("words", "pattern", "code"), [(*case, 2) for case in USAGE] + [(*case, 1) for case in DATA], ids=str
)
def test_errors(words: tuple[str, ...], pattern: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"rows": CSV, "torn": "x,label\n1,2\n3", "one": "x,label\n1,2\n3,2\n", "few": "x,label\n1,a\n3,b\n2,b\n"}
    for name, content in files.items():
        pathlib.Path(f"{name}.csv").write_text(content)
    assert main(["tune", *words]) == code
    captured = capsys.readouterr()
    assert re.fullmatch(rf"equipoise: error: .*{pattern}.*\n", captured.err), captured.err
    assert not pathlib.Path("runs").exists()


def test_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    first = result_of(capsys, "breast-cancer", "--run-dir", "run", "--max-steps", "1")
    assert main(["tune", "breast-cancer", "--run-dir", "run"]) == 1
    assert "run already holds a run; replace it with --overwrite" in capsys.readouterr().err
    assert json.loads(pathlib.Path("run/result.json").read_text()) == first
    again = result_of(capsys, "breast-cancer", "--run-dir", "run", "--max-steps", "2", "--overwrite")
    assert again["outer_steps"] == 2
    assert len(history_of("run")) == 2


def test_closed_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the call that fails, as the superuser may write to a folder that is read-only."""
    make = pathlib.Path.mkdir

    def mkdir(path: pathlib.Path, *arguments: Any, **options: Any) -> None:
        if path.parts[0] == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
    assert main(["tune", "breast-cancer", "--run-dir", "closed/run"]) == 1
    assert capsys.readouterr().err == "equipoise: error: closed/run: Permission denied\n"


@pytest.mark.parametrize("moment", ["at the start", "at the end"])
def test_full_disk(moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = os.fsync
    calls = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if moment == "at the start" or len(calls) > 2:  # the configuration takes two: the file and its folder
            raise OSError(errno.ENOSPC, "No space left on device", "run")
        written(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["tune", "breast-cancer", "--run-dir", "run", "--max-steps", "1", "--json"]) == 1
    assert capsys.readouterr().err == "equipoise: error: run: No space left on device\n"
    left = {path.name for path in pathlib.Path("run").iterdir()}
    assert left == (set() if moment == "at the start" else {"config.json", "history.jsonl"})


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from equipoise.cli import tune

    log = tune._Run.log

    def interrupted(self: Any, step: Any, score: float) -> None:
        log(self, step, score)
        if step.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tune._Run, "log", interrupted)
    assert main(["tune", "breast-cancer", "--run-dir", "run"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(history_of("run")) == 2
    assert not pathlib.Path("run/model.safetensors").exists()


@pytest.mark.parametrize("words", [("predict", "run", "new.csv"), ("evaluate", "run"), ("report", "run")])
def test_other_commands(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("rows.csv").write_text(CSV)
    result_of(capsys, "rows.csv", "--max-steps", "1", "--run-dir", "run")
    assert main(list(words)) == 1
    error = capsys.readouterr().err
    assert re.fullmatch("equipoise: error: run holds a model of `equipoise tune`. .*\n", error), error
    pathlib.Path("new.csv").write_text("color,width\nred,0\nred,6\n")
    found: dict[str, Any] = {}
    code = error.partition("in Python: ")[2].strip().replace("model.predict", "answer = model.predict")
    exec(code.replace("from equipoise", "\nfrom equipoise").replace("; ", "\n"), found)
    assert found["answer"].tolist() == ["no", "yes"]
