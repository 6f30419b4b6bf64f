"""Update schemes: the number and order of the steps of state, adjoint and input in one round."""

import abc
import dataclasses
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.map import Counts


@dataclasses.dataclass(eq=False, slots=True)
class Linearization:
    """Values and derivatives of cell and cost at a state and an input.

    Attributes:
        z: `(b, n)` state.
        x: `(b, p)` input.
        fz: `(b, n)` value of the cell.
        cost_gradients: gradients of the cost in state and input.
        counts: evaluations of the cell and products with its Jacobian.
        create_graph: whether the products can be differentiated again.
    """

    z: Tensor
    x: Tensor
    fz: Tensor
    cost_gradients: tuple[Tensor, Tensor]
    counts: Counts
    create_graph: bool

    def vjp(self, mu: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
        r"""Return $J_z^\top \mu$, $J_x^\top \mu$ or both, for `self.z` and `self.x`, in one backward pass."""
        self.counts.vjps += 1
        if not self.fz.requires_grad:  # the cell ignores its arguments
            return tuple(torch.zeros_like(t) for t in wanted)
        return torch.autograd.grad(
            self.fz, wanted, mu, create_graph=self.create_graph, retain_graph=True, materialize_grads=True
        )

    @property
    def value(self) -> Tensor:
        """The value of the cell, tracked if it can be differentiated again."""
        return self.fz if self.create_graph else self.fz.detach()


class Problem(Protocol):
    """Cell and cost, as an update scheme uses them."""

    def evaluate(self, z: Tensor, x: Tensor) -> Tensor:
        """Return `f(z, x)`, `(b, n)`."""

    def linearize(self, z: Tensor, x: Tensor, *, create_graph: bool) -> Linearization:
        """Evaluate cell and cost with a graph to `z` and `x`, which stay tracked if they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateScheme(abc.ABC):
    """One round of state and adjoint; the input then takes a step against the gradient that the round returns."""

    step_factor: ClassVar[float] = 1.0  # measured step times the curvature

    @abc.abstractmethod
    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return state, adjoint and the gradient $J_x^\top \mu + \nabla_x (c + r)$ after a round, differentiable.

        Args:
            problem: cell and cost of these rows.
            z: `(b, n)` state.
            mu: `(b, n)` adjoint.
            x: `(b, p)` input.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(UpdateScheme):
    r"""Simultaneous steps from the old values: one evaluation and one product a round.

    $$ z^+ = z + \tau_z (f(z, x) - z), \qquad \mu^+ = \mu + \tau_\mu (J_z^\top \mu + \nabla_z c - \mu), \qquad
       x^+ = P(x - \alpha (J_x^\top \mu + \nabla_x (c + r))) $$

    Args:
        damping: $\tau_z$.
        adjoint_damping: $\tau_\mu$. Neither changes the fixed point.

    Raises:
        ValueError: a field is out of (0, 1].

    Source: Gurumurthy, Bai, Manchester and Kolter (2021); the released code damps by 0.8 and 0.6.
    """

    damping: float = 1.0
    adjoint_damping: float = 1.0

    step_factor: ClassVar[float] = 0.5  # old values are stable for shorter steps than those of gradient descent

    def __post_init__(self) -> None:
        check_ranges(self, "Joint.", damping="> 0 and <= 1", adjoint_damping="> 0 and <= 1")

    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = problem.linearize(z, x, create_graph=torch.is_grad_enabled())
        product, gradient = here.vjp(mu, here.z, here.x)
        adjoint = torch.lerp(mu, product + here.cost_gradients[0], self.adjoint_damping)
        return torch.lerp(z, here.value, self.damping), adjoint, gradient + here.cost_gradients[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussSeidel(UpdateScheme):
    r"""Successive steps, each from the newest values: one evaluation and two products a round.

    $$ z^+ = f(z, x), \qquad \mu^+ = J_z^\top \mu + \nabla_z c, \qquad
       x^+ = P(x - \alpha (J_x^\top \mu^+ + \nabla_x (c + r))) $$

    All derivatives are taken at $z$.
    """

    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = problem.linearize(z, x, create_graph=torch.is_grad_enabled())
        (product,) = here.vjp(mu, here.z)
        mu = product + here.cost_gradients[0]
        (gradient,) = here.vjp(mu, here.x)
        return here.value, mu, gradient + here.cost_gradients[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested(UpdateScheme):
    r"""A few steps of the state, as many of the adjoint, then one of the input.

    $$ z \leftarrow f(z, x) \;\; (k \text{ times}), \qquad
       \mu \leftarrow J_z^\top \mu + \nabla_z c \;\; (k \text{ times}), \qquad
       x \leftarrow P(x - \alpha (J_x^\top \mu + \nabla_x (c + r))) $$

    Derivatives are taken at the last evaluation of the state. The last backward pass returns the last product of the
    adjoint and the gradient of the input together, so that gradient uses the adjoint of $k - 1$ steps: one product less
    for about as many rounds. With warm starts and few steps this is the inexact form of solving for state and adjoint
    before each step of the input; with $k = 1$ it would be `Joint()`.

    Args:
        steps: $k$, the number of evaluations, and of products, in a round.

    Raises:
        ValueError: `steps` is below two.
    """

    steps: int = 2

    step_factor: ClassVar[float] = 1.5  # best with Anderson acceleration, measured on four kinds of problems

    def __post_init__(self) -> None:
        check_ranges(self, "Nested.", steps=">= 2; with one step it is Joint()")

    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(self.steps - 1):
            z = problem.evaluate(z, x)
        here = problem.linearize(z, x, create_graph=torch.is_grad_enabled())
        for _ in range(self.steps - 1):
            (product,) = here.vjp(mu, here.z)
            mu = product + here.cost_gradients[0]
        product, gradient = here.vjp(mu, here.z, here.x)
        return here.value, product + here.cost_gradients[0], gradient + here.cost_gradients[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedInput(UpdateScheme):
    """One step of state and adjoint at a fixed input; only the state is differentiable."""

    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = problem.linearize(z, x, create_graph=False)
        (product,) = here.vjp(mu, here.z)
        fz = here.fz if torch.is_grad_enabled() else here.fz.detach()
        return fz, product + here.cost_gradients[0], torch.zeros_like(x)
