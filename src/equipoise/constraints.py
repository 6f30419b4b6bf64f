"""Constraints on optimized inputs: convex sets with a projection, and penalties with a proximal operator."""

import abc
import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from equipoise.core.linalg import can_branch_on


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Constraint(abc.ABC):
    """A closed convex set of inputs `(B, ...)`; a subclass defines the projection onto it.

    Tensor fields broadcast to the shape of the inputs, so each sample may have its own set. They receive gradients.
    """

    @abc.abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Return the nearest point of the set, `(B, ...) -> (B, ...)`, differentiable."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor fields by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def on(self, tensors: Sequence[Tensor]) -> Self:
        """Return the set with other values of its tensor fields, such as those of some rows."""
        chosen = copy.copy(self)
        for name, value in zip(self.tensors(), tensors, strict=True):
            object.__setattr__(chosen, name, value)  # `replace` would validate, and so read, them again
        return chosen


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Box(Constraint):
    r"""$l \le x \le u$ for every number.

    Args:
        lower: $l$.
        upper: $u$.

    Raises:
        ValueError: a lower bound exceeds the upper one.

    Example:
        >>> import torch
        >>> from equipoise.constraints import Box
        >>> Box(lower=0.0, upper=1.0).project(torch.tensor([[-1.0, 0.5, 2.0]]))
        tensor([[0.0000, 0.5000, 1.0000]])
    """

    lower: float | Tensor = -math.inf
    upper: float | Tensor = math.inf

    def __post_init__(self) -> None:
        if bool(torch.as_tensor(self.lower > self.upper).any()):
            raise ValueError(f"{type(self).__name__}: a lower bound exceeds the upper one; swap them")

    def project(self, x: Tensor) -> Tensor:
        if isinstance(self.lower, Tensor) or isinstance(self.upper, Tensor):
            return torch.minimum(torch.maximum(x, _like(self.lower, x)), _like(self.upper, x))
        return x.clamp(self.lower, self.upper)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Ball(Box):
    """Intersection of a box and a ball around a point of it."""

    radius: float
    center: float | Tensor = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if isinstance(self.radius, Tensor) or not 0 <= self.radius < math.inf:
            raise ValueError(f"{name}(radius={self.radius!r}): must be a finite number >= 0")
        if bool(torch.as_tensor((self.center < self.lower) | (self.center > self.upper)).any()):
            raise ValueError(f"{name}: center must lie between lower and upper; clamp it")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LInfBall(_Ball):
    r"""$|x_i - c_i| \le \varepsilon$ and $l \le x_i \le u$ for every number.

    Args:
        radius: $\varepsilon$.
        center: $c$, within the range.
        lower: $l$, the smallest value of valid data.
        upper: $u$, the largest value of valid data.

    Raises:
        ValueError: the radius is negative, a lower bound exceeds the upper one, or the center is not between them.

    Example:
        >>> import torch
        >>> from equipoise.constraints import LInfBall
        >>> LInfBall(radius=0.25, center=torch.tensor([[0.5, 1.0]]), lower=0.0, upper=1.0).project(torch.ones(1, 2))
        tensor([[0.7500, 1.0000]])
    """

    def project(self, x: Tensor) -> Tensor:
        center = _like(self.center, x)
        upper, lower = center + self.radius, center - self.radius
        # A bound that was rounded away from the center moves one number towards it, back into the ball.
        upper = upper + torch.where(upper - center > self.radius, _ulp(upper), 0.0)
        lower = lower - torch.where(center - lower > self.radius, _ulp(-lower), 0.0)
        return super().project(torch.minimum(torch.maximum(x, lower), upper))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class L2Ball(_Ball):
    r"""$\|x - c\|_2 \le \varepsilon$ for every sample, and $l \le x_i \le u$ for every number.

    With $d = x - c$ the nearest point is $\operatorname{clip}(c + \sqrt{s}\, d, l, u)$ for the largest $s \le 1$ for
    which it lies in the ball. Its squared distance from $c$ is $\sum_i \min(s\, d_i^2, w_i^2)$, where $w_i$ is the
    distance from $c_i$ to the bound in the direction of $d_i$. That is piecewise linear in $s$, with a knot where a
    number reaches its bound; sorting the knots gives the root and the clipped numbers.

    Args:
        radius: $\varepsilon$.
        center: $c$, within the range.
        lower: $l$, the smallest value of valid data.
        upper: $u$, the largest value of valid data.

    Raises:
        ValueError: the radius is negative, a lower bound exceeds the upper one, or the center is not between them.

    Example:
        >>> import torch
        >>> from equipoise.constraints import L2Ball
        >>> L2Ball(radius=1.0).project(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def project(self, x: Tensor) -> Tensor:
        center, rows = _like(self.center, x), (-1, *(1,) * (x.ndim - 1))
        near = super().project(x)
        inside = (near - center).square().flatten(1).sum(1) <= self.radius**2
        # Sorting is slow, and iterates are often projected twice. On a device this test would block the host.
        if can_branch_on(x) and bool(inside.all()):
            return near
        offset = x - center
        length, room = offset.square().flatten(1), self._room(offset, center).flatten(1)
        # The rounding of the sum with the center must not leave the ball.
        eps = torch.finfo(x.dtype).eps
        slack = eps * (2 * self.radius + torch.linalg.vector_norm(center.detach().expand_as(x).flatten(1), dim=1))
        square = (self.radius - slack).clamp_min(0).square()
        clipped = self._clipped(length.detach(), room.detach(), square)
        left = (square - torch.where(clipped, room, 0.0).sum(1)).clamp_min(0)
        free = torch.where(clipped, 0.0, length).sum(1)
        moved = ~inside & (left > 0) & (free > 0)  # the square root has no derivative at 0, where the set is a point
        share = torch.where(moved, (torch.where(moved, left, 1.0) / torch.where(moved, free, 1.0)).sqrt(), 0.0)
        point = super().project(center + share.view(rows) * offset)
        return torch.where(inside.view(rows), near, point)

    def _room(self, offset: Tensor, center: Tensor) -> Tensor:
        """Return each number's squared distance from the center to the bound in its direction, like `offset`."""
        ahead = torch.where(offset > 0, _like(self.upper, offset) - center, _like(self.lower, offset) - center)
        # Without the inner `where` the gradient of an absent bound is infinity times zero.
        return torch.where(ahead.isfinite(), torch.where(ahead.isfinite(), ahead, 0.0).square(), torch.inf)

    def _clipped(self, length: Tensor, room: Tensor, square: Tensor) -> Tensor:
        """Return the mask of numbers at their bound when the squared distance from the center is `square`, `(B, p)`."""
        if (
            not isinstance(self.lower, Tensor)
            and not isinstance(self.upper, Tensor)
            and self.upper - self.lower == math.inf
        ):
            return torch.zeros_like(length, dtype=torch.bool)
        reached = torch.where(length > 0, room / length, torch.inf)  # the s at which a number reaches its bound
        reached, order = reached.sort(dim=1)
        length = length.gather(1, order)
        free = (length.sum(1, keepdim=True) - length.cumsum(1)).clamp_min(0)
        distance = room.gather(1, order).cumsum(1) + torch.where(free > 0, reached * free, 0.0)
        full = (distance <= square[:, None]) & reached.isfinite()
        return torch.zeros_like(full).scatter(1, order, full)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proximal:
    r"""A penalty $r(x)$ minimized by its proximal operator instead of its gradient.

    $$ \operatorname{prox}_{\alpha r}(y) = \arg\min_x \; r(x) + \tfrac{1}{2 \alpha} \|x - y\|^2 $$

    Args:
        operator: called as `operator(y, step)`, with `y` of shape `(B, ...)` and a step $\alpha$ that broadcasts to it.
        penalty: $r$, `(B, ...) -> (B,)`.

    Example:
        >>> import torch
        >>> from equipoise.constraints import Proximal
        >>> sparse = Proximal(
        ...     operator=lambda y, step: y.sign() * (y.abs() - 0.1 * step).clamp_min(0),
        ...     penalty=lambda x: 0.1 * x.abs().flatten(1).sum(1),
        ... )
    """

    operator: Callable[[Tensor, Tensor], Tensor]
    penalty: Callable[[Tensor], Tensor]


def _like(bound: float | Tensor, x: Tensor) -> Tensor:
    """Return a bound in the dtype and on the device of the inputs."""
    return torch.as_tensor(bound, dtype=x.dtype, device=x.device)


def _ulp(x: Tensor) -> Tensor:
    """Return the negative distance from `x` to the next smaller number."""
    x = x.detach()
    return torch.nextafter(x, torch.full_like(x, -torch.inf)) - x
