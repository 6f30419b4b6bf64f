"""Sets that optimized inputs stay in, and penalties on them that have a proximal operator."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

HALVINGS = 60  # of the multiplier's interval; the root is then exact to rounding


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Constraint(abc.ABC):
    """A closed convex set of inputs `(B, ...)`.

    Fields that are tensors follow the rows, `(B, ...)` or broadcast to it: each sample has a set of its own. Gradients
    reach them.
    """

    @abc.abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set, `(B, ...) -> (B, ...)`, differentiable."""

    @abc.abstractmethod
    def violation(self, x: Tensor) -> Tensor:
        """How far outside `x` is, `(B,)`; zero within the set."""

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


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
        _check_range(self, self.lower, self.upper)

    def project(self, x: Tensor) -> Tensor:
        return _clamp(x, self.lower, self.upper)

    def violation(self, x: Tensor) -> Tensor:
        return _outside(x, self.lower, self.upper)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LInfBall(Constraint):
    r"""$|x_i - c_i| \le \varepsilon$ and $l \le x_i \le u$ for every number.

    Args:
        radius: $\varepsilon$.
        center: $c$, within the range.
        lower: $l$, least value that the data may have.
        upper: $u$, largest value.

    Raises:
        ValueError: the radius is negative, or a lower bound exceeds the upper one.
    """

    radius: float
    center: float | Tensor = 0.0
    lower: float | Tensor = -math.inf
    upper: float | Tensor = math.inf

    def __post_init__(self) -> None:
        _check_radius(self, self.radius)
        _check_range(self, self.lower, self.upper)

    def project(self, x: Tensor) -> Tensor:
        return _clamp(_clamp(x, self.center - self.radius, self.center + self.radius), self.lower, self.upper)

    def violation(self, x: Tensor) -> Tensor:
        near = _outside(x, self.center - self.radius, self.center + self.radius)
        return torch.maximum(near, _outside(x, self.lower, self.upper))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class L2Ball(Constraint):
    r"""$\|x - c\|_2 \le \varepsilon$ for every sample, and $l \le x_i \le u$ for every number.

    Without a range the projection is a scaling. With one, it is
    $x_i = \operatorname{clip}((y_i + \nu c_i) / (1 + \nu), l, u)$ with the least $\nu \ge 0$ for which this lies in the
    ball; the distance from $c$ decreases in $\nu$, which is found by bisection and differentiated implicitly.

    Args:
        radius: $\varepsilon$.
        center: $c$, within the range.
        lower: $l$, least value that the data may have.
        upper: $u$, largest value.

    Raises:
        ValueError: the radius is negative, or a lower bound exceeds the upper one.

    Example:
        >>> import torch
        >>> from equipoise.constraints import L2Ball
        >>> L2Ball(radius=1.0).project(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    radius: float
    center: float | Tensor = 0.0
    lower: float | Tensor = -math.inf
    upper: float | Tensor = math.inf

    def __post_init__(self) -> None:
        _check_radius(self, self.radius)
        _check_range(self, self.lower, self.upper)

    def project(self, x: Tensor) -> Tensor:
        if not self._has_range:
            offset = x - self.center
            norm = _norms(offset)
            scale = torch.where(norm > self.radius, self.radius / norm.clamp_min(torch.finfo(x.dtype).tiny), 1.0)
            return torch.where(norm > self.radius, self.center + offset * scale, x)
        multiplier = self._multiplier(x)
        return self._point(x, multiplier)

    def violation(self, x: Tensor) -> Tensor:
        far = (_norms(x - self.center).flatten() - self.radius).clamp_min(0)
        return torch.maximum(far, _outside(x, self.lower, self.upper))

    @property
    def _has_range(self) -> bool:
        unbounded = not isinstance(self.lower, Tensor) and self.lower == -math.inf
        return not (unbounded and not isinstance(self.upper, Tensor) and self.upper == math.inf)

    def _point(self, y: Tensor, multiplier: Tensor) -> Tensor:
        return _clamp((y + multiplier * self.center) / (1 + multiplier), self.lower, self.upper)

    def _excess(self, y: Tensor, multiplier: Tensor) -> Tensor:
        return _norms(self._point(y, multiplier) - self.center) - self.radius

    def _multiplier(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            inside = self._excess(y, torch.zeros_like(_norms(y))) <= 0
            low = torch.zeros_like(_norms(y))
            # Within the ball at the latest where the whole offset is that small.
            high = (_norms(y - self.center) / max(self.radius, torch.finfo(y.dtype).tiny)).clamp_min(1.0)
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                outside = self._excess(y, middle) > 0
                low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
            root = torch.where(inside, 0.0, high)
        tracked = y.requires_grad or any(t.requires_grad for t in self.tensors().values())
        if not (torch.is_grad_enabled() and tracked):
            return root
        # One step of Newton's method with a constant slope has the derivatives of the root.
        with torch.enable_grad():
            leaf = root.detach().requires_grad_()
            held = dataclasses.replace(self, **{name: t.detach() for name, t in self.tensors().items()})
            (slope,) = torch.autograd.grad(held._excess(y.detach(), leaf).sum(), leaf)
        correction = self._excess(y, root) / torch.where(slope < 0, slope, -torch.inf)
        return root - torch.where(inside, 0.0, correction - correction.detach())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Proximal:
    r"""A penalty $r(x)$ that is followed by its proximal operator instead of its gradient.

    $$ \operatorname{prox}_{\alpha r}(y) = \arg\min_x \; r(x) + \tfrac{1}{2 \alpha} \|x - y\|^2 $$

    Args:
        operator: called as `operator(y, step)` with `y` `(B, ...)` and the step $\alpha$, which broadcasts to it.
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


def _check_radius(constraint: Constraint, radius: float) -> None:
    if isinstance(radius, Tensor) or not 0 <= radius < math.inf:
        raise ValueError(f"{type(constraint).__name__}(radius={radius!r}): must be a number >= 0")


def _check_range(constraint: Constraint, lower: float | Tensor, upper: float | Tensor) -> None:
    if bool(torch.as_tensor(lower > upper).any()):
        raise ValueError(f"{type(constraint).__name__}: a lower bound exceeds the upper one; exchange them")


def _clamp(x: Tensor, lower: float | Tensor, upper: float | Tensor) -> Tensor:
    lower, upper = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (lower, upper))
    return torch.minimum(torch.maximum(x, lower), upper)


def _outside(x: Tensor, lower: float | Tensor, upper: float | Tensor) -> Tensor:
    return torch.maximum(lower - x, x - upper).clamp_min(0).flatten(1).amax(1)


def _norms(x: Tensor) -> Tensor:
    """Norm of each sample, `(B, 1, ..., 1)`."""
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norm.view(-1, *(1,) * (x.ndim - 1))
