"""Gradients of optimized inputs: against central differences of the problem solved anew, and the cheaper ones."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from input_problems import fitting, optimize
from torch import Tensor, nn

import equipoise as eq
from equipoise.constraints import Box, Constraint, L2Ball, LInfBall
from equipoise.inputs import Envelope, FirstOrder, GaussSeidel, InputOptimizer, Joint, Nested, UpdateScheme

EXACT = eq.Implicit(solver=eq.GMRES(memory=60, max_steps=200, rtol=0.0, atol=1e-12))
TIGHT = eq.Anderson(memory=12, max_steps=400, rtol=1e-12)
CENTER = 0.1 * torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SETS: dict[str, Callable[[Tensor], Constraint | None]] = {
    "free": lambda center: None,
    "l2": lambda center: L2Ball(radius=0.4, center=center),
    "linf": lambda center: LInfBall(radius=0.15, center=center),
    "box": lambda center: Box(lower=center - 0.1, upper=center + 0.3),
    "l2-in-range": lambda center: L2Ball(radius=0.4, center=center, lower=-0.2, upper=0.25),
}


def setting(name: str = "free", *, same: bool = False) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """An outer loss of optimized inputs, a multiple of their cost if `same`, and the tensors that it depends on."""
    problem = fitting(norm=0.6, rho=0.3)
    cell, cost, y, center = problem.cell, problem.cost, problem.y.requires_grad_(), CENTER.clone().requires_grad_()

    def loss(gradient: eq.Gradient = EXACT, scheme: UpdateScheme = Nested()) -> Tensor:
        method = {"scheme": scheme, "step_size": 0.1, "solver": TIGHT, "gradient": gradient, "verify_solver": None}
        z, _, x = problem.solve(constraint=SETS[name](center), **method).raise_for_status().value
        if same:
            return 2.5 * cost(z, x, y).sum()
        return (z - 0.3).square().sum() + (z.sum(1) * x.sum(1)).sum() + (y * z[:, :6]).sum()

    return loss, [cell.w, cell.u, cell.b, cost.c, y, *([] if name == "free" else [center])]


@torch.no_grad()
def agrees(loss: Callable[[], Tensor], tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
    """Compare gradients with central differences along one direction of all tensors together."""
    directions, values = [torch.randn_like(tensor) for tensor in tensors], []
    for shift in (1e-5, -2e-5):
        torch._foreach_add_(list(tensors), directions, alpha=shift)
        values.append(float(loss()))
    torch._foreach_add_(list(tensors), directions, alpha=1e-5)
    found = sum(float((g * v).sum()) for g, v in zip(gradients, directions, strict=True))
    return found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.thorough
def test_c5_exact_gradient(name: str) -> None:
    loss, tensors = setting(name)
    exact = torch.autograd.grad(loss(), tensors)
    assert agrees(loss, tensors, exact)
    first = torch.autograd.grad(loss(FirstOrder()), tensors, materialize_grads=True, allow_unused=True)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(first, exact, strict=True)) > 1e-2


@pytest.mark.parametrize("name", ["free", "l2", "box"])
@pytest.mark.thorough
def test_c5_envelope_of_the_cost(name: str) -> None:
    loss, tensors = setting(name, same=True)
    trained = tensors[:5]
    found = torch.autograd.grad(loss(Envelope()), trained)
    assert agrees(loss, trained, found)
    for gradient in (EXACT, FirstOrder(solver=EXACT.solver)):  # at an optimum no step of the input matters
        torch.testing.assert_close(torch.autograd.grad(loss(gradient), trained), found, rtol=1e-8, atol=1e-8)


def test_envelope_of_another_loss_warns() -> None:
    message = r"the outer loss is not the inner cost for 3 of 3 samples \(cosine -?0\.\d\d"
    with pytest.warns(RuntimeWarning, match=message):
        setting()[0](Envelope()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setting(same=True)[0](Envelope()).backward()


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        (eq.Implicit(solver=eq.GMRES(memory=60, max_steps=200, rtol=0.0, atol=1e-12)), 1.975309),
        (eq.Implicit(solver=eq.Anderson(memory=20, max_steps=400, rtol=1e-12)), 1.975309),
        (FirstOrder(), 8.888889),
    ],
)
def test_c5_scalar(gradient: eq.Gradient, expected: float) -> None:
    w = torch.tensor(0.5, requires_grad=True)
    z, _, _ = optimize(
        lambda z, x: w * z + x,
        z0=torch.zeros(1, 1),
        x0=torch.zeros(1, 1),
        cost=lambda z, x: 0.5 * (z - 3).square().sum(1),
        regularizer=lambda x: 0.25 * x.square().sum(1),
        solver=TIGHT,
        gradient=gradient,
        params=(w,),
    ).value
    (found,) = torch.autograd.grad(0.5 * (z - 1).square().sum(), w)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_default_gradient_reaches_its_tolerance() -> None:
    reports: list[eq.Solution] = []
    gradient = dataclasses.replace(InputOptimizer().gradient, observe=reports.append)
    fitting(n=40, p=8).solve(solver=TIGHT, gradient=gradient).value[0].square().sum().backward()
    assert bool(reports[0].converged.all())
    assert int(reports[0].num_steps.max()) <= 130


def test_closure() -> None:
    problem, head = fitting(norm=0.6), nn.Linear(12, 6)
    tensors = [problem.cell.w, head.weight, head.bias]

    def gradients(params: list[Tensor] | None) -> tuple[Tensor, ...]:
        solution = problem.solve(
            cost=lambda z, x, y: (head(z) - y).square().sum(1) + 0.3 * x.square().sum(1),
            step_size=0.1,
            solver=TIGHT,
            gradient=EXACT,
            params=params,
        ).raise_for_status()
        return torch.autograd.grad((solution.value[0] ** 2).sum() + solution.value[2].sum(), tensors)

    found = gradients(None)
    declared = gradients([*problem.cell.parameters(), *head.parameters()])
    torch.testing.assert_close(found, declared, rtol=1e-7, atol=1e-7)
    assert float(found[1].abs().max()) > 1e-3


@pytest.mark.thorough
def test_second_derivatives() -> None:
    problem = fitting(n=4, p=2, rows=1, norm=0.5, rho=0.5)

    def outer(y: Tensor) -> Tensor:
        found = problem.solve(targets=(y,), step_size=0.3, solver=TIGHT, gradient=EXACT, verify_solver=None)
        return torch.cat([found.value[0], found.value[2]], dim=1).square().sum()

    y = problem.y.clone().requires_grad_()
    assert torch.autograd.gradcheck(outer, y, fast_mode=True)
    assert torch.autograd.gradgradcheck(outer, y, fast_mode=True)


@pytest.mark.parametrize("gradient", [Envelope(), FirstOrder()])
def test_gradients_of_inputs_alone(gradient: eq.Gradient) -> None:
    cell = nn.Linear(2, 2)
    z = eq.fixed_point(lambda z: 0.1 * cell(z), torch.zeros(1, 2), gradient=gradient, solver=eq.Picard()).value
    with pytest.raises(ValueError, match=r"Envelope and FirstOrder are gradients of optimize_inputs; elsewhere take I"):
        z.sum().backward()


@pytest.mark.parametrize("scheme", [Joint(damping=0.8), GaussSeidel(), Nested(steps=3)], ids=str)
@pytest.mark.thorough
def test_one_gradient_for_all_schemes(scheme: UpdateScheme) -> None:
    loss, tensors = setting()
    found, reference = (torch.autograd.grad(loss(scheme=chosen), tensors) for chosen in (scheme, Nested()))
    torch.testing.assert_close(found, reference, rtol=1e-7, atol=1e-7)
