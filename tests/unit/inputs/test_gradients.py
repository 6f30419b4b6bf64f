"""Training gradients against central differences of the problem solved anew, and what the cheaper ones are."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from input_problems import Cell, Fit, fitting
from torch import Tensor, nn

import equipoise as eq
from equipoise.constraints import Box, Constraint, L2Ball, LInfBall
from equipoise.inputs import Envelope, FirstOrder, Joint, Nested

EXACT = eq.Implicit(solver=eq.GMRES(memory=60, max_steps=200, rtol=0.0, atol=1e-12))
TIGHT = eq.Anderson(memory=12, max_steps=400, rtol=1e-12)
CENTER = 0.1 * torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SETS: dict[str, Constraint | None] = {
    "free": None,
    "l2": L2Ball(radius=0.4, center=CENTER),
    "linf": LInfBall(radius=0.15, center=CENTER),
    "box": Box(lower=CENTER - 0.1, upper=CENTER + 0.3),
    "l2-in-range": L2Ball(radius=0.4, center=CENTER, lower=-0.2, upper=0.25),
}


@dataclasses.dataclass
class Setting:
    """Tensors on which an outer loss of the optimized input depends."""

    cell: Cell
    cost: Fit
    y: Tensor
    center: Tensor
    constraint: Constraint | None
    same: bool

    @property
    def tensors(self) -> list[Tensor]:
        return [self.cell.w, self.cell.u, self.cell.b, self.cost.c, self.y] + [self.center] * (
            self.constraint is not None
        )

    def loss(self, gradient: eq.Gradient = EXACT) -> Tensor:
        constraint = self.constraint
        if isinstance(constraint, Box) and "center" in constraint.tensors():
            constraint = constraint.on([self.center])
        elif constraint is not None:
            constraint = constraint.on([self.center - 0.1, self.center + 0.3])
        solution = eq.optimize_inputs(
            self.cell,
            z0=torch.zeros(3, 12),
            x0=torch.zeros(3, 4),
            cost=self.cost,
            targets=(self.y,),
            constraint=constraint,
            step_size=0.1,
            solver=TIGHT,
            gradient=gradient,
            equilibrium=None,
        ).raise_for_status()
        z, _, x = solution.value
        if self.same:
            return 2.5 * self.cost(z, x, self.y).sum()
        return (z - 0.3).square().sum() + (z.sum(1) * x.sum(1)).sum() + (self.y * z[:, :6]).sum()


def setting(constraint: Constraint | None, *, same: bool) -> Setting:
    problem = fitting(norm=0.6, rho=0.3)
    y = problem.y.clone().requires_grad_()
    return Setting(problem.cell, problem.cost, y, CENTER.clone().requires_grad_(), constraint, same)


def differences(
    loss: Callable[[], Tensor], tensors: Sequence[Tensor], step: float = 1e-5
) -> list[tuple[Tensor, float]]:
    """A direction for each tensor, and the central difference along it."""
    found = []
    for tensor in tensors:
        direction = torch.randn_like(tensor)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(direction, alpha=sign * step)
                values.append(float(loss()))
                tensor.sub_(direction, alpha=sign * step)
        found.append((direction, (values[0] - values[1]) / (2 * step)))
    return found


def agree(got: Sequence[Tensor], wanted: Sequence[tuple[Tensor, float]], rel: float = 1e-6) -> list[bool]:
    return [
        float((gradient * direction).sum()) == pytest.approx(slope, rel=rel, abs=rel)
        for gradient, (direction, slope) in zip(got, wanted, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_c5_the_exact_gradient_is_that_of_the_problem_solved_anew(name: str) -> None:
    problem = setting(SETS[name], same=False)
    got = torch.autograd.grad(problem.loss(), problem.tensors)
    wanted = differences(problem.loss, problem.tensors)
    assert all(agree(got, wanted))
    first = torch.autograd.grad(problem.loss(FirstOrder()), problem.tensors, allow_unused=True)
    held = [torch.zeros_like(t) if g is None else g for g, t in zip(first, problem.tensors, strict=True)]
    assert not all(agree(held, wanted, rel=1e-2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["free", "l2", "box"])
def test_c5_the_envelope_is_exact_for_the_inner_cost(name: str) -> None:
    problem = setting(SETS[name], same=True)
    trained = problem.tensors[:5]
    got = torch.autograd.grad(problem.loss(Envelope()), trained)
    assert all(agree(got, differences(problem.loss, trained)))
    exact = torch.autograd.grad(problem.loss(), trained)
    torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-8)
    held = torch.autograd.grad(problem.loss(FirstOrder(solver=EXACT.solver)), trained)
    torch.testing.assert_close(held, got, rtol=1e-8, atol=1e-8)  # the same by another way: no step of x matters


def test_an_envelope_of_another_loss_warns_and_says_how_far_off_it_is() -> None:
    problem = setting(None, same=False)
    with pytest.warns(
        RuntimeWarning, match=r"the outer loss is not the inner cost for 3 of 3 samples \(cosine -?0\.\d\d"
    ):
        problem.loss(Envelope()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setting(None, same=True).loss(Envelope()).backward()


@pytest.mark.parametrize(
    "solver",
    [eq.GMRES(memory=60, max_steps=200, rtol=0.0, atol=1e-12), eq.Anderson(memory=20, max_steps=400, rtol=1e-12)],
)
def test_c5_scalar_oracle(solver: eq.Solver) -> None:
    w = torch.tensor(0.5, requires_grad=True)

    def loss(gradient: eq.Gradient) -> Tensor:
        z, _, _ = eq.optimize_inputs(
            lambda z, x: w * z + x,
            z0=torch.zeros(1, 1),
            x0=torch.zeros(1, 1),
            cost=lambda z, x: 0.5 * (z - 3).square().sum(1),
            regularizer=lambda x: 0.25 * x.square().sum(1),
            solver=TIGHT,
            gradient=gradient,
            params=(w,),
        ).value
        return 0.5 * (z - 1).square().sum()

    (full,) = torch.autograd.grad(loss(eq.Implicit(solver=solver)), w)
    assert float(full) == pytest.approx(1.975309, rel=1e-6)
    (first,) = torch.autograd.grad(loss(FirstOrder()), w)
    assert float(first) == pytest.approx(8.888889, rel=1e-6)


def test_the_default_gradient_reaches_its_tolerance() -> None:
    problem = fitting(n=40, p=8)
    reports: list[eq.Solution] = []
    default = eq.optimize_inputs.__kwdefaults__["gradient"]
    solution = eq.optimize_inputs(
        problem.cell,
        **problem.arguments,
        solver=TIGHT,
        gradient=dataclasses.replace(default, observe=reports.append),
    )
    solution.value[0].square().sum().backward()
    assert bool(reports[0].converged.all())
    assert int(reports[0].num_steps.max()) <= 130


def test_a_closure_has_the_gradients_of_all_that_it_depends_on() -> None:
    problem = fitting(norm=0.6)
    head = nn.Linear(12, 6)

    def loss(*, declared: bool) -> Tensor:
        z, _, x = (
            eq.optimize_inputs(
                problem.cell,
                z0=torch.zeros(3, 12),
                x0=torch.zeros(3, 4),
                cost=lambda z, x, y: (head(z) - y).square().sum(1) + 0.3 * x.square().sum(1),
                targets=(problem.y,),
                step_size=0.1,
                solver=TIGHT,
                gradient=EXACT,
                params=[*problem.cell.parameters(), *head.parameters()] if declared else None,
            )
            .raise_for_status()
            .value
        )
        return (z * z).sum() + x.sum()

    tensors = [problem.cell.w, head.weight, head.bias]
    got = torch.autograd.grad(loss(declared=False), tensors)
    torch.testing.assert_close(got, torch.autograd.grad(loss(declared=True), tensors), rtol=1e-7, atol=1e-7)
    assert float(got[1].abs().max()) > 1e-3


def test_the_exact_gradient_is_differentiable_again() -> None:
    problem = fitting(n=4, p=2, rows=1, norm=0.5, rho=0.5)

    def outer(y: Tensor) -> Tensor:
        z, _, x = eq.optimize_inputs(
            problem.cell,
            **problem.arguments | {"targets": (y,)},
            step_size=0.3,
            solver=TIGHT,
            gradient=EXACT,
            equilibrium=None,
        ).value
        return torch.cat([z, x], dim=1).square().sum()

    y = problem.y.clone().requires_grad_()
    assert torch.autograd.gradcheck(outer, y)
    assert torch.autograd.gradgradcheck(outer, y)


@pytest.mark.parametrize("gradient", [Envelope(), FirstOrder()])
def test_these_gradients_belong_to_optimized_inputs(gradient: eq.Gradient) -> None:
    cell = nn.Linear(2, 2)
    z = eq.fixed_point(lambda z: 0.1 * cell(z), torch.zeros(1, 2), gradient=gradient, solver=eq.Picard()).value
    with pytest.raises(ValueError, match=r"Envelope and FirstOrder are gradients of optimize_inputs; elsewhere take I"):
        z.sum().backward()


def test_schedules_have_one_gradient() -> None:
    problem = setting(None, same=False)
    reference = torch.autograd.grad(problem.loss(), problem.tensors)
    solution = eq.optimize_inputs(
        problem.cell,
        z0=torch.zeros(3, 12),
        x0=torch.zeros(3, 4),
        cost=problem.cost,
        targets=(problem.y,),
        step_size=0.1,
        solver=TIGHT,
        gradient=EXACT,
        schedule=Nested(steps=3),
    )
    z, _, x = solution.value
    loss = (z - 0.3).square().sum() + (z.sum(1) * x.sum(1)).sum() + (problem.y * z[:, :6]).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, problem.tensors), reference, rtol=1e-7, atol=1e-7)
    assert Joint() == Joint()
