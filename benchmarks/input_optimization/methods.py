"""Ways to optimize an input, each from zero state and adjoint, that count their work."""

import abc
import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

import equipoise as eq
from benchmarks.input_optimization.models import Problem
from equipoise.inputs import InputOptimizer, Nested, UpdateScheme

DEFAULT = eq.Anderson(memory=10, max_steps=100, rtol=1e-4, ridge=1e-2)  # that of `optimize_inputs`


@dataclasses.dataclass
class Work:
    """An input, and what was done until then: evaluations of the layer, products with its Jacobian."""

    x: Tensor
    evals: int = 0
    vjps: int = 0

    @property
    def units(self) -> int:
        """A product takes about as long as two evaluations."""
        return self.evals + 2 * self.vjps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A way to optimize inputs; `step` is its one free number, which is tuned."""

    step: float = 0.1

    @abc.abstractmethod
    def run(self, problem: Problem, rounds: int) -> Work:
        """So many updates of the input from the start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ours(Method):
    """`optimize_inputs`; without a step, it is measured."""

    solver: eq.solvers.Solver = DEFAULT
    scheme: UpdateScheme = Nested()
    measured: bool = False

    @torch.no_grad()
    def run(self, problem: Problem, rounds: int) -> Work:
        solution = eq.optimize_inputs(
            problem.cell,
            z0=problem.z0,
            x0=problem.x0,
            inputs=problem.inputs,
            targets=problem.targets,
            cost=problem.cost,
            constraint=problem.constraint,
            optimizer=InputOptimizer(
                solver=dataclasses.replace(self.solver, max_steps=rounds, rtol=0.0),
                scheme=self.scheme,
                step_size=None if self.measured else self.step,
                verify_solver=None,
            ),
        )
        return Work(solution.value[2], solution.num_evals, solution.num_vjps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Step of the input along a gradient: `gd`, `adam`, or `pgd` with gradients scaled to length one."""

    name: str

    def begin(self, x: Tensor, step: float) -> torch.optim.Optimizer:
        return torch.optim.Adam([x], lr=step) if self.name == "adam" else torch.optim.SGD([x], lr=step)

    def move(self, optimizer: torch.optim.Optimizer, problem: Problem, x: Tensor, slope: Tensor) -> None:
        if self.name == "pgd":
            slope = slope / (torch.linalg.vector_norm(slope, dim=1, keepdim=True) + 1e-8)
        x.grad = slope
        optimizer.step()
        if problem.radius is not None:
            x.copy_(problem.project(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(Method):
    """Gradient steps, each after state and adjoint were solved for in some way."""

    rule: Rule

    def run(self, problem: Problem, rounds: int) -> Work:
        *_, work = itertools.islice(self.path(problem), rounds)
        return work

    @torch.no_grad()
    def path(self, problem: Problem) -> Iterator[Work]:
        """The work after each update, without end; one object, whose input is written again."""
        x = problem.x0.clone()
        work, optimizer = Work(x), self.rule.begin(x, self.step)
        z, mu = problem.z0, torch.zeros_like(problem.z0)
        while True:
            z, mu, slope = self.slope(problem, work, z, mu, x)
            self.rule.move(optimizer, problem, x, slope)
            yield work

    @abc.abstractmethod
    def slope(self, problem: Problem, work: Work, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """State, adjoint and the slope of the cost, by way of those before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cold(Loop):
    """State and adjoint anew at each update, from zero and from the slope of the cost.

    Without a tolerance as in the paper: so many Broyden steps forward and backward. Else by Anderson acceleration.
    """

    steps: int = 18
    rtol: float = 0.0

    def slope(self, problem: Problem, work: Work, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        solver: eq.solvers.Solver = eq.Broyden(max_steps=self.steps, memory=self.steps, rtol=0.0)
        if self.rtol > 0:
            solver = eq.Anderson(max_steps=100, rtol=self.rtol)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gradient = eq.Implicit(solver=solver)
            found = eq.fixed_point(problem.cell, problem.z0, leaf, *problem.inputs, solver=solver, gradient=gradient)
            cost = problem.cost(found.value, leaf, *problem.targets).sum()
            (slope,) = torch.autograd.grad(cost, leaf)
        work.evals += found.map.counts.evals
        work.vjps += found.map.counts.vjps
        return z, mu, slope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warm(Loop):
    """State and adjoint go on from the update before: so many plain steps, or plain steps to a tolerance.

    With `merged` the last pass backward gives the last product of the adjoint and the slope at once, as in `Nested`;
    with one step all three move by one evaluation and one product: the plain joint iteration.
    """

    steps: int = 1
    rtol: float = 0.0
    merged: bool = False

    def slope(self, problem: Problem, work: Work, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = (x, *problem.inputs)
        limit = self.steps if self.rtol == 0 else 500
        for _ in range(limit - 1):
            before, z = z, problem.cell(z, *at)
            work.evals += 1
            if self._met(z, before):
                break
        z, leaf = z.detach().requires_grad_(), x.detach().requires_grad_()
        with torch.enable_grad():
            image = problem.cell(z, leaf, *problem.inputs)
            cost = problem.cost(z, leaf, *problem.targets).sum()
            pulls = torch.autograd.grad(cost, (z, leaf), materialize_grads=True)
        work.evals += 1
        for _ in range(limit - self.merged):
            before, mu = mu, torch.autograd.grad(image, z, mu, retain_graph=True)[0] + pulls[0]
            work.vjps += 1
            if self._met(mu, before):
                break
        work.vjps += 1
        if self.merged:
            products = torch.autograd.grad(image, (z, leaf), mu)
            return image.detach(), products[0] + pulls[0], products[1] + pulls[1]
        return image.detach(), mu, torch.autograd.grad(image, leaf, mu)[0] + pulls[1]

    def _met(self, new: Tensor, old: Tensor) -> bool:
        if self.rtol == 0:
            return False
        change, size = (torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (new - old, new))
        return bool((change <= self.rtol * size).all())
