"""What a decoder of digits, trained by optimizing its own latents, costs and yields.

The names C7, C8, C10 are those of the checks in the specification of joint inference and input optimization; C7's exact
counts are in tests/unit/inputs/test_rows.py.
"""

import dataclasses
import statistics

import pytest
import torch

import equipoise as eq

pytest.importorskip("sklearn")

from benchmarks.input_optimization import models as input_models
from benchmarks.input_optimization.methods import Cold, Method, Ours, Rule, Warm
from benchmarks.input_optimization.models import Problem
from benchmarks.input_optimization.run import Judge

STEPS = (0.05, 0.1, 0.2)


@pytest.fixture(scope="module")
def trained() -> tuple[Problem, list[float]]:
    """All digits, and the mean squared error of each training step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    problem = input_models.generative(size=128)
    history = input_models.train(problem.rows(slice(0, 1400)), input_models.jointly, 100, steady=4.0, rate=3e-3)
    torch.set_default_dtype(before)
    return problem.frozen(), [cost / 64 for cost in history]


@pytest.mark.slow
def test_c10_training_by_the_envelope(trained: tuple[Problem, list[float]]) -> None:
    _, history = trained
    assert history[0] > 0.1
    assert statistics.fmean(history[-10:]) < 0.025


@pytest.mark.slow
def test_c8_joint_cost(trained: tuple[Problem, list[float]]) -> None:
    problem = trained[0].rows(slice(1400, 1496))
    solution = eq.optimize_inputs(
        problem.cell,
        z0=problem.z0,
        x0=problem.x0,
        cost=problem.cost,
        targets=problem.targets,
        optimizer=eq.inputs.InputOptimizer(solver=eq.Anderson(memory=5, max_steps=24, ridge=1e-2)),
    )
    joint, honest = float(solution.joint_cost.mean()), float(solution.cost.mean())
    assert abs(joint - honest) < 0.05 * honest
    torch.testing.assert_close(solution.cost, problem.honest(solution.value[2]), rtol=1e-2, atol=1e-3)
    assert honest / 64 < 0.025


@pytest.mark.slow
def test_c7_work_to_equal_cost(trained: tuple[Problem, list[float]]) -> None:
    problem = trained[0].rows(slice(1400, 1432))
    judge = Judge(problem, 0.05, rounds=150)

    def least(*methods: Method) -> int:
        """Evaluations and products of the cheapest way at its best step."""
        reached = [judge.reach(dataclasses.replace(m, step=s * m.step)) for m in methods for s in STEPS]
        return min(reach.evals + reach.vjps for reach in reached if reach.rounds is not None)

    gd, adam = Rule(name="gd"), Rule(name="adam")
    ours = least(Ours(step=1.0))
    assert ours <= 0.3 * least(Warm(rule=gd, step=1.0, rtol=1e-3))
    assert ours <= 0.1 * least(Cold(rule=adam, step=1.0, rtol=1e-3))
    assert ours <= 0.8 * least(*(Warm(rule=gd, step=1.0, steps=k) for k in (1, 2, 4)))
