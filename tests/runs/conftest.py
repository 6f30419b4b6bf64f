"""Runs that several tests compare with, done only once."""

from __future__ import annotations

import pytest
from toy import Run

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
