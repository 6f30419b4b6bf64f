"""How often state and adjoint move between two steps of the input."""

from __future__ import annotations

import abc
import dataclasses
from typing import Protocol

import torch
from torch import Tensor


class Lagrangian(Protocol):
    r"""$\Lambda(z, x, \mu) = c(z, x) + r(x) + \mu^\top (f(z, x) - z)$, its parts on flat rows."""

    def image(self, z: Tensor, x: Tensor) -> Tensor:
        """`f(z, x)`, `(b, n)`."""

    def cost(self, z: Tensor, x: Tensor) -> Tensor:
        """`c(z, x) + r(x)`, `(b,)`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """One round of the three iterations, from which the input steps along the slope that it returns."""

    @property
    @abc.abstractmethod
    def num_evals(self) -> int:
        """Evaluations of the cell in a round."""

    @property
    @abc.abstractmethod
    def num_vjps(self) -> int:
        """Vector-Jacobian products in a round."""

    @abc.abstractmethod
    def advance(self, problem: Lagrangian, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""State, adjoint and the slope $J_x^\top \mu + \nabla_x (c + r)$ after a round, differentiable.

        Args:
            problem: cell and cost of these rows.
            z: `(b, n)` state.
            mu: `(b, n)` adjoint.
            x: `(b, p)` input.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(Schedule):
    r"""All three at once, from the old values: one evaluation and one reverse pass a round.

    $$ z^+ = z + \tau_z (f(z, x) - z), \qquad \mu^+ = \mu + \tau_\mu (J_z^\top \mu + \nabla_z c - \mu), \qquad
       x^+ = P(x - \alpha (J_x^\top \mu + \nabla_x (c + r))) $$

    Args:
        damping: $\tau_z$.
        adjoint_damping: $\tau_\mu$. Neither changes the fixed point.

    Raises:
        ValueError: a field is out of (0, 1].

    Source: Gurumurthy, Bai, Manchester and Kolter (2021); damping as in the released code, which has 0.8 and 0.6.
    """

    damping: float = 1.0
    adjoint_damping: float = 1.0

    def __post_init__(self) -> None:
        for field in ("damping", "adjoint_damping"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"Joint({field}={getattr(self, field)!r}): must lie in (0, 1]")

    @property
    def num_evals(self) -> int:
        return 1

    @property
    def num_vjps(self) -> int:
        return 1

    def advance(self, problem: Lagrangian, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with _tracked(z, x) as (leaf, free, higher):
            image = problem.image(leaf, free)
            total = (image * mu).sum() + problem.cost(leaf, free).sum()
            gz, gx = torch.autograd.grad(total, (leaf, free), create_graph=higher, materialize_grads=True)
        image = image if higher else image.detach()
        return torch.lerp(z, image, self.damping), torch.lerp(mu, gz, self.adjoint_damping), gx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested(Schedule):
    r"""A few steps of the state at this input, as many of the adjoint at that state, then one of the input.

    Warm-started and stopped early, this is the inexact form of solving state and adjoint for every step of the input.
    With `steps=1` the iteration is that of Gauss and Seidel: the input sees the new adjoint.

    Args:
        steps: evaluations, and products with $J_z^\top$, in a round; one more product is for the input.

    Raises:
        ValueError: fewer than one step.
    """

    steps: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Nested(steps={self.steps!r}): must be >= 1")

    @property
    def num_evals(self) -> int:
        return self.steps

    @property
    def num_vjps(self) -> int:
        return self.steps + 1

    def advance(self, problem: Lagrangian, z: Tensor, mu: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(self.steps - 1):
            z = problem.image(z, x)
        with _tracked(z, x) as (leaf, free, higher):
            image, cost = problem.image(leaf, free), problem.cost(leaf, free).sum()
            (slope,) = torch.autograd.grad(cost, leaf, create_graph=higher, retain_graph=True, materialize_grads=True)
            for _ in range(self.steps):
                (product,) = torch.autograd.grad(
                    image, leaf, mu, create_graph=higher, retain_graph=True, materialize_grads=True
                )
                mu = product + slope
            total = (image * mu.detach() if not higher else image * mu).sum() + cost
            (gx,) = torch.autograd.grad(total, free, create_graph=higher, materialize_grads=True)
        return image if higher else image.detach(), mu, gx


class _tracked:
    """Within: gradients on, `z` and `x` as leaves or as the caller's tracked tensors, and whether graphs are kept."""

    def __init__(self, z: Tensor, x: Tensor) -> None:
        self.higher = torch.is_grad_enabled()
        self.tensors = z, x
        self.mode = torch.enable_grad()

    def __enter__(self) -> tuple[Tensor, Tensor, bool]:
        self.mode.__enter__()
        z, x = (t if self.higher and t.requires_grad else t.detach().requires_grad_() for t in self.tensors)
        return z, x, self.higher

    def __exit__(self, *error: object) -> None:
        self.mode.__exit__(*error)
