"""Problems whose solution and Jacobian are known: what solvers and gradients are tested on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import equipoise as eq

VANILLA = eq.Shine(fallback_ratio=math.inf)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A map with its start, its named inputs and, sample by sample, its answer.

    Args:
        f: called as `f(z, *inputs)`.
        z0: start; its structure is that of the state.
        inputs: one row per sample.
        expected: the fixed point, same structure as `z0`.
    """

    f: Callable[..., Any]
    z0: Any
    inputs: tuple[Tensor, ...]
    expected: Any

    def solve(self, solver: eq.Solver) -> eq.Solution[Any]:
        return eq.fixed_point(self.f, self.z0, *self.inputs, solver=solver, params=())


def spectral(d: int, norm: float, generator: torch.Generator) -> Tensor:
    """A matrix of the given spectral norm, `(d, d)`."""
    a = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return a * (norm / torch.linalg.matrix_norm(a, 2))


def tanh_map(d: int, norm: float) -> Callable[[Tensor], Tensor]:
    """`z -> tanh(W z + b)`, the spectral norm of W given."""
    weight, b = spectral(d, norm, torch.Generator().manual_seed(5)), torch.linspace(-1, 1, d)
    return lambda z: torch.tanh(z @ weight.T + b)


def jacobian(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Of one sample, `(d, d)`."""
    return torch.autograd.functional.jacobian(lambda z: f(z[None])[0], z)


class Seen(NamedTuple):
    """What a recorded solver absorbed: a point, the inverse and the memory after it, and the memory before."""

    point: eq.Point
    inverse: eq.InverseEstimate
    before: Any
    after: Any

    @property
    def dense(self) -> Tensor:
        """The inverse of the first row."""
        return self.inverse.dense()[0]


@functools.cache
def recorded(kind: type[eq.Solver]) -> type[eq.Solver]:
    """The same solver, which notes each point that it absorbs."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Recorded(kind):  # type: ignore[valid-type, misc]
        log: list[Seen] = dataclasses.field(default_factory=list)

        def propose(self, memory: Any, point: eq.Point) -> Tensor:
            before = copy.copy(memory)
            proposal = super().propose(memory, point)
            part = self.inverse(memory, torch.full((len(point.z),), memory.absorbed))
            # The vectors are views of a buffer that goes on changing.
            inverse = eq.InverseEstimate.of(part.gamma, part.basis.clone(), part.core.clone())
            self.log.append(Seen(point, inverse, before, copy.copy(memory)))
            return proposal

    return Recorded


def follow(solver: eq.SteadyState, field: Callable[[Tensor], Tensor], z: Tensor, points: int) -> list[Any]:
    """The states of an integration of `field` after each of its points; the loop's statuses are left out."""
    rows, memory, states, f = torch.arange(len(z)), None, [], eq.FunctionMap(lambda z: z + field(z), z)
    for _ in range(points):
        point = f.evaluate(z, rows, torch.ones_like(rows, dtype=torch.bool))
        memory = memory or solver.init(point)
        z = solver.propose(memory, point)
        states.append(dataclasses.replace(memory, slopes=memory.slopes.clone()))
    return states


def rosenbrock(z: Tensor) -> Tensor:
    return (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum(dim=1)


def quadratic(size: int, condition: float) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """An objective, its Hessian and its minimizer."""
    generator = torch.Generator().manual_seed(size)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    hessian = (q * torch.logspace(0, float(np.log10(condition)), size)) @ q.T
    b = torch.randn(size, generator=generator)
    return lambda z: 0.5 * ((z @ hessian) * z).sum(1) - z @ b, hessian, torch.linalg.solve(hessian, b)


def minimize(h: Callable[[Tensor], Tensor], z0: Tensor, **fields: Any) -> eq.Solution[Tensor]:
    solver = eq.LBFGS(**{"max_steps": 300, "rtol": 0, "atol": 1e-8, **fields})
    return solver.solve(eq.DescentMap(h, z0, params=()), z0, trace=True)


def dense_bfgs(pairs: list[tuple[Tensor, Tensor]], scaled: bool) -> Tensor:
    """The inverse of one sample from its pairs `(s, y)`, oldest first."""
    s, y = pairs[-1]
    h = torch.eye(len(s)) * (s @ y / (y @ y) if scaled else 1.0)
    for s, y in pairs:
        v = torch.eye(len(s)) - torch.outer(y, s) / (s @ y)
        h = v.T @ h @ v + torch.outer(s, s) / (s @ y)
    return h


class BreastCancer:
    """L2 logistic regression on a fifth of the data, features divided by their deviations; its Hessian is known.

    `sum_i log(1 + exp(-m_i . z)) + e^l |z|^2 / 2`
    """

    size = 30

    @functools.cached_property
    def margins(self) -> Tensor:
        from sklearn.datasets import load_breast_cancer
        from sklearn.model_selection import train_test_split

        x, y = load_breast_cancer(return_X_y=True)
        x, _, y, _ = train_test_split(x / x.std(0), 2.0 * y - 1, train_size=0.2, random_state=3)
        assert x.shape == (113, self.size)
        return torch.tensor(x * y[:, None])

    def loss(self, z: Tensor, log_lambda: Tensor) -> Tensor:
        return nn.functional.softplus(-z @ self.margins.T).sum(1) + 0.5 * log_lambda.exp() * z.square().sum(1)

    def gradient(self, z: Tensor, log_lambda: Tensor) -> Tensor:
        return log_lambda.exp()[:, None] * z - torch.sigmoid(-z @ self.margins.T) @ self.margins

    def hessian(self, z: Tensor, log_lambda: Tensor) -> Tensor:
        p = torch.sigmoid(-z @ self.margins.T)
        data = torch.einsum("bn,ni,nj->bij", p * (1 - p), self.margins, self.margins)
        return data + log_lambda.exp()[:, None, None] * torch.eye(self.size)

    def solve(self, z0: Tensor, log_lambda: Tensor, solver: eq.LBFGS) -> eq.Solution[Tensor]:
        return solver.solve(eq.DescentMap(self.loss, z0, (log_lambda,), params=()), z0, trace=True)


BREAST_CANCER = BreastCancer()


def along(v: Tensor) -> Callable[[Any, Tensor], Tensor]:
    """The outer loss whose gradient is `v`, row by row."""
    return lambda z, rows: (z * v[rows]).sum(1)


def conv_matrix(kernel: Tensor, size: tuple[int, int], stride: int = 1, padding: int = 0) -> Tensor:
    """The matrix of a zero-padded convolution of images of a size, `(outputs, inputs)`, from all unit images."""
    pixels = kernel.shape[1] * size[0] * size[1]
    images = torch.eye(pixels, dtype=kernel.dtype).view(pixels, kernel.shape[1], *size)
    return torch.nn.functional.conv2d(images, kernel, stride=stride, padding=padding).flatten(1).T


def affine(batch: int = 5, d: int = 6, norm: float = 0.7) -> Problem:
    """z -> A z + x, with z* = (I - A)^-1 x."""
    generator = torch.Generator().manual_seed(1)
    a = spectral(d, norm, generator)
    x = torch.randn(batch, d, generator=generator, dtype=torch.float64)
    return Problem(lambda z, x: z @ a.to(z.dtype).T + x, torch.zeros_like(x), (x,), inverted(a, x))


def product(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Row by row, `(b, m, n), (b, n) -> (b, m)`."""
    return torch.bmm(matrices, vectors[..., None])[..., 0]


def solve_linear(a: Tensor, x: Tensor, solver: eq.Solver, **options: Any) -> eq.Solution[Tensor]:
    """Solve `z = A z + x` from zero, `x` `(B, d)`."""
    return eq.fixed_point(lambda z, x: z @ a.T + x, torch.zeros_like(x), x, solver=solver, params=(), **options)


def inverted(a: Tensor, x: Tensor) -> Tensor:
    """`(I - A)^{-1} x`, row by row."""
    return torch.linalg.solve(torch.eye(len(a), dtype=a.dtype) - a, x.T).T


def gmres_iterates(a: Tensor, b: Tensor, w0: Tensor, products: int, m: Tensor | None = None) -> Tensor:
    """Iterates `(products + 1, B, d)` of GMRES for `A w = b` with a preconditioner on the right, by dense least squares
    over orthonormal bases of the Krylov spaces: `w_0 + M K y`, with the least `|r_0 - A M K y|`."""
    m = torch.eye(a.shape[1]).expand_as(a) if m is None else m
    r = b - product(a, w0)
    iterates, basis = [w0], (r / r.norm(dim=1, keepdim=True))[..., None]
    for _ in range(products):
        images = a @ m @ basis
        y = torch.linalg.lstsq(images, r[..., None]).solution
        iterates.append(w0 + (m @ basis @ y)[..., 0])
        basis = torch.linalg.qr(torch.cat([basis, images[..., -1:]], dim=2))[0]
    return torch.stack(iterates)


class TanhCell(nn.Module):
    """tanh(W z + U x + b), the spectral norm of W given."""

    def __init__(self, d: int = 6, norm: float = 0.8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.w = nn.Parameter(spectral(d, norm, generator))
        self.u = nn.Parameter(torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5)
        self.b = nn.Parameter(torch.randn(d, generator=generator, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + x @ self.u.T + self.b)


def two_scales(batch: int = 5) -> Problem:
    """A state of two tensors of different shape and scale, coupled linearly; a dict is solved by its values."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 1, generator=generator, dtype=torch.float64)
    # u = 0.5 v / 1000 + x and v = 300 u (broadcast to 2 x 3): u = 0.15 u + x.
    u = x / 0.85

    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = z
        return v.mean(dim=(1, 2))[:, None] * 5e-4 + x, (300 * u[:, :, None]).expand_as(v)

    return Problem(
        f, (torch.zeros_like(x), x.new_zeros(batch, 2, 3)), (x,), (u, (300 * u[:, :, None]).expand(-1, 2, 3))
    )


def rotation(batch: int = 3, radius: float = 1.2) -> Problem:
    """z -> R z + x, R a quarter turn times `radius`: Picard iteration leaves on a spiral."""
    turn = torch.tensor([[0.0, -radius], [radius, 0.0]], dtype=torch.float64)
    x = torch.linspace(1, 2, 2 * batch, dtype=torch.float64).reshape(batch, 2)
    return Problem(lambda z, x: z @ turn.to(z.dtype).T + x, torch.zeros_like(x), (x,), inverted(turn, x))


def scalar(batch: int = 4) -> Problem:
    """z -> c cos z, its solution by Newton's method."""
    c = torch.linspace(0.2, 1.2, batch, dtype=torch.float64)[:, None]
    z = torch.ones_like(c)
    for _ in range(50):
        z = z - (z - c * z.cos()) / (1 + c * z.sin())
    return Problem(lambda z, c: c * torch.cos(z), torch.zeros_like(c), (c,), z)


@dataclasses.dataclass(frozen=True)
class Toy:
    """`f(z) = tanh(W z + b)` or `W z + b`, one problem a row, and the loss `|z - t|^2 / 2`."""

    w: Tensor  # (B, d, d)
    b: Tensor  # (B, d)
    t: Tensor  # (B, d)
    linear: bool = False

    def f(self, z: Tensor, w: Tensor, b: Tensor) -> Tensor:
        u = product(w, z) + b
        return u if self.linear else torch.tanh(u)

    def loss(self, z: Tensor, rows: Tensor) -> Tensor:
        return (z - self.t[rows]).square().sum(1) / 2

    def solve(self, solver: eq.Solver, gradient: eq.Gradient = VANILLA) -> Answer:
        b = self.b.clone().requires_grad_()
        solution = eq.fixed_point(self.f, torch.zeros_like(b), self.w, b, solver=solver, gradient=gradient, params=())
        z = solution.value.detach()
        (grad,) = torch.autograd.grad(solution.value, b, z - self.t)
        slope = torch.ones_like(z) if self.linear else 1 - self.f(z, self.w, self.b) ** 2
        # df/db is the slope, so the adjoint vector that was used can be read off the gradient.
        return Answer(solution, z - self.t, grad / slope, slope[..., None] * self.w)


@dataclasses.dataclass(frozen=True)
class Answer:
    solution: eq.Solution[Tensor]
    g: Tensor  # (B, d) cotangent of z
    w: Tensor  # (B, d) adjoint vector that the gradient used
    jacobian: Tensor  # (B, d, d)

    @property
    def exact(self) -> Tensor:
        return torch.linalg.solve(torch.eye(self.g.shape[1]) - self.jacobian.mT, self.g)

    @property
    def inverse(self) -> eq.InverseEstimate:
        assert self.solution.inverse is not None
        return self.solution.inverse

    @property
    def error(self) -> Tensor:
        return (self.w - self.exact).norm(dim=1) / self.exact.norm(dim=1)

    @property
    def adjoint_residual(self) -> Tensor:
        return (product(self.jacobian.mT, self.w) + self.g - self.w).norm(dim=1)


@functools.cache
def toy(rho: float, linear: bool = False, d: int = 100, seeds: int = 20) -> Toy:
    rows = []
    for seed in range(seeds):
        state = np.random.RandomState(seed)
        w, b, t = state.randn(d, d), state.randn(d), state.randn(d)
        rows.append((w * (rho / np.linalg.norm(w, 2)), b, t))
    w, b, t = (torch.tensor(np.stack(column)) for column in zip(*rows, strict=True))
    return Toy(w, b, t, linear)


def broyden(tol: float = 0.0, steps: int = 200) -> eq.Broyden:
    return eq.Broyden(max_steps=steps, memory=max(steps, 1), rtol=0, atol=tol)


def median(x: Tensor) -> float:
    return float(np.median(x.numpy()))
