"""Where methods of fixed points and roots fail, and what following the flow costs there: fates and counts, recorded."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.solvers import BS3, VCAB3, Euler, SteadyState, Tsit5
from equipoise.zoo import MDEQClassifier, MDEQConfig

DIVERGED, MAX_STEPS = eq.Status.DIVERGED, eq.Status.MAX_STEPS
STEPPERS = {"VCAB3": VCAB3(), "BS3": BS3(), "Tsit5": Tsit5(), "Euler": Euler()}


def solvers(max_steps: int) -> dict[str, eq.Solver]:
    return {
        "Picard": eq.Picard(max_steps=max_steps),
        "Anderson": eq.Anderson(max_steps=max_steps),
        "Broyden": eq.Broyden(max_steps=max_steps, memory=60),
        **{name: SteadyState(stepper=stepper, max_steps=max_steps) for name, stepper in STEPPERS.items()},
    }


Problem = tuple[Callable[..., Tensor], Tensor]


# --- affine maps -----------------------------------------------------------------------------------------------------


def scaled(alpha: float) -> Problem:
    return lambda z, x: alpha * z + x, torch.ones(1, 1)


def turning(decay: float, turn: float) -> Problem:
    matrix = torch.tensor([[decay, -turn], [turn, decay]])
    return lambda z, x: z @ matrix.T + x, torch.ones(1, 2)


def stiff(top: float) -> Problem:
    rates = torch.logspace(0, math.log10(top), 12)
    return lambda z, x: z + rates * (x - z), torch.ones(1, 12)


Fates = dict[str, int | eq.Status]

# Evaluations to a relative residual of 1e-3, or how it ended. Picard's at 0.9 and -0.9 are those of the specification
# of the source; VCAB3 begins at order 1 here, so its counts are its own.
AFFINE: dict[str, tuple[Callable[[], Problem], Fates]] = {
    "0.9": (
        lambda: scaled(0.9),
        {"Picard": 45, "Anderson": 3, "Broyden": 3, "VCAB3": 15, "BS3": 20, "Tsit5": 41, "Euler": 14},
    ),
    "-0.9": (
        lambda: scaled(-0.9),
        {"Picard": 73, "Anderson": 3, "Broyden": 3, "VCAB3": 28, "BS3": 11, "Tsit5": 27, "Euler": 15},
    ),
    "-3": (
        lambda: scaled(-3.0),
        {"Picard": DIVERGED, "Anderson": 3, "Broyden": 3, "VCAB3": 26, "BS3": 16, "Tsit5": 43, "Euler": 18},
    ),
    "-30": (
        lambda: scaled(-30.0),
        {"Picard": DIVERGED, "Anderson": 3, "Broyden": 3, "VCAB3": 24, "BS3": 21, "Tsit5": 48, "Euler": 21},
    ),
    "-3 +- 10i": (
        lambda: turning(-3.0, 10.0),
        {"Picard": DIVERGED, "Anderson": 4, "Broyden": 5, "VCAB3": 52, "BS3": 59, "Tsit5": 133, "Euler": 133},
    ),
}


def check(name: str, solver: eq.Solver, problem: Problem, fate: int | eq.Status) -> None:
    f, x = problem
    solution = eq.fixed_point(f, torch.zeros_like(x), x, solver=solver, params=())
    r = f(solution.value, x) - solution.value
    torch.testing.assert_close(solution.residual, r.norm(dim=1), rtol=1e-6, atol=1e-12)
    if isinstance(fate, eq.Status):
        assert solution.status.tolist() == [fate], name
        start = torch.zeros_like(x)
        assert float(r.norm()) <= float((f(start, x) - start).norm()), "never worse than the start"
    else:
        assert solution.status.tolist() == [eq.Status.CONVERGED], name
        assert int(solution.num_steps) == pytest.approx(fate, rel=0.05, abs=1), name


@pytest.mark.parametrize("eigenvalues", AFFINE)
def test_fates_on_affine_maps(eigenvalues: str) -> None:
    make, fates = AFFINE[eigenvalues]
    for name, solver in solvers(200).items():
        check(name, solver, make(), fates[name])


@pytest.mark.slow
def test_fates_on_a_stiff_spectrum() -> None:
    """Twelve eigenvalues down to -99: the flow pays for stability, Broyden's method for the dimension alone."""
    fates: Fates = {"Picard": DIVERGED, "Anderson": DIVERGED, "Broyden": 21}
    fates |= {"VCAB3": 1052, "BS3": 690, "Tsit5": 1021, "Euler": 289}
    for name, solver in solvers(1200).items():
        check(name, solver, stiff(1e2), fates[name])


