"""Benchmarks run in their quick setting and write what they promise; their figures are not judged here."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
METHODS = {
    "picard": ("forward_ratio", "evals", "seconds", "peak_states"),
    "anderson": ("forward_ratio", "evals", "seconds", "peak_states"),
    "broyden": ("forward_ratio", "evals", "seconds", "peak_states"),
    "implicit": ("backward_ratio", "cosine"),
    "shine": ("backward_ratio", "cosine"),
    "jacobian-free": ("backward_ratio", "cosine"),
    "torchdeq-picard": ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine"),
    "torchdeq-anderson": ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine"),
    "torchdeq-broyden": ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine"),
}


@pytest.mark.slow
def test_solver_cost(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torchdeq")
    target = tmp_path / "cost.json"
    command = [sys.executable, "benchmarks/solver_cost.py", "--quick", "--json", str(target)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(target.read_text())
    for method, keys in METHODS.items():
        for key in keys:
            assert f"tanh/{method}/{key}" in figures
    # What is counted, not timed, is the same on every machine.
    assert figures["tanh/anderson/evals"] <= 34
    assert figures["tanh/anderson/peak_states"] <= 20
    assert figures["tanh/broyden/peak_states"] <= 28
    assert figures["tanh/implicit/cosine"] > 0.9999
    assert figures["mixed/easy_steps"] < figures["mixed/hard_steps"] / 3
    assert figures["mixed/row_evaluations_ratio"] < 0.7
