"""L2 logistic regression by L-BFGS, and the derivative of a held-out loss in the strength of its penalty.

The inner problem is `sum_i log(1 + exp(-m_i(z))) + e^l |z|^2 / 2` with margins `m` and `l` the hyperparameter, one a
row; the held-out loss `L` has no penalty. Then `dL/dl = -e^l z . q` where `H q = grad L`, `H` the Hessian.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import VANILLA, dense_bfgs, recorded
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.fixed_point import solve_map

SIZE = 30
SOLVER = eq.LBFGS(max_steps=300, memory=100, rtol=0, atol=1e-9)
EXACT = eq.Implicit(solver=eq.LBFGS(max_steps=300, memory=60, rtol=1e-11))
STRENGTHS = torch.tensor([[-2.0], [0.0], [2.0], [4.0]], dtype=torch.float64)


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Standardized features of both parts, labels of both parts in -1, 1."""
    x, y = load_breast_cancer(return_X_y=True)
    x, x_val, y, y_val = train_test_split(x, 2.0 * y - 1, test_size=0.25, random_state=0, stratify=y)
    scaler = StandardScaler().fit(x)
    return scaler.transform(x), scaler.transform(x_val), y, y_val


@functools.cache
def signed() -> tuple[Tensor, Tensor]:
    """Features times label, `(n, 30)`: the margins of weights `z` are `z @ signed.T`."""
    x, x_val, y, y_val = data()
    return torch.tensor(x * y[:, None]), torch.tensor(x_val * y_val[:, None])


def training_loss(z: Tensor, log_lambda: Tensor) -> Tensor:
    return softplus(-z @ signed()[0].T).sum(1) + 0.5 * log_lambda.exp()[:, 0] * z.square().sum(1)


def held_out_loss(z: Tensor) -> Tensor:
    return softplus(-z @ signed()[1].T).sum(1)


def held_out_gradient(z: Tensor) -> Tensor:
    return -torch.sigmoid(-z @ signed()[1].T) @ signed()[1]


def train(
    log_lambda: Tensor, solver: eq.LBFGS = SOLVER, gradient: eq.gradients.Gradient = EXACT, z0: Tensor | None = None
) -> eq.Solution[Tensor]:
    z0 = torch.zeros(len(log_lambda), SIZE) if z0 is None else z0
    f = DescentMap(training_loss, z0, (log_lambda,), params=())
    return solve_map(f, z0, solver=solver, gradient=gradient).raise_for_status()


def hypergradient(log_lambda: Tensor, *choices: object, **options: bool) -> Tensor:
    value = held_out_loss(train(log_lambda, *choices).value).sum()  # type: ignore[arg-type]
    return torch.autograd.grad(value, log_lambda, **options)[0]


def leaf(log_lambda: Tensor = STRENGTHS) -> Tensor:
    return log_lambda.clone().requires_grad_()


class Dense:
    """The optimum of each row by Newton's method, `(B, 30)`; `q`; and dL/dl, `(B, 1)`."""

    def __init__(self, log_lambda: Tensor) -> None:
        self.strength, self.z, data = log_lambda.exp(), torch.zeros(len(log_lambda), SIZE), signed()[0]
        for _ in range(25):
            p = torch.sigmoid(-self.z @ data.T)
            penalty = self.strength[:, :, None] * torch.eye(SIZE)
            hessian = torch.einsum("bn,ni,nj->bij", p * (1 - p), data, data) + penalty
            self.z = self.z - torch.linalg.solve(hessian, self.strength * self.z - p @ data)
        self.q = torch.linalg.solve(hessian, held_out_gradient(self.z))
        self.slope = -self.strength * (self.z * self.q).sum(1, keepdim=True)


@functools.cache
def dense() -> Dense:
    return Dense(STRENGTHS)


def relative(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).norm(dim=1) / y.norm(dim=1)


def central_differences(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-2) -> Tensor:
    """Of fourth order, all points as one batch: `(B, 1) -> (B, 1)`."""
    far, near, ahead, beyond = f(torch.cat([x - 2 * h, x - h, x + h, x + 2 * h])).split(len(x))
    return (8 * (ahead - near) - (beyond - far)) / (12 * h)


def test_minimizer() -> None:
    """Scikit-learn and Newton's method find the same optimum."""
    x, _, y, _ = data()
    z = train(STRENGTHS, dataclasses.replace(SOLVER, memory=10)).value
    for row, strength in zip(z, STRENGTHS.exp(), strict=True):
        options = {"fit_intercept": False, "solver": "newton-cholesky", "tol": 1e-10, "max_iter": 1000}
        theirs = LogisticRegression(C=1 / float(strength), **options).fit(x, y).coef_
        assert float(relative(row[None], torch.tensor(theirs))) < 1e-6
    assert float(relative(z, dense().z).max()) < 1e-8


@pytest.mark.parametrize(
    "gradient",
    [
        EXACT,
        eq.Implicit(solver=EXACT.solver, start=VANILLA),
        eq.Implicit(solver=eq.Anderson(max_steps=100, memory=40, rtol=1e-11), start=VANILLA),
        eq.Implicit(solver=eq.Broyden(max_steps=100, memory=100, rtol=1e-11), start=VANILLA),
    ],
    ids=["LBFGS", "LBFGS from SHINE", "Anderson from SHINE", "Broyden from SHINE"],
)
def test_hypergradient(gradient: eq.Implicit) -> None:
    reports: list[eq.Solution[Tensor]] = []
    slopes = hypergradient(leaf(), SOLVER, dataclasses.replace(gradient, observe=reports.append))
    assert bool(reports[0].converged.all())
    torch.testing.assert_close(slopes, dense().slope, rtol=1e-8, atol=0)