@pytest.mark.parametrize("name", STEPPERS)
def test_a_spectrum_too_stiff_for_the_steps_is_reported_with_the_residual(name: str) -> None:
    f, x = stiff(1e4)
    solver = solvers(60)[name]
    solution = eq.fixed_point(f, 0 * x, x, solver=solver, params=())
    assert solution.status.tolist() == [MAX_STEPS]
    with pytest.raises(eq.ConvergenceError, match="MAX_STEPS: 1 of 1 samples"):
        solution.raise_for_status()
    assert solution.residual.item() == pytest.approx(float((f(solution.value, x) - solution.value).norm()))
    assert eq.fixed_point(f, 0 * x, x, solver=eq.Broyden(max_steps=60, memory=60), params=()).converged.item()


# --- multiscale models without training ------------------------------------------------------------------------------


def multiscale(config: MDEQConfig, rows: int = 2) -> tuple[nn.Module, Tensor]:
    """Map and injection of a model as it is initialized, for images of noise."""
    model = MDEQClassifier(config).eval()
    shape = config.image_channels, config.image_size, config.image_size
    return model.deq.cell, model.stem(torch.randn(rows, *shape)).detach()


@torch.no_grad()
def relative_residual(cell: nn.Module, u: Tensor, solver: eq.Solver, *, ahead: bool = False) -> tuple[Tensor, Tensor]:
    """Of each sample, from zeros or from one step of the map ahead, by an evaluation apart; and the statuses."""
    z0 = cell.zeros(u)  # type: ignore[operator]
    solution = eq.fixed_point(cell, cell(z0, u) if ahead else z0, u, solver=solver)
    z, fz = (
        torch.cat([level.flatten(1) for level in state], dim=1) for state in (solution.value, cell(solution.value, u))
    )
    torch.testing.assert_close(solution.residual, (fz - z).norm(dim=1), rtol=1e-6, atol=1e-9)
    assert bool(((solution.residual <= 1e-3 * fz.norm(dim=1) * (1 + 1e-9)) | ~solution.converged).all())
    return (fz - z).norm(dim=1) / fz.norm(dim=1), solution.status


@pytest.mark.slow
def test_eighteen_evaluations_of_the_published_model_of_cifar() -> None:
    """Norms make f independent of the length of z, so zero is singular: steps of controlled accuracy crawl off it.

    The first step of `SteadyState` is one of Picard's: 0.34 (a prototype with other norms: 0.26), where
    Picard is at 0.88 (0.87), damped Picard at 0.38 (0.29), Anderson at 0.38 and Broyden at 0.58.
    """
    cell, u = multiscale(MDEQConfig.cifar10_tiny())
    for ahead in (False, True):
        found, status = relative_residual(cell, u, SteadyState(max_steps=18), ahead=ahead)
        assert status.tolist() == [MAX_STEPS] * 2
        assert 0.2 < float(found.min()) <= float(found.max()) < 0.45
    bounds = [
        (eq.Picard(max_steps=18), 0.7, 1.0),
        (eq.Picard(max_steps=18, damping=0.2), 0.25, 0.5),
        (eq.Anderson(max_steps=18), 0.25, 0.5),
        (eq.Broyden(max_steps=18, memory=18), 0.4, 0.8),
    ]
    for solver, least, most in bounds:
        found, status = relative_residual(cell, u, solver)
        assert status.tolist() == [MAX_STEPS] * 2
        assert least < float(found.min()) <= float(found.max()) < most, (solver, found)


@pytest.mark.slow
def test_a_hundred_evaluations_of_a_small_model_and_a_thousand() -> None:
    """Two images of the model of the digits. From zeros after 100 evaluations: Picard 0.07 and 0.13, Anderson 0.002 and
    0.007, Broyden 0.01 and 0.02, VCAB3 0.02 and 0.09, Euler 0.13 and 0.16, but BS3 0.8 and Tsit5 0.9, which crawl; from
    one step ahead 0.01 and 0.07, 0.11 and 0.13. No method is at 1e-3 yet, and each says so."""
    cell, u = multiscale(MDEQConfig.digits())
    for name, solver in solvers(100).items():
        found, status = relative_residual(cell, u, solver)
        assert status.tolist() == [MAX_STEPS] * 2
        crawls = name in ("BS3", "Tsit5")
        assert (float(found.min()) > 0.7) if crawls else (float(found.max()) < 0.25), (name, found)
        if crawls:
            assert float(relative_residual(cell, u, solver, ahead=True)[0].max()) < 0.25
    # One image is there after some 350 evaluations, the other at 0.017. What Broyden's method finds repels the flow:
    # there the largest real parts of the eigenvalues of J are 1.06 and 1.17.
    found, status = relative_residual(cell, u, SteadyState(max_steps=1000))
    assert sorted(status.tolist()) == [eq.Status.CONVERGED, MAX_STEPS], found
    assert 1e-3 < float(found.max()) < 0.05
    assert relative_residual(cell, u, eq.Broyden(max_steps=500, memory=500))[1].tolist() == [eq.Status.CONVERGED] * 2
