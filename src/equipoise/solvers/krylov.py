"""Krylov methods for affine maps, such as adjoint systems: conjugate gradients and GMRES."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.map import Point
from equipoise.solvers.base import Solver

REACH = 1e4  # largest residual of a probe, in units of the first one; a solve is called divergent far beyond


@dataclasses.dataclass(eq=False)
class _ConjugateMemory:
    w: Tensor  # (b, D) iterate
    r: Tensor  # (b, D) its residual, by recurrence
    s: Tensor | None  # (b, D) its residual times the preconditioner, by recurrence; None: r
    p: Tensor  # (b, D) direction of the product under way, or of the last one where the iterate is evaluated
    rho: Tensor  # (b,) r.s when p was chosen
    scale: Tensor  # (b,) the point under way is w + scale p; 0: the iterate itself
    steepest: Tensor  # (b,) the next direction is not to be conjugate to the last
    since: Tensor  # (b,) products since the iterate itself was evaluated
    bend: Tensor  # (b,) largest curvature p.Ap / p.p met
    first: Tensor  # (b,) norm of the first residual
    absorbed: int = 0  # points absorbed


@dataclasses.dataclass(frozen=True, kw_only=True)
class CG(Solver):
    r"""Conjugate gradients, for affine maps $f(w) = (I - A) w + b$ with a symmetric positive definite $A$.

    $$ w_{k+1} = w_k + \alpha_k p_k, \quad r_{k+1} = r_k - \alpha_k A p_k, \quad
       \alpha_k = \frac{p_k^\top r_k}{p_k^\top A p_k}, \quad
       p_{k+1} = M r_{k+1} + \frac{r_{k+1}^\top M r_{k+1}}{r_k^\top M r_k}\, p_k $$

    with the preconditioner $M$ of `solve`, which must be symmetric positive definite, too; the identity if there is
    none. An evaluation at $w + t p$ gives $A p = (r(w) - r(w + t p)) / t$, with $t$ such that nothing is lost to
    rounding, however short $p$.

    The iterate itself is evaluated when the recurrence has met the tolerance, after `refresh` products, and last. Its
    residual replaces that of the recurrence, and samples are judged by it: no sample of a map that is not affine is
    called converged unless it is. Where $p^\top A p \le 0$, $A$ is not positive definite: the iterate is evaluated and
    the recurrence begins anew with the gradient, so such a sample ends as MAX_STEPS or STALLED, with the best point.

    Args:
        refresh: largest number of products between two evaluations of the iterate. `patience` must be larger: only
            these evaluations are better points.

    Raises:
        ValueError: a field is out of its range.

    Example:
        >>> import torch, equipoise as eq
        >>> A = torch.tensor([[0.5, 0.2], [0.2, 3.0]])
        >>> solution = eq.fixed_point(lambda w: w - w @ A + 1, torch.zeros(1, 2), solver=eq.CG(rtol=1e-5))
        >>> solution.converged.item(), solution.num_evals
        (True, 4)

    Source: Hestenes and Stiefel (1952); residual replacement: van der Vorst and Ye (2000).
    """

    refresh: int = 50

    supports_projection: ClassVar[bool] = False  # products are read off the points that it named

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh < 1:
            raise ValueError(f"CG(refresh={self.refresh!r}): must be >= 1")

    def init(self, point: Point) -> _ConjugateMemory:
        zero = point.r.new_zeros(point.r.shape[0], dtype=torch.float64)
        return _ConjugateMemory(
            w=point.z,
            r=point.residual,
            s=None if point.bare is None else point.r,
            p=torch.zeros_like(point.r),
            rho=zero,
            scale=zero,
            steepest=torch.ones_like(zero, dtype=torch.bool),
            since=torch.zeros_like(zero, dtype=torch.int64),
            bend=zero,
            first=_norm(point.residual),
        )

    def propose(self, memory: _ConjugateMemory, point: Point) -> Tensor:
        memory.absorbed += 1
        evaluated = memory.scale == 0
        broken = self._absorb(memory, point, evaluated)
        r, s = memory.r, memory.r if memory.s is None else memory.s
        image = memory.w + r
        done = broken | self.measure(r, image, point.blocks)[2]
        last = memory.absorbed == self.max_steps - 1
        look = ~evaluated & (done | (memory.since >= self.refresh) | last)
        # Where the iterate is looked at, the next direction waits for its true residual.
        rho = _dot(r, s)
        memory.steepest = torch.where(look, done, memory.steepest | ~(memory.rho > 0))
        conjugate = torch.where(memory.steepest, 0.0, rho / memory.rho)
        direction = torch.addcmul(s, conjugate.nan_to_num(nan=0.0).to(s.dtype)[:, None], memory.p)
        memory.p = torch.where(look[:, None], memory.p, direction)
        memory.rho = torch.where(look, memory.rho, rho)
        memory.scale = torch.where(look, 0.0, self._scale(memory, _norm(image) + _norm(r), last))
        memory.steepest = memory.steepest & look
        return torch.addcmul(memory.w, memory.scale.to(r.dtype)[:, None], memory.p)

    @staticmethod
    def _absorb(memory: _ConjugateMemory, point: Point, evaluated: Tensor) -> Tensor:
        """Step along the direction whose product was evaluated, or take the iterate's residual; the rows, `(b,)`, in
        which the product shows that `A` is not positive definite."""
        slope = _dot(memory.p, memory.r)
        scale = torch.where(evaluated, 1.0, memory.scale)
        curvature = (slope - _dot(memory.p, point.residual)) / scale
        broken = ~evaluated & ~(curvature > 0)
        step = torch.where(evaluated | broken, 0.0, slope / curvature)
        # r - step Ap, with Ap = (r - r(w + scale p)) / scale
        part = torch.where(evaluated, 1.0, step / scale).to(point.r.dtype)[:, None]
        memory.w = torch.addcmul(memory.w, step.to(part.dtype)[:, None], memory.p)
        memory.r = torch.lerp(memory.r, point.residual, part)
        if memory.s is not None:
            memory.s = torch.lerp(memory.s, point.r, part)
        memory.since = torch.where(evaluated, 0, memory.since + 1)
        bend = torch.where(evaluated, 0.0, curvature / _dot(memory.p, memory.p)).nan_to_num(nan=0.0)
        memory.bend = torch.maximum(memory.bend, bend)
        return broken

    @staticmethod
    def _scale(memory: _ConjugateMemory, size: Tensor, last: bool) -> Tensor:
        """How far along `p` to evaluate: as far as the iterate, of the `size` of its numbers, is from zero, for what
        is rounded there is then small against the product."""
        if last:
            return torch.ones_like(size)  # a step, and not a probe: nothing comes after it
        reach = torch.minimum(size, REACH * memory.first / memory.bend.clamp_min(1))
        scale = torch.exp2(torch.ceil(torch.log2(reach / _norm(memory.p))))  # a power of two scales without rounding
        return scale.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row, in float64: `(b, D), (b, D) -> (b,)`."""
    return torch.linalg.vecdot(x, y).to(torch.float64)


def _norm(x: Tensor) -> Tensor:
    """Of each row, in float64: `(b, D) -> (b,)`."""
    return torch.linalg.vector_norm(x, dim=1).to(torch.float64)