@pytest.mark.slow
def test_retraining() -> None:
    """First and second derivatives are those of retraining with other strengths."""
    fine = dataclasses.replace(SOLVER, atol=1e-11)
    retrained = central_differences(lambda x: held_out_loss(train(x, fine).value)[:, None], STRENGTHS)
    torch.testing.assert_close(dense().slope, retrained, rtol=1e-6, atol=0)
    log_lambda = leaf()
    (curvature,) = torch.autograd.grad(hypergradient(log_lambda, create_graph=True).sum(), log_lambda)
    expected = central_differences(lambda x: Dense(x).slope, STRENGTHS)
    torch.testing.assert_close(curvature, expected, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_inner_tolerance() -> None:
    """The error of the hypergradient is proportional to it."""
    errors = []
    for atol in (1e-2, 1e-5, 1e-8):
        slopes = hypergradient(leaf(), dataclasses.replace(SOLVER, memory=20, atol=atol))
        errors.append(float((slopes / dense().slope - 1).abs().max()))
        assert errors[-1] <= 2 * atol
    assert errors[-1] < 1e-4 * errors[0]


# --- SHINE ---------------------------------------------------------------------------------------------------------


def quality(found: eq.LBFGS | Tensor) -> tuple[float, float, float]:
    """Of a q, by default SHINE's: error, cosine with the exact one, error of the hypergradient; medians over starts."""
    repeats = 4
    exact, z = Dense(STRENGTHS.repeat(repeats, 1)), dense().z.repeat(repeats, 1)
    q = found
    if isinstance(found, eq.LBFGS):
        z0 = torch.randn(len(z), SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        solution = train(exact.strength.log(), found, z0=z0)
        z, q = solution.value, solution.inverse.rmv(held_out_gradient(solution.value))
    assert bool((q.norm(dim=1) < 3 * held_out_gradient(z).norm(dim=1)).all())
    slope = -exact.strength * (z * q).sum(1, keepdim=True)
    measures = relative(q, exact.q), cosine_similarity(q, exact.q), relative(slope, exact.slope)
    error, cosine, slope_error = (float(x.median()) for x in measures)
    return error, cosine, slope_error


@pytest.mark.slow
def test_shine_by_tolerance() -> None:
    rows = [quality(dataclasses.replace(SOLVER, wolfe=0.1, atol=atol)) for atol in (1e1, 1e-4, 1e-8)]
    errors, cosines, slopes = zip(*rows, strict=True)
    assert list(errors) == sorted(errors, reverse=True)
    assert list(cosines) == sorted(cosines)
    assert (errors[-1] < 0.35, cosines[-1] > 0.92, slopes[-1] < 0.05) == (True, True, True)
    error, cosine, slope = quality(held_out_gradient(dense().z.repeat(4, 1)))  # Jacobian-free, at the exact optimum
    assert (error > 3, cosine < 0.8, slope > 3) == (True, True, True)


@pytest.mark.slow
def test_shine_by_memory() -> None:
    errors = [quality(dataclasses.replace(SOLVER, atol=1e-6, memory=memory))[0] for memory in (5, 20, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.slow
def test_outer_awareness() -> None:
    """Probes along the gradient of the held-out loss correct the hypergradient."""
    solver = dataclasses.replace(SOLVER, atol=1e-6)
    vanilla = quality(solver)
    for every in (1, 5):
        aware = quality(dataclasses.replace(solver, outer_every=every, outer_loss=lambda z, _: held_out_loss(z)))
        assert (aware[0] < 0.5 * vanilla[0], aware[1] > vanilla[1], aware[2] < 0.5 * vanilla[2]) == (True,) * 3
        assert aware[2] < 0.02


# --- the curvature guard -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "max_trials", "guard", "some_refused"),
    [
        (0.5, 20, 0.0, False),  # a search that ends by the Wolfe conditions has s . y > 0
        (0.5, 1, 0.0, True),  # one that is cut short need not
        (0.5, 1, 0.3, True),
        (1.0, 20, 0.3, True),
    ],
)
def test_least_curvature(start: float, max_trials: int, guard: float, some_refused: bool) -> None:
    """Pairs below it are not learned. Nonlinear least squares of the same data are not convex."""

    def squares(z: Tensor) -> Tensor:
        return 0.5 * torch.sigmoid(-z @ signed()[0].T).square().sum(1) + 0.5 * math.exp(-2) * z.square().sum(1)

    solver = recorded(eq.LBFGS)(max_steps=80, memory=80, rtol=0, atol=1e-3, min_curvature=guard, max_trials=max_trials)
    z0 = torch.full((1, SIZE), start)
    solution = solver.solve(DescentMap(squares, z0, params=()), z0).raise_for_status()
    steps = [(seen.before, seen.after) for seen in solver.log]
    pairs = [(new.base - old.base, old.residual - new.residual) for old, new in steps]
    pairs = [(s[0], y[0]) for s, y in pairs if bool(s.any())]
    kept = [(s, y) for s, y in pairs if float(cosine_similarity(s, y, dim=0)) > guard]
    assert (len(kept) < len(pairs)) == some_refused
    assert solution.inverse.rank.tolist() == [2 * len(kept)]
    inverse = solution.inverse.dense()[0]
    torch.testing.assert_close(inverse, dense_bfgs(kept, True), rtol=0, atol=1e-9 * float(inverse.norm()))
    assert bool((torch.linalg.eigvalsh(inverse) > 0).all())
