"""`equipoise train` from end to end: what a run leaves, goes on with, refuses and says."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import json
import os
import pathlib
import re
from typing import Any

import pytest
import torch
from rich.console import Console
from toy import PLAIN, Interrupt, Interrupted, read_config, timeless
from toy import command_line as main

from equipoise import zoo
from equipoise.cli import train as training
from equipoise.cli.display import LiveDisplay
from equipoise.data import FashionMNIST
from equipoise.train import RunError, TrainConfig, fit
from equipoise.train.run_folder import RunFolder, config_yaml, read_lines
from equipoise.zoo.files import load

@pytest.fixture(autouse=True)
def _user_defaults(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def toy() -> str:
    """A file with the configuration of the toy."""
    pathlib.Path("toy.yaml").write_text(config_yaml(PLAIN))
    return "toy.yaml"


def log(run: str) -> list[dict[str, Any]]:
    return timeless(read_lines(run))


def test_runs_without_a_name_are_numbered(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        assert main(["train", "--config", toy, "--stop_after", "1", "--no-report"]) == 0
        assert f"runs/toy-{number}" in capsys.readouterr().out
    assert read_config("runs/toy-2/config.yaml") == dataclasses.replace(PLAIN, stop_after=1)


def test_a_folder_with_a_run_is_left_alone_unless_told(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config", toy, "--run-dir", "run", "--stop_after", "1", "--no-report"]
    assert main(words) == 0
    before = {path: path.read_bytes() for path in pathlib.Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"equipoise: error: run already holds a run; .*--resume.*--overwrite.*--run-dir\n", said)
    assert {path: path.read_bytes() for path in pathlib.Path("run").rglob("*") if path.is_file()} == before
    assert main([*words, "--overwrite", "--seed", "3"]) == 0
    assert read_config("run/config.yaml").seed == 3


@pytest.mark.slow
def test_what_was_interrupted_goes_on_as_advised(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(PLAIN, run_dir="whole")
    stepped = training.PlainDisplay.stepped

    def press(self: Any, line: dict[str, Any]) -> None:
        if line["step"] == 6:
            raise KeyboardInterrupt
        stepped(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(training.PlainDisplay, "stepped", press)
        assert main(["train", "--config", toy, "--run-dir", "a run"]) == 130
    advice = re.fullmatch(
        r"equipoise: error: interrupted; (equipoise (.*)) goes on from the last checkpoint\n", capsys.readouterr().err
    )
    assert advice is not None
    assert advice[2] == "train --run-dir 'a run' --resume"
    assert main(["train", "--run-dir", "a run", "--resume", "--no-report"]) == 0
    assert "resumed at step 4 of 8" in capsys.readouterr().out
    assert log("a run") == log("whole")


def test_an_interruption_elsewhere_promises_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "recipes", press)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "equipoise: error: interrupted\n"


def test_only_a_run_can_be_resumed_and_only_as_it_was(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        fit(PLAIN, run_dir="half", observer=Interrupt(5))
    for words, said in (
        (["--run-dir", "nowhere"], "nowhere holds no run to go on with: it has no config.yaml"),
        (["--run-dir", "half", "--seed", "9"], "half cannot be resumed .*: seed was 0 and is 9 now. Drop these flags"),
        (["mdeq-digits", "--run-dir", "half"], "half holds a run of toy, not of mdeq-digits; leave the recipe out"),
    ):
        assert main(["train", "--resume", *words]) == 1, words
        assert re.fullmatch(rf"equipoise: error: {said}.*\n", capsys.readouterr().err)
    assert not pathlib.Path("nowhere").exists()
    assert main(["train", "--resume", "--run-dir", "half", "--log_every", "2", "--no-report"]) == 0


def test_a_run_goes_on_after_its_data_moved() -> None:
    """Where the data lies may differ, what is in it may not: images of another size are another configuration."""
    config = dataclasses.replace(zoo.mdeq_fashion_mnist(), data=FashionMNIST(root="old"))
    folder = RunFolder(pathlib.Path("run"), config, writes=True, note=print)
    folder.claim(resume=False, overwrite=False)
    moved = dataclasses.replace(config, data=FashionMNIST(root="new"))
    dataclasses.replace(folder, config=moved).claim(resume=True, overwrite=False)
    assert read_config("run/config.yaml") == moved
    other = dataclasses.replace(config, data=FashionMNIST(root="new", flip=True))
    with pytest.raises(RunError, match=r"data\.flip was False and is True now\. Drop"):
        dataclasses.replace(folder, config=other).claim(resume=True, overwrite=False)


def test_naming_the_recipe_resumes_the_run_with_its_own_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a job may be started and restarted by one and the same command."""
    asked: list[TrainConfig] = []
    monkeypatch.setattr(training, "fit", lambda config, **_: asked.append(config) or _stop())
    words = ["train", "mdeq-digits", "--run-dir", "run", "--resume"]
    main(words)
    pathlib.Path("run").mkdir()
    pathlib.Path("run/config.yaml").write_text(config_yaml(dataclasses.replace(asked[0], epochs=3)))
    main(words)
    assert [config.epochs for config in asked] == [20, 3]


