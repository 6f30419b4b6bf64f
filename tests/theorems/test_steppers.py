"""Integration steps: orders of accuracy, the flow of torchdiffeq, regions of stability."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from problems import follow, inverted, solve_linear
from torch import Tensor

import equipoise as eq
from equipoise.solvers import BS3, VCAB3, Euler, SteadyState, Stepper, Tsit5

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchdiffeq import odeint


def name(stepper: Any) -> str:
    return type(stepper).__name__


def error_on_the_circle(stepper: Stepper, evaluations: int, steps: list[float]) -> float:
    """Error at the end of y'' = -y, started on the unit circle, with these steps, whatever their errors."""

    class Scheduled(type(stepper)):  # type: ignore[misc]
        def absorb(self, state: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            landed, rejected, step = super().absorb(state, *arguments)
            number = (state.accepted + (landed & state.size.isfinite())).clamp_max(len(steps) - 1)
            return landed, rejected, torch.where(landed, torch.tensor(steps)[number], step)

    solver = SteadyState(stepper=Scheduled(error_ratio=math.inf))
    start, time = torch.tensor([[1.0, 0.0]]), sum(steps)
    end = follow(solver, lambda z: torch.stack([z[:, 1], -z[:, 0]], dim=1), start, evaluations * len(steps) + 1)[-1]
    assert int(end.accepted) == len(steps)
    return float((end.base[0] - torch.tensor([math.cos(time), -math.sin(time)])).norm())


@pytest.mark.parametrize("varying", [False, True], ids=["constant", "varying"])
@pytest.mark.parametrize(
    ("stepper", "evaluations", "order", "coarse"),
    [(VCAB3(), 1, 3, 80), (BS3(), 3, 3, 40), (Tsit5(), 6, 5, 12), (Euler(), 1, 1, 80)],
    ids=lambda x: name(x) if isinstance(x, Stepper) else "",
)
def test_order(stepper: Stepper, evaluations: int, order: int, coarse: int, varying: bool) -> None:
    errors = []
    for count in (coarse, 2 * coarse, 4 * coarse):
        h = 4 / count
        # A multistep method raises its order: its first step must be as small as the errors that are measured.
        start = [h**2] if isinstance(stepper, VCAB3) else []
        steps = [h * (1 + 0.4 * math.sin(12 * i * h) * varying) for i in range(count)]
        errors.append(error_on_the_circle(stepper, evaluations, start + steps))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(order - 0.15 < slope < order + 0.6 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("stepper", [VCAB3(error_ratio=3e-4), BS3(error_ratio=1e-5), Tsit5(error_ratio=1e-7)], ids=name)
def test_torchdiffeq(stepper: Stepper) -> None:
    weight, z0 = torch.randn(6, 6) / 2, torch.randn(1, 6)
    field = lambda z: torch.tanh(z @ weight + 0.5) - z  # noqa: E731
    tracks = follow(SteadyState(stepper=stepper, first_step=1e-4), field, z0, 600)
    times, states = [0.0], [z0]
    for before, track in itertools.pairwise(tracks):
        if int(track.accepted) > int(before.accepted) and times[-1] <= 2:
            times.append(times[-1] + float(before.step))
            states.append(track.base)
    assert times[-1] > 2
    exact = odeint(lambda _, z: field(z), z0, torch.tensor(times), method="dopri8", rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.stack(states), exact, rtol=1e-4, atol=1e-5)


def test_error_relative_to_a_rate() -> None:
    """Why the control of the source is not used: at F = -4z, |e| <= 0.2 |F| admits steps of BS3 that make z grow."""
    h, k1 = 0.65, -4.0
    k2 = k1 * (1 - 4 * h / 2)
    k3 = k1 - 4 * h * 3 / 4 * k2
    k4 = k1 - 4 * h * (2 / 9 * k1 + 1 / 3 * k2 + 4 / 9 * k3)
    error = abs(h * (-5 / 72 * k1 + k2 / 12 + k3 / 9 - k4 / 8))
    assert error <= 0.2 * abs(k1)
    assert abs(k4) > abs(k1)
    assert error > BS3().error_ratio * h * abs(k1)


@pytest.mark.parametrize("stepper", [VCAB3(), BS3(), Tsit5()], ids=name)
@pytest.mark.parametrize("turn", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("decay", [0.0, -3.0])
def test_rotation(stepper: Stepper, turn: float, decay: float) -> None:
    """Eigenvalues decay +- i turn, where Picard iteration fails."""
    x, matrix = torch.ones(1, 2), torch.tensor([[decay, -turn], [turn, decay]])
    solution = solve_linear(matrix, x, SteadyState(stepper=stepper, max_steps=400)).raise_for_status()
    torch.testing.assert_close(solution.value, inverted(matrix, x), rtol=5e-3, atol=1e-3 / turn)
    assert eq.Status.CONVERGED not in solve_linear(matrix, x, eq.Picard(max_steps=400)).status


@pytest.mark.parametrize("stepper", [VCAB3(), BS3(), Tsit5(), Euler()], ids=name)
def test_stiff_spectrum(stepper: Stepper) -> None:
    """Too stiff for an explicit method in so few steps, it says so, and does not grow meanwhile."""
    x = torch.ones(1, 12)
    for top, steps in ((30.0, 500), (1e4, 200)):
        rates = torch.diag(torch.logspace(0, math.log10(top), 12))
        solver = SteadyState(stepper=stepper, max_steps=steps)
        solution = solve_linear(torch.eye(12) - rates, x @ rates, solver, trace=True)
        if top == 30.0:
            torch.testing.assert_close(solution.raise_for_status().value, x, rtol=0, atol=1e-2)
    assert solution.status.tolist() == [eq.Status.MAX_STEPS]
    assert float(solution.trace[100:].max()) < float(solution.trace[0]) / 10
