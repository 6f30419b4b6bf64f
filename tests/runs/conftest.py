"""Runs that several tests compare with, done only once, and the command line."""

import pathlib

import pytest
import torch
from console import Console
from toy import Run, command_line

from equipoise.train import Result, TrainConfig, fit


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains as a configuration says, without interruption; a run whose layers contract ends with the proof of it."""
    done: dict[TrainConfig, Result] = {}

    def run(config: TrainConfig) -> Result:
        if config not in done:
            done[config] = result = fit(config, run_dir=tmp_path_factory.mktemp("whole"))
            assert config.model.contraction is None or result.test["certified_lipschitz"] < 1
        return done[config]

    return run


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """The current folder of `console`; a module overrides it with its own runs."""
    return tmp_path


@pytest.fixture
def console(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Console:
    """The command line with the defaults of a user, in `folder`."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "110")
    return Console(command_line, capsys)
