"""A run that was interrupted, by whatever, and resumed gives what it would have given: bit for bit."""

import dataclasses
import errno
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import time

import pytest
import torch
from toy import (
    ENVIRONMENT,
    FULL,
    PLAIN,
    Bomb,
    Interrupt,
    Interrupted,
    Run,
    Toy,
    command,
    contracting_toys,
    read_config,
    timeless,
)

from equipoise.train import SGD, AdamW, Result, RunError, TrainConfig, checkpoint, fit
from equipoise.train.run_folder import read_lines

pytestmark = pytest.mark.slow  # each test trains: together they take too long for the fast set

SGD_RUN = dataclasses.replace(PLAIN, optimizer=SGD(lr=0.05), tensorboard=True)
ADAMW_RUN = dataclasses.replace(FULL, optimizer=AdamW(lr=0.01, weight_decay=0.1), channels_last=True, log_every=5)
DOUBLE_RUN = dataclasses.replace(FULL, precision="64-true", stop_after=7, checkpoint_every=2)
SCALED_RUN = dataclasses.replace(contracting_toys()["scaled"], checkpoint_every=1)
TIGHT_RUN = dataclasses.replace(contracting_toys()["tight"], ema_decay=None)


def assert_same(found: Result, expected: Result) -> None:
    state = expected.model.state_dict()
    torch.testing.assert_close(found.model.state_dict(), state, rtol=0, atol=0)
    saved = checkpoint.read_tensors(found.run_dir / "model.safetensors")[0]
    torch.testing.assert_close({name: saved[name] for name in state}, state, rtol=0, atol=0)
    assert found.test["test_loss"] == expected.test["test_loss"]
    assert timeless(found.history) == timeless(expected.history)
    assert timeless(read_lines(found.run_dir)) == timeless(read_lines(expected.run_dir))


def interrupt(config: TrainConfig, run_dir: pathlib.Path, step: int, *, resume: bool = False) -> None:
    with pytest.raises(Interrupted):
        fit(config, run_dir=run_dir, resume=resume, observer=Interrupt(step))


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        pytest.param(FULL, (3,), id="within an epoch"),
        pytest.param(FULL, (1, 2, 5, 8), id="four times, before the first and the last checkpoint too"),
        pytest.param(SGD_RUN, (7,), id="from the end of an epoch"),
        pytest.param(ADAMW_RUN, (7,), id="weights in channels-last order"),
        pytest.param(DOUBLE_RUN, (4, 6), id="double precision, checkpoints at every other step, stopped in an epoch"),
        pytest.param(SCALED_RUN, (3, 6), id="capped convolutions, whose power iterations are part of the state"),
        pytest.param(TIGHT_RUN, (6,), id="layers that contract, after an evaluation"),
    ],
)
def test_resume(config: TrainConfig, steps: tuple[int, ...], whole: Run, tmp_path: pathlib.Path) -> None:
    expected = whole(config)
    for count, step in enumerate(steps):
        interrupt(config, tmp_path / "parts", step, resume=count > 0)
        torch.manual_seed(step)  # the caller's random state is no part of a run
    assert_same(fit(config, run_dir=tmp_path / "parts", resume=True), expected)


def test_finished_run(whole: Run, tmp_path: pathlib.Path) -> None:
    expected = whole(FULL)
    shutil.copytree(expected.run_dir, tmp_path / "second")
    observer = Interrupt(step=8)
    again = fit(FULL, run_dir=tmp_path / "second", resume=True, observer=observer)
    assert observer.notes == ["resumed at step 8 of 8"]
    assert_same(again, expected)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "pickle", "both"])
