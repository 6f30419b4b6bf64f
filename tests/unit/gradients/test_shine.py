"""SHINE: its identities, its fallback, and what an outer loss sees and teaches."""

import dataclasses
import math

import pytest
import torch
from problems import VANILLA, broyden, product, spectral, toy
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.core.linalg import InverseEstimate
from equipoise.fixed_point import solve_map


@pytest.mark.parametrize("rho", [0.9, 3.0])
def test_transposed_inverse(rho: float) -> None:
    answer = toy(rho, d=20, seeds=6).solve(broyden(1e-6))
    torch.testing.assert_close(answer.w, product(answer.inverse.dense().mT, answer.g), rtol=1e-10, atol=1e-10)
    wrong = product(answer.inverse.dense(), answer.g)
    assert bool(((answer.w - wrong).norm(dim=1) > 1e-2 * answer.w.norm(dim=1)).all())


def test_without_updates() -> None:
    """It is Jacobian-free: after one evaluation, or where the start is the solution, tanh(W 0) = 0."""
    problem = toy(0.9, d=20, seeds=6)
    for posed, solver in ((problem, broyden(steps=1)), (dataclasses.replace(problem, b=0 * problem.b), broyden(1e-6))):
        shine, free = (posed.solve(solver, gradient) for gradient in (VANILLA, eq.JacobianFree()))
        assert bool((shine.inverse.rank == 0).all())
        assert torch.equal(shine.w, free.w)
    with pytest.raises(ValueError, match=r"^Shine needs .* kept none; use Broyden or LBFGS with max_steps >= 1$"):
        problem.solve(broyden(steps=0))


def test_exact() -> None:
    """For affine scalar maps, and where L-BFGS has learned all of a quadratic: exact searches would make it so."""
    answer = toy(0.9, linear=True, d=1, seeds=8).solve(broyden(1e-12))
    assert bool((answer.inverse.rank >= 1).all())
    torch.testing.assert_close(answer.w, answer.exact, rtol=1e-10, atol=0)
    hessian = spectral(5, 1.0, torch.Generator().manual_seed(0))
    hessian = hessian @ hessian.T + 0.5 * torch.eye(5)
    x, g = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    f = DescentMap(lambda z, x: 0.5 * ((z @ hessian) * z).sum(1) - (z * x).sum(1), torch.zeros(3, 5), (x,), params=())
    solver = eq.LBFGS(max_steps=60, memory=60, rtol=0, atol=1e-10, wolfe=0.01)
    solution = solve_map(f, torch.zeros(3, 5), solver=solver, gradient=VANILLA)
    (grad,) = torch.autograd.grad(solution.value, x, g)
    torch.testing.assert_close(grad, product(solution.inverse.dense().mT, g))
    assert float(cosine_similarity(grad, torch.linalg.solve(hessian, g.T).T).min()) > 0.999


# --- fallback --------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_norm_guard() -> None:
    """It acts sample by sample and reports; refinement starts anew where the estimate fell back."""
    problem, solver = toy(3.0, d=60), broyden(1e-4)
    masks: list[Tensor] = []
    guard = eq.Shine(fallback_ratio=1.3, observe=masks.append)
    vanilla, free, guarded = (problem.solve(solver, gradient) for gradient in (VANILLA, eq.JacobianFree(), guard))
    too_long = vanilla.w.norm(dim=1) > 1.3 * vanilla.g.norm(dim=1)
    assert 0 < int(too_long.sum()) < 20
    assert torch.equal(masks[0], too_long)
    assert torch.equal(guarded.w, torch.where(too_long[:, None], free.w, vanilla.w))
    assert torch.equal(problem.solve(solver, eq.Shine(fallback_ratio=0.0)).w, free.w)
    refined, shine, anew = (
        problem.solve(solver, eq.Implicit(solver=broyden(steps=4), start=start)).w
        for start in (guard, VANILLA, eq.JacobianFree())
    )
    torch.testing.assert_close(refined, torch.where(too_long[:, None], anew, shine), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("length", "fallen"), [(1.3, False), (1.3 * (1 + 1e-12), True), (math.nan, True), (0.0, False)]
)
def test_boundary(length: float, fallen: bool) -> None:
    """Up to the ratio, and where it is finite, the estimate is taken; the ratio infinity admits any that is finite."""
    gamma = torch.tensor([length, math.inf])
    estimate = InverseEstimate.of(gamma, torch.zeros(2, 0, 4), torch.zeros(2, 0, 0))
    solution = eq.Solution(torch.zeros(2, 4), *[torch.zeros(2)] * 3, 0, 0, estimate)
    masks: list[Tensor] = []
    g = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    for ratio, expected in ((1.3, fallen), (math.inf, math.isnan(length))):
        w = eq.Shine(fallback_ratio=ratio, observe=masks.append).cotangent(None, g, solution)
        assert masks[-1].tolist() == [expected, True]
        assert torch.equal(w, torch.stack([g[0] if expected else length * g[0], g[1]]))


# --- outer losses ----------------------------------------------------------------------------------------------------