def _stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_message_with_the_way_on(
    call: str, toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full when the second checkpoint is written."""
    fit(PLAIN, run_dir="whole")
    real = getattr(os, call)
    calls = 0

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > {"fsync": 6, "replace": 3}[call]:  # config, log, first checkpoint: file and folder each
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert main(["train", "--config", toy, "--run-dir", "run"]) == 1
    said = "run: No space left on device; make room, then equipoise train --run-dir run --resume"
    assert capsys.readouterr().err == f"equipoise: error: {said}\n"
    assert [path.name for path in pathlib.Path("run/checkpoints").iterdir()] == ["step-000000004.safetensors"]
    assert not list(pathlib.Path("run").glob(".*"))
    assert main(["train", "--run-dir", "run", "--resume", "--no-report"]) == 0
    assert log("run") == log("whole")


def test_a_folder_that_must_not_be_written_is_one_message(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the call that fails, as the superuser may write to a folder that is read-only."""
    real = builtins.open

    def read_only(file: Any, mode: str = "r", *rest: Any, **details: Any) -> Any:
        if "locked" in str(file) and set(mode) & set("wax+"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return real(file, mode, *rest, **details)

    pathlib.Path("locked").mkdir()
    monkeypatch.setattr(builtins, "open", read_only)
    assert main(["train", "--config", toy, "--run-dir", "locked"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"equipoise: error: locked/\S+: Permission denied\n", said), said
    assert list(pathlib.Path("locked").iterdir()) == []


def test_a_run_below_a_file_is_one_message(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("file").touch()
    assert main(["train", "--config", toy, "--run-dir", "file/run"]) == 1
    assert re.fullmatch(r"equipoise: error: file/run\S*: Not a directory\n", capsys.readouterr().err)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_on_a_terminal_the_bar_and_the_figures_have_room(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    display = LiveDisplay(console)
    display.started(pathlib.Path("runs/demo"), 85_800, 0, 11_100_000)
    line = {"step": 42_900, "epoch": 109, "loss": 0.516, "accuracy": 0.958, "mean_steps": 16.8, "converged": 0.6}
    display.stepped(line)
    display.stop()
    text = re.sub(r"\x1b\[[0-9;?]*\w", "", console.file.getvalue())  # type: ignore[attr-defined]
    bar, figures = text.splitlines()[-2:]
    assert re.fullmatch(r"epoch 110 [━╸╺ ]{5,} 42900/85800 \d:\d\d:\d\d left (-:--:--|\d+:\d\d:\d\d)\s*", bar), bar
    assert figures.strip() == "loss 0.516  accuracy 0.958  solver steps 16.8  converged 60%"
    assert max(map(len, text.splitlines()[-2:])) <= width
