"""How often state and adjoint move between two steps of the input."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from equipoise.core.map import Counts


@dataclasses.dataclass(eq=False, slots=True)
class Linearization:
    """Cell and cost at a state and an input, with what their derivatives need.

    Attributes:
        z: `(b, n)` the state.
        x: `(b, p)` the input.
        image: `(b, n)` what the cell made of them.
        slopes: of the cost in state and input.
        counts: of evaluations of the cell and of products with its Jacobian.
        second: whether all of this is to be differentiated again.
    """

    z: Tensor
    x: Tensor
    image: Tensor
    slopes: tuple[Tensor, ...]
    counts: Counts
    second: bool

    def pull(self, mu: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
        r"""$J_z^\top \mu$ or $J_x^\top \mu$ or both, for `self.z` and `self.x`, in one pass."""
        self.counts.vjps += 1
        if not self.image.requires_grad:  # the cell ignores its arguments
            return tuple(torch.zeros_like(t) for t in wanted)
        return torch.autograd.grad(
            self.image, wanted, mu, create_graph=self.second, retain_graph=True, materialize_grads=True
        )


class Problem(Protocol):
    """What a schedule may ask."""

    def image(self, z: Tensor, x: Tensor) -> Tensor:
        """`f(z, x)`, `(b, n)`."""

    def at(self, z: Tensor, x: Tensor, *, second: bool) -> Linearization:
        """Cell and cost at a point; tracked to `z` and `x` if they are and the mode is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """One round of the three iterations; the input then steps along the slope that it returns."""

    stride: ClassVar[float] = 1.0  # a measured step, in units of one over the curvature

    @abc.abstractmethod
    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""State, adjoint and the slope $J_x^\top \mu + \nabla_x (c + r)$ after a round, differentiable.

        Args:
            problem: cell and cost of these rows.
            z: `(b, n)` state.
            mu: `(b, n)` adjoint.
            x: `(b, p)` input.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(Schedule):
    r"""All three at once, from the old values: one evaluation and one product a round.

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

    stride: ClassVar[float] = 0.5  # stable for shorter steps than gradient descent, as all values are old ones

    def __post_init__(self) -> None:
        for field in ("damping", "adjoint_damping"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"Joint({field}={getattr(self, field)!r}): must lie in (0, 1]")

    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = problem.at(z, x, second=torch.is_grad_enabled())
        product, slope = here.pull(mu, here.z, here.x)
        moved = torch.lerp(mu, product + here.slopes[0], self.adjoint_damping)
        return torch.lerp(z, _value(here), self.damping), moved, slope + here.slopes[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussSeidel(Schedule):
    r"""Each of the three sees what the one before it has become: one evaluation and two products a round.

    $$ z^+ = f(z, x), \qquad \mu^+ = J_z^\top \mu + \nabla_z c, \qquad
       x^+ = P(x - \alpha (J_x^\top \mu^+ + \nabla_x (c + r))) $$

    Derivatives are taken where the state was evaluated.
    """

    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = problem.at(z, x, second=torch.is_grad_enabled())
        (product,) = here.pull(mu, here.z)
        mu = product + here.slopes[0]
        (slope,) = here.pull(mu, here.x)
        return _value(here), mu, slope + here.slopes[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested(Schedule):
    r"""A few steps of the state at this input, as many of the adjoint, then one of the input.

    $$ z \leftarrow f(z, x) \;\; (k \text{ times}), \qquad
       \mu \leftarrow J_z^\top \mu + \nabla_z c \;\; (k \text{ times}), \qquad
       x \leftarrow P(x - \alpha (J_x^\top \mu + \nabla_x (c + r))) $$

    Derivatives are taken where the state was evaluated last. The last pass backward gives the last product of the
    adjoint and the slope of the input at once, so that slope is by the adjoint of $k - 1$ steps: one product fewer for
    about as many rounds. Warm-started and stopped early, this is the inexact form of solving for state and adjoint
    before each step of the input; with one step it would be `Joint()`.

    Args:
        steps: $k$: evaluations, and products, in a round.

    Raises:
        ValueError: fewer than two steps.
    """

    steps: int = 2

    stride: ClassVar[float] = 1.5  # serves best with Anderson acceleration, measured on four kinds of problems

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"Nested(steps={self.steps!r}): must be >= 2; with one step it is Joint()")

    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(self.steps - 1):
            z = problem.image(z, x)
        here = problem.at(z, x, second=torch.is_grad_enabled())
        for _ in range(self.steps - 1):
            (product,) = here.pull(mu, here.z)
            mu = product + here.slopes[0]
        product, slope = here.pull(mu, here.z, here.x)
        return _value(here), product + here.slopes[0], slope + here.slopes[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held(Schedule):
    """State and adjoint alone move, at an input that stays; what is differentiated is the state alone."""

    def advance(self, problem: Problem, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = problem.at(z, x, second=False)
        (product,) = here.pull(mu, here.z)
        image = here.image if torch.is_grad_enabled() else here.image.detach()
        return image, product + here.slopes[0], torch.zeros_like(x)


def _value(here: Linearization) -> Tensor:
    return here.image if here.second else here.image.detach()