def test_products() -> None:
    """Forward, and of the backward pass beside the one with inputs and parameters, which every method needs."""

    def spent(solver: eq.Solver, gradient: eq.Gradient) -> tuple[int, int]:
        problem = toy(3.0, d=40, seeds=4)
        solution = problem.solve(solver, gradient).solution
        return solution.num_vjps, solution.map.counts.vjps - solution.num_vjps

    plain, adjoint = eq.Broyden(max_steps=18, rtol=0), eq.AdjointBroyden(max_steps=18, memory=30, rtol=0)
    aware = dataclasses.replace(adjoint, outer_every=5, outer_loss=lambda z, rows: z.square().sum(1))
    assert spent(plain, eq.JacobianFree()) == spent(plain, VANILLA) == (0, 0)
    assert spent(adjoint, VANILLA) == (17, 0)
    assert spent(aware, VANILLA) == (17 + 3, 0)
    for k in (1, 5):
        refine = eq.Implicit(solver=eq.Broyden(max_steps=k + 1, rtol=0), start=VANILLA)
        assert spent(aware, refine) == (20, k + 1)
    with pytest.warns(eq.ConvergenceWarning, match="did not converge for 4 of 4 samples"):
        assert spent(plain, eq.Implicit(solver=eq.Broyden(max_steps=21, rtol=1e-12)))[1] <= 21


def test_structure_and_rows() -> None:
    """Rows leave at different steps; the loss gets the numbers of those left, and the state as the map does."""
    gain, x = torch.linspace(0.02, 0.95, 8)[:, None], torch.randn(8, 3)
    seen: list[list[int]] = []

    def f(z: dict[str, Tensor], gain: Tensor, x: Tensor) -> dict[str, Tensor]:
        u = torch.tanh(gain * z["v"].sum(2) + x)
        return {"u": u, "v": gain[..., None] * torch.sin(z["u"][..., None] + z["v"].flip(1))}

    def outer(z: dict[str, Tensor], rows: Tensor) -> Tensor:
        assert (z["u"].shape, z["v"].shape) == ((len(rows), 3), (len(rows), 3, 2))
        seen.append(rows.tolist())
        return (z["u"] - x[rows]).square().sum(1) + z["v"].prod(2).sum(1)

    z0 = {"u": torch.zeros(8, 3), "v": torch.zeros(8, 3, 2)}
    solver = eq.AdjointBroyden(max_steps=40, memory=80, rtol=1e-8, outer_every=2, outer_loss=outer)
    solution = eq.fixed_point(f, z0, gain, x, solver=solver, params=()).raise_for_status()
    assert seen[0] == list(range(8))
    assert set(seen[-1]) < set(range(8))
    flat = solution.map.pack(solution.value).requires_grad_()
    (g,) = torch.autograd.grad(outer(solution.map.unpack(flat), torch.arange(8)).sum(), flat)
    fz = solution.map.call(flat)
    slope = torch.stack([torch.autograd.grad(fz[:, i].sum(), flat, retain_graph=True)[0] for i in range(9)], dim=1)
    exact = torch.linalg.solve(torch.eye(9) - slope.mT, g)
    assert float(cosine_similarity(solution.inverse.rmv(g), exact).min()) > 0.9999


def test_autocast() -> None:
    """The loss is evaluated in the state of the map."""
    head, seen = nn.Linear(4, 2).float(), []

    def outer(z: Tensor, rows: Tensor) -> Tensor:
        logits = head(z)
        seen.append(logits.dtype)
        return logits.float().square().sum(1)

    solver = eq.AdjointBroyden(max_steps=4, rtol=0, outer_every=1, outer_loss=outer)
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            z0 = torch.zeros(3, 4, dtype=torch.float32)
            solution = eq.fixed_point(nn.Linear(4, 4).float(), z0, solver=solver, gradient=VANILLA)
        assert solution.value.dtype == torch.float32
        assert seen == [dtype] * 3


def test_frozen_modules() -> None:
    """Those of the loss neither learn nor draw, and samples do not see each other."""
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    head[0].running_mean.copy_(torch.randn(6))
    labels, x, cell = torch.tensor([0, 2, 1, 1]), torch.randn(4, 6), nn.Linear(6, 6)

    def inverse(rows: Tensor) -> Tensor:
        def outer(z: Tensor, chosen: Tensor) -> Tensor:
            with eq.nn.frozen(head):
                return nn.functional.cross_entropy(head(z), labels[rows][chosen], reduction="none")

        solver, f = eq.AdjointBroyden(max_steps=5, rtol=0, outer_every=2, outer_loss=outer), cell.forward
        z0 = torch.zeros(len(rows), 6)
        solution = eq.fixed_point(lambda z, x: torch.tanh(f(z) + x), z0, x[rows], solver=solver, params=())
        return solution.inverse.dense()

    before, state = {k: v.clone() for k, v in head.state_dict().items()}, torch.get_rng_state()
    together = inverse(torch.arange(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    assert all(p.grad is None for p in head.parameters())
    assert head.training
    alone = torch.cat([inverse(torch.tensor([row])) for row in range(4)])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-8)