def test_damaged_checkpoint(damage: str, whole: Run, tmp_path: pathlib.Path) -> None:
    """It is named, and the checkpoint before it is used; without a whole one the run starts again."""
    interrupt(FULL, tmp_path / "parts", 7)
    newest, before = checkpoint.states(tmp_path / "parts" / "checkpoints")
    assert before.name == "step-000000005.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(
        {
            "truncated": content[:-100],
            "empty": b"",
            "flipped": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
            "pickle": pickle.dumps(Bomb(tmp_path / "exploded")),
            "both": content[:1000],
        }[damage]
    )
    if damage == "both":
        before.write_bytes(before.read_bytes()[:1000])
    observer = Interrupt()
    assert_same(fit(FULL, run_dir=tmp_path / "parts", resume=True, observer=observer), whole(FULL))
    *problems, last = observer.notes
    resumed = damage != "both"
    assert newest.name in problems[0]
    used = ["The checkpoint before it is used" in problem for problem in problems]
    assert used == ([True] if resumed else [False, False])
    assert last.endswith("resumed at step 5 of 8" if resumed else "starting from the beginning")
    assert not (tmp_path / "exploded").exists()


def test_nothing_is_unpickled(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(FULL, tmp_path, 7)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    fit(FULL, run_dir=tmp_path, resume=True)
    written = [path.read_bytes() for path in (*tmp_path.rglob("*.safetensors"), *tmp_path.glob("*.json*"))]
    assert not any(content.startswith((b"PK", b"\x80")) for content in written)  # zip archives, and pickles


@pytest.mark.parametrize("call", [3, 6])
def test_full_disk(call: int, whole: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, calls = os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) == 2 * call:  # of each file and of its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as raised:
            fit(FULL, run_dir=tmp_path / "parts")
    assert raised.value.__context__ is None
    assert not list(tmp_path.rglob("*.tmp"))
    assert all(checkpoint.read_tensors(path) for path in checkpoint.states(tmp_path / "parts" / "checkpoints"))
    assert_same(fit(FULL, run_dir=tmp_path / "parts", resume=True), whole(FULL))


def test_existing_run(tmp_path: pathlib.Path) -> None:
    interrupt(FULL, tmp_path, 4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"already holds a run; continue it with --resume, replace it with --overwrite"):
        fit(FULL, run_dir=tmp_path)
    with pytest.raises(RunError, match=r"seed was 0 and is 1 now") as raised:
        fit(
            dataclasses.replace(FULL, seed=1, solver=dataclasses.replace(FULL.solver, max_steps=5)),
            run_dir=tmp_path,
            resume=True,
        )
    assert "solver.max_steps was 4 and is 5 now" in str(raised.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    replaced = fit(PLAIN, run_dir=tmp_path, overwrite=True)
    assert read_config(tmp_path / "config.yaml") == PLAIN
    assert {line["step"] for line in replaced.history} == {4, 8}
    names = [path.name for path in checkpoint.states(tmp_path / "checkpoints")]
    assert names == ["step-000000008.safetensors", "step-000000004.safetensors"]


def names_in(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "events" not in path.name}


@pytest.mark.parametrize(
    ("kills", "epochs"),
    [(2, 6), pytest.param(20, 50, marks=[pytest.mark.extended, pytest.mark.timeout(900)])],
)
def test_kills(kills: int, epochs: int, tmp_path: pathlib.Path) -> None:
    """Processes that are killed at random moments lose no more than a checkpoint."""
    config = dataclasses.replace(FULL, epochs=epochs, data=Toy(crop_padding=1, flip=True))
    expected, folder = fit(config, run_dir=tmp_path / "whole"), tmp_path / "parts"
    chance, reached = random.Random(20), set()
    for _ in range(kills):
        process = subprocess.Popen(command(config, folder), env=ENVIRONMENT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == b"started\n"
            time.sleep(chance.uniform(0.0, 0.5))
            process.kill()
        assert process.wait() == -9
        states = checkpoint.states(folder / "checkpoints")
        assert all(checkpoint.read_tensors(path) for path in states)  # whatever has its final name is whole
        assert read_config(folder / "config.yaml") == config
        reached.add(states[0].name if states else "")
    assert len(reached) >= kills // 2
    assert_same(fit(config, run_dir=folder, resume=True), expected)
    assert names_in(folder) == names_in(expected.run_dir)
