"""Conjugate gradients for affine maps, such as symmetric adjoint systems."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import dots, norms
from equipoise.core.map import Point
from equipoise.solvers.base import Solver
from equipoise.solvers.probes import probe_scale


@dataclasses.dataclass(eq=False)
class _Memory:
    w: Tensor  # (b, D) iterate
    r: Tensor  # (b, D) its residual, by recurrence
    s: Tensor | None  # (b, D) its residual times the preconditioner, by recurrence; None: r
    p: Tensor  # (b, D) direction of the current product, or of the last one where the iterate is evaluated
    rho: Tensor  # (b,) r.s when p was chosen
    scale: Tensor  # (b,) the point to evaluate is w + scale p; 0: the iterate itself
    restart: Tensor  # (b,) mask of rows whose next direction is the residual, not conjugate to the last direction
    products: Tensor  # (b,) number since the iterate itself was evaluated
    norm: Tensor  # (b,) largest curvature p.Ap / p.p so far
    first: Tensor  # (b,) norm of the first residual
    absorbed: int = 0  # points absorbed


@dataclasses.dataclass(frozen=True, kw_only=True)
class CG(Solver):
    r"""Conjugate gradients, for affine maps $f(w) = (I - A) w + b$ with a symmetric positive definite $A$.

    $$ w_{k+1} = w_k + \alpha_k p_k, \quad r_{k+1} = r_k - \alpha_k A p_k, \quad
       \alpha_k = \frac{p_k^\top r_k}{p_k^\top A p_k}, \quad
       p_{k+1} = M r_{k+1} + \frac{r_{k+1}^\top M r_{k+1}}{r_k^\top M r_k}\, p_k $$

    with the preconditioner $M$ of `solve`, which must be symmetric positive definite, too; the identity if there is
    none. An evaluation at $w + t p$ gives $A p = (r(w) - r(w + t p)) / t$; $t$ is chosen so that rounding is small,
    however short $p$ is.

    The iterate itself is evaluated when the recurrence has met the tolerance, after `refresh` products, and last. Its
    residual replaces that of the recurrence, and samples are judged by it, so a sample of a map that is not affine is
    called converged only if it is. If $p^\top A p \le 0$, $A$ is not positive definite: the iterate is evaluated and
    the recurrence restarts with the residual. Such a sample ends as MAX_STEPS or STALLED, with its best point.

    Args:
        refresh: largest number of products between two evaluations of the iterate. `patience` must be larger: only
            these evaluations are better points.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> import torch, equipoise as eq
        >>> A = torch.tensor([[0.5, 0.2], [0.2, 3.0]])
        >>> solution = eq.fixed_point(lambda w: w - w @ A + 1, torch.zeros(1, 2), solver=eq.CG(rtol=1e-5))
        >>> solution.converged.item(), solution.num_evals
        (True, 4)

    Source: Hestenes and Stiefel (1952); residual replacement: van der Vorst and Ye (2000).
    """

    refresh: int = 50

    supports_projection: ClassVar[bool] = False  # products are read from the points that it proposed

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, refresh=">= 1")

    def init(self, point: Point) -> _Memory:
        zero = point.residual.new_zeros(point.residual.shape[0], dtype=torch.float64)
        return _Memory(
            w=point.z,
            r=point.true_residual,
            s=None if point.unpreconditioned is None else point.residual,
            p=torch.zeros_like(point.residual),
            rho=zero,
            scale=zero,
            restart=torch.ones_like(zero, dtype=torch.bool),
            products=torch.zeros_like(zero, dtype=torch.int64),
            norm=zero,
            first=norms(point.true_residual),
        )

    def propose(self, memory: _Memory, point: Point) -> Tensor:
        memory.absorbed += 1
        evaluated = memory.scale == 0
        broken = self._absorb(memory, point, evaluated)
        r, s = memory.r, memory.r if memory.s is None else memory.s
        done = broken | self.within(r, memory.w + r, point.blocks)
        last = memory.absorbed == self.max_steps - 1
        verify = ~evaluated & (done | (memory.products >= self.refresh) | last)
        # Rows whose iterate is evaluated next keep their direction until its true residual is known.
        rho = dots(r, s)
        memory.restart = torch.where(verify, done, memory.restart | ~(memory.rho > 0))
        conjugate = torch.where(memory.restart, 0.0, rho / memory.rho)
        direction = torch.addcmul(s, conjugate.nan_to_num(nan=0.0).to(s.dtype)[:, None], memory.p)
        memory.p = torch.where(verify[:, None], memory.p, direction)
        memory.rho = torch.where(verify, memory.rho, rho)
        # A row whose iterate is the last point but one has no time for a product and takes a step of the map.
        size = torch.maximum(norms(memory.w), norms(r))
        scale = torch.ones_like(rho) if last else probe_scale(size, norms(memory.p), memory.first, memory.norm)
        memory.scale = torch.where(verify, 0.0, scale)
        memory.restart = memory.restart & verify
        return torch.addcmul(memory.w, memory.scale.to(r.dtype)[:, None], memory.p)

    @staticmethod
    def _absorb(memory: _Memory, point: Point, evaluated: Tensor) -> Tensor:
        """Step along the direction whose product was evaluated, or take the residual of the iterate.

        Returns:
            `(b,)` mask of rows whose product shows that `A` is not positive definite.
        """
        slope = dots(memory.p, memory.r)
        scale = torch.where(evaluated, 1.0, memory.scale)
        curvature = (slope - dots(memory.p, point.true_residual)) / scale
        broken = ~evaluated & ~(curvature > 0)
        step = torch.where(evaluated | broken, 0.0, slope / curvature)
        # r - step Ap, with Ap = (r - r(w + scale p)) / scale
        part = torch.where(evaluated, 1.0, step / scale).to(point.residual.dtype)[:, None]
        memory.w = torch.addcmul(memory.w, step.to(part.dtype)[:, None], memory.p)
        memory.r = torch.lerp(memory.r, point.true_residual, part)
        if memory.s is not None:
            memory.s = torch.lerp(memory.s, point.residual, part)
        memory.products = torch.where(evaluated, 0, memory.products + 1)
        norm = torch.where(evaluated, 0.0, curvature / dots(memory.p, memory.p)).nan_to_num(nan=0.0)
        memory.norm = torch.maximum(memory.norm, norm)
        return broken
