"""`equipoise train` from end to end: run folders, interruptions, refusals and the display."""

import builtins
import dataclasses
import errno
import io
import os
import pathlib
import re
from typing import Any

import pytest
from console import Console
from rich.console import Console as Terminal
from toy import PLAIN, Interrupt, Interrupted, Run, read_config, timeless

from equipoise import zoo
from equipoise.cli import train as training
from equipoise.cli.display import LiveDisplay
from equipoise.data import FashionMNIST
from equipoise.train import RunError, TrainConfig, fit
from equipoise.train.run_folder import RunFolder, config_yaml, read_lines


@pytest.fixture
def toy(console: Console) -> tuple[str, ...]:
    """The command that trains the toy."""
    pathlib.Path("toy.yaml").write_text(config_yaml(PLAIN))
    return ("train", "--config", "toy.yaml")


def contents(folder: str) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


def press(*_: object) -> int:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_numbered_runs(toy: tuple[str, ...], console: Console) -> None:
    for number in (1, 2):
        assert f"runs/toy-{number}" in console.out(*toy, "--stop_after", "1", "--no-report")
    assert read_config("runs/toy-2/config.yaml") == dataclasses.replace(PLAIN, stop_after=1)


@pytest.mark.slow
def test_existing_run(toy: tuple[str, ...], console: Console) -> None:
    words = (*toy, "--run-dir", "run", "--stop_after", "1", "--no-report")
    console.out(*words)
    before = contents("run")
    assert re.fullmatch(r"run already holds a run; .*--resume.*--overwrite.*--run-dir", console.error(*words))
    assert contents("run") == before
    console.out(*words, "--overwrite", "--seed", "3")
    assert read_config("run/config.yaml").seed == 3


@pytest.mark.slow
def test_interruption(toy: tuple[str, ...], console: Console, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the command that goes on."""
    stepped = training.PlainDisplay.stepped
    with monkeypatch.context() as patch:
        patch.setattr(
            training.PlainDisplay, "stepped", lambda self, line: press() if line["step"] == 6 else stepped(self, line)
        )
        said = console.both(*toy, "--run-dir", "a run", code=130)[1]
    assert said.endswith("interrupted; equipoise train --run-dir 'a run' --resume goes on from the last checkpoint\n")
    assert "resumed at step 4 of 8" in console.out("train", "--run-dir", "a run", "--resume", "--no-report")
    assert timeless(read_lines("a run")) == timeless(read_lines(whole(PLAIN).run_dir))


def test_other_interruption(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "recipes", press)
    assert console.error("recipes", code=130) == "interrupted"


@pytest.mark.slow
def test_resume_refusals(console: Console) -> None:
    with pytest.raises(Interrupted):
        fit(PLAIN, run_dir="half", observer=Interrupt(5))
    for words, said in (
        (["--run-dir", "nowhere"], "nowhere holds no run to go on with: it has no config.yaml"),
        (["--run-dir", "half", "--seed", "9"], "half cannot be resumed .*: seed was 0 and is 9 now. Drop these flags"),
        (["mdeq-digits", "--run-dir", "half"], "half holds a run of toy, not of mdeq-digits; leave the recipe out"),
    ):
        assert re.match(said, console.error("train", "--resume", *words))
    assert not pathlib.Path("nowhere").exists()
    console.out("train", "--resume", "--run-dir", "half", "--log_every", "2", "--no-report")


def test_moved_data(console: Console) -> None:
    """The place of the data may change, its content may not: other images are another configuration."""
    config = dataclasses.replace(zoo.mdeq_fashion_mnist(), data=FashionMNIST(root="old"))
    folder = RunFolder(pathlib.Path("run"), config, writes=True, note=print)
    folder.claim(resume=False, overwrite=False)
    moved = dataclasses.replace(config, data=FashionMNIST(root="new"))
    dataclasses.replace(folder, config=moved).claim(resume=True, overwrite=False)
    assert read_config("run/config.yaml") == moved
    other = dataclasses.replace(config, data=FashionMNIST(root="new", flip=True))
    with pytest.raises(RunError, match=r"data\.flip was False and is True now\. Drop"):
        dataclasses.replace(folder, config=other).claim(resume=True, overwrite=False)


def test_resume_by_recipe(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """One and the same command starts a job and starts it again; the run keeps its own flags."""
    asked: list[TrainConfig] = []
    monkeypatch.setattr(training, "fit", lambda config, **_: asked.append(config) or press())
    words = ("train", "mdeq-digits", "--run-dir", "run", "--resume")
    console.both(*words, code=130)
    pathlib.Path("run").mkdir()
    pathlib.Path("run/config.yaml").write_text(config_yaml(dataclasses.replace(asked[0], epochs=3)))
    console.both(*words, code=130)
    assert [config.epochs for config in asked] == [20, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "works"), [("fsync", 6), ("replace", 3)])
def test_full_disk(
    call: str, works: int, toy: tuple[str, ...], console: Console, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after the configuration, the log and the first checkpoint; `fsync` is of file and folder."""
    real, calls = getattr(os, call), iter(range(1000))

    def full(*arguments: Any) -> Any:
        if next(calls) >= works:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        errors = console.both(*toy, "--run-dir", "run", code=1)[1]
    assert errors.endswith("run: No space left on device; make room, then equipoise train --run-dir run --resume\n")
    assert [path.name for path in pathlib.Path("run/checkpoints").iterdir()] == ["step-000000004.safetensors"]
    assert not list(pathlib.Path("run").glob(".*"))
    console.out("train", "--run-dir", "run", "--resume", "--no-report")
    assert timeless(read_lines("run")) == timeless(read_lines(whole(PLAIN).run_dir))


def test_unwritable_folders(toy: tuple[str, ...], console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the call that fails, as the superuser may write to a folder that is read-only."""
    pathlib.Path("file").touch()
    assert re.fullmatch(r"file/run\S*: Not a directory", console.error(*toy, "--run-dir", "file/run"))
    real = builtins.open

    def read_only(file: Any, mode: str = "r", *rest: Any, **details: Any) -> Any:
        if "locked" in str(file) and set(mode) & set("wax+"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return real(file, mode, *rest, **details)

    pathlib.Path("locked").mkdir()
    monkeypatch.setattr(builtins, "open", read_only)
    assert re.fullmatch(r"locked/\S+: Permission denied", console.error(*toy, "--run-dir", "locked"))
    assert not any(pathlib.Path("locked").iterdir())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_live_display(width: int) -> None:
    terminal = Terminal(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    display = LiveDisplay(terminal)
    display.started(pathlib.Path("runs/demo"), 85_800, 0, 11_100_000)
    line = {"step": 42_900, "epoch": 109, "loss": 0.516, "accuracy": 0.958, "mean_steps": 16.8, "converged": 0.6}
    display.stepped(line)
    display.stop()
    text = re.sub(r"\x1b\[[0-9;?]*\w", "", terminal.file.getvalue())  # type: ignore[attr-defined]
    bar, figures = text.splitlines()[-2:]
    assert re.fullmatch(r"epoch 110 [━╸╺ ]{5,} 42900/85800 \d:\d\d:\d\d left (-:--:--|\d+:\d\d:\d\d)\s*", bar), bar
    assert figures.strip() == "loss 0.516  accuracy 0.958  solver steps 16.8  converged 60%"
    assert max(len(bar), len(figures)) <= width
