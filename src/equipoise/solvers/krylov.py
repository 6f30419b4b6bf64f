"""Krylov methods for affine maps, such as adjoint systems: conjugate gradients and GMRES."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.linalg import readable, row_dots, row_sums
from equipoise.core.map import Point
from equipoise.solvers.base import Solver

REACH = 1e4  # largest residual of a probe, in units of the first one; a solve is called divergent far beyond
ENOUGH = 0.3  # part of a vector that is left by Gram-Schmidt, above which it is orthogonal to rounding
UNKNOWN = 1e4  # norm of A that is reckoned with before there is a product


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
        zero = point.residual.new_zeros(point.residual.shape[0], dtype=torch.float64)
        return _ConjugateMemory(
            w=point.z,
            r=point.true_residual,
            s=None if point.unpreconditioned is None else point.residual,
            p=torch.zeros_like(point.residual),
            rho=zero,
            scale=zero,
            steepest=torch.ones_like(zero, dtype=torch.bool),
            since=torch.zeros_like(zero, dtype=torch.int64),
            bend=zero,
            first=_norm(point.true_residual),
        )

    def propose(self, memory: _ConjugateMemory, point: Point) -> Tensor:
        memory.absorbed += 1
        evaluated = memory.scale == 0
        broken = self._absorb(memory, point, evaluated)
        r, s = memory.r, memory.r if memory.s is None else memory.s
        done = broken | self.measure(r, memory.w + r, point.blocks)[2]
        last = memory.absorbed == self.max_steps - 1
        look = ~evaluated & (done | (memory.since >= self.refresh) | last)
        # Where the iterate is looked at, the next direction waits for its true residual.
        rho = _dot(r, s)
        memory.steepest = torch.where(look, done, memory.steepest | ~(memory.rho > 0))
        conjugate = torch.where(memory.steepest, 0.0, rho / memory.rho)
        direction = torch.addcmul(s, conjugate.nan_to_num(nan=0.0).to(s.dtype)[:, None], memory.p)
        memory.p = torch.where(look[:, None], memory.p, direction)
        memory.rho = torch.where(look, memory.rho, rho)
        # A row whose iterate is the last point but one has no product to go by, and takes a step of the map.
        reach = torch.maximum(_norm(memory.w), _norm(r))
        scale = torch.ones_like(rho) if last else _scale(reach, _norm(memory.p), memory.first, memory.bend)
        memory.scale = torch.where(look, 0.0, scale)
        memory.steepest = memory.steepest & look
        return torch.addcmul(memory.w, memory.scale.to(r.dtype)[:, None], memory.p)

    @staticmethod
    def _absorb(memory: _ConjugateMemory, point: Point, evaluated: Tensor) -> Tensor:
        """Step along the direction whose product was evaluated, or take the iterate's residual; the rows, `(b,)`, in
        which the product shows that `A` is not positive definite."""
        slope = _dot(memory.p, memory.r)
        scale = torch.where(evaluated, 1.0, memory.scale)
        curvature = (slope - _dot(memory.p, point.true_residual)) / scale
        broken = ~evaluated & ~(curvature > 0)
        step = torch.where(evaluated | broken, 0.0, slope / curvature)
        # r - step Ap, with Ap = (r - r(w + scale p)) / scale
        part = torch.where(evaluated, 1.0, step / scale).to(point.residual.dtype)[:, None]
        memory.w = torch.addcmul(memory.w, step.to(part.dtype)[:, None], memory.p)
        memory.r = torch.lerp(memory.r, point.true_residual, part)
        if memory.s is not None:
            memory.s = torch.lerp(memory.s, point.residual, part)
        memory.since = torch.where(evaluated, 0, memory.since + 1)
        bend = torch.where(evaluated, 0.0, curvature / _dot(memory.p, memory.p)).nan_to_num(nan=0.0)
        memory.bend = torch.maximum(memory.bend, bend)
        return broken


@dataclasses.dataclass(eq=False)
class _ArnoldiMemory:
    base: Tensor  # (b, D) where the subspace of each row begins
    basis: Tensor  # (b, m + 1, D) v_0 .. v_count, orthonormal; v_0 is that of the residual at the base
    steps: Tensor | None  # (b, m + 1, D) the same times the preconditioner; None: the basis itself
    rotation: Tensor  # (b, m + 1, m + 1) float64, the orthogonal Q of Q H = R
    upper: Tensor  # (b, m, m) float64, R in the columns of products, the identity in the others
    along: Tensor  # (b, m + 1) float64, products of the steps with the base
    gram: Tensor  # (b, m + 1, m + 1) float64, and with each other
    size: Tensor  # (b,) norm of the residual at the base
    offset: Tensor  # (b,) norm of the base
    count: Tensor  # (b,) products since the base was evaluated
    scale: Tensor  # (b,) the point under way is base + scale * newest step; 0: the iterate itself
    stretch: Tensor  # (b,) largest |A s| / |s| met
    first: Tensor  # (b,) norm of the first residual
    absorbed: int = 0  # points absorbed


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMRES(Solver):
    r"""GMRES, for affine maps $f(w) = (I - A) w + b$ with any invertible $A$: the least residual in a Krylov space.

    $$ w_k = w_0 + M V_k y_k, \qquad y_k = \arg\min_y \|r_0 - A M V_k y\|, \qquad
       A M V_k = V_{k+1} H_k, \quad V_k^\top V_k = I, \quad v_0 = r_0 / \|r_0\| $$

    with the preconditioner $M$ of `solve`, the identity if there is none. It stands on the right: what is made least is
    the residual itself, by which samples are judged. An evaluation at $w_0 + t M v$ gives $A M v$, with $t$ such that
    nothing is lost to rounding, and the preconditioned residual there gives $M A M v$: the next $M v$ is a combination
    of those, so $M$ is not applied once more.

    The iterate is evaluated when the recurrence has met the tolerance, when the memory is full, and last; the method
    starts anew from there. A sample whose residual cannot be lessened, since $A$ is singular or every restart
    stagnates, ends as MAX_STEPS or STALLED with its best point. So does one whose map is not affine, unless the point
    that was evaluated is within the tolerance.

    Args:
        memory: largest number of products between two evaluations of the iterate. So many vectors are held, and twice
            as many with a preconditioner. `patience` must be larger: only these evaluations are better points.

    Raises:
        ValueError: a field is out of its range.

    Example:
        >>> import torch, equipoise as eq
        >>> A = torch.tensor([[0.5, 0.9], [-0.9, 3.0]])
        >>> solution = eq.fixed_point(lambda w: w - w @ A + 1, torch.zeros(1, 2), solver=eq.GMRES(rtol=1e-5))
        >>> solution.converged.item(), solution.num_evals
        (True, 4)

    Source: Saad and Schultz (1986), Gram-Schmidt twice if need be; with the preconditioned vectors held: Saad (1993).
    """

    memory: int = 20

    supports_projection: ClassVar[bool] = False  # products are read off the points that it named

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"GMRES(memory={self.memory!r}): must be >= 1")

    def init(self, point: Point) -> _ArnoldiMemory:
        b, size = point.z.shape
        m = max(1, min(self.memory, self.max_steps - 2))
        small = torch.zeros(b, m + 1, m + 1, dtype=torch.float64, device=point.z.device)
        zero = small.new_zeros(b)
        return _ArnoldiMemory(
            base=point.z,
            basis=point.z.new_zeros(b, m + 1, size),
            steps=None if point.unpreconditioned is None else point.z.new_zeros(b, m + 1, size),
            rotation=small,
            upper=small.new_zeros(b, m, m),
            along=small.new_zeros(b, m + 1),
            gram=small.clone(),
            size=zero,
            offset=zero,
            count=torch.zeros_like(zero, dtype=torch.int64),
            scale=zero,
            stretch=zero,
            first=_norm(point.true_residual),
        )

    def propose(self, memory: _ArnoldiMemory, point: Point) -> Tensor:
        memory.absorbed += 1
        last = memory.absorbed == self.max_steps - 1
        evaluated = memory.scale == 0
        look, z = torch.zeros_like(evaluated), memory.base
        if memory.absorbed > 1:
            used = min(memory.absorbed - 1, memory.upper.shape[1])
            spent = self._extend(memory, point, used, evaluated)
            weights, met = self._least(memory, used)
            look = ~evaluated & (spent | met | last)
            if not readable(look) or bool(look.any()):
                steps = memory.basis if memory.steps is None else memory.steps
                z = z + row_sums(torch.where(look[:, None], weights, 0.0), steps[:, :used])
        if not readable(evaluated) or bool(evaluated.any()):
            self._begin(memory, point, evaluated)
            z = torch.where(evaluated[:, None], memory.base, z)
        step, length = self._newest(memory)
        # A row whose base is the last point but one has no product to go by, and takes a step of the map.
        reach = torch.maximum(memory.offset, memory.size)
        unit = torch.where(evaluated, memory.size, 1.0)
        scale = unit if last else unit * _scale(reach, unit * length, memory.first, memory.stretch)
        memory.scale = torch.where(look, 0.0, scale)
        return torch.addcmul(z, memory.scale.to(z.dtype)[:, None], step)

    @staticmethod
    def _begin(memory: _ArnoldiMemory, point: Point, evaluated: Tensor) -> None:
        """Begin at a point whose residual is known."""
        r, chosen = point.true_residual, evaluated[:, None]
        size = _norm(r)
        memory.base = torch.where(chosen, point.z, memory.base)
        memory.size = torch.where(evaluated, size, memory.size)
        memory.offset = torch.where(evaluated, _norm(point.z), memory.offset)
        memory.count = torch.where(evaluated, 0, memory.count)
        for matrix in (memory.rotation, memory.upper):
            eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
            matrix.copy_(torch.where(chosen[:, None], eye, matrix))
        unit = size.clamp_min(torch.finfo(r.dtype).tiny).to(r.dtype)[:, None]
        memory.basis[:, 0] = torch.where(chosen, r / unit, memory.basis[:, 0])
        if memory.steps is not None:
            memory.steps[:, 0] = torch.where(chosen, point.residual / unit, memory.steps[:, 0])

    @staticmethod
    def _extend(memory: _ArnoldiMemory, point: Point, used: int, evaluated: Tensor) -> Tensor:
        """Absorb a product, the columns of which are at most `used`; the rows, `(b,)`, that must be looked at."""
        rows, place = torch.arange(len(evaluated), device=evaluated.device), torch.where(evaluated, 0, memory.count)
        size, scale = (
            x.to(point.residual.dtype)[:, None] for x in (memory.size, torch.where(evaluated, 1.0, memory.scale))
        )
        basis = memory.basis[:, :used]
        held = torch.arange(used, device=rows.device) <= place[:, None]
        u = torch.addcmul(-point.true_residual, size, basis[:, 0]) / scale
        column, rest = torch.zeros_like(memory.along), torch.zeros_like(memory.size)
        for again in (False, True):
            # Once is enough where little cancels.
            if again and readable(rest) and not bool((point.running & ~(rest > ENOUGH * _norm(column))).any()):
                break
            products = row_dots(u, basis) * held
            u = u - row_sums(products, basis)
            column[:, :used] += products
            rest = _norm(u)
        column[rows, place + 1] = rest
        total = torch.linalg.vector_norm(column, dim=1)
        below = 1 / rest.clamp_min(torch.finfo(u.dtype).tiny).to(u.dtype)[:, None]
        memory.basis[rows, place + 1] = u * below
        length = torch.ones_like(rest)
        if memory.steps is not None:
            steps = memory.steps[:, :used]
            length = memory.gram[rows, place, place].sqrt()
            s = torch.addcmul(-point.residual, size, steps[:, 0]) / scale - row_sums(column[:, :used], steps)
            memory.steps[rows, place + 1] = s * below
        memory.stretch = torch.maximum(memory.stretch, torch.where(evaluated, 0.0, total / length).nan_to_num(nan=0.0))

        # One more Givens rotation makes the new column triangular.
        column = torch.bmm(memory.rotation, column[..., None])[..., 0]
        # What rounding at the base and at the probe leaves of the product.
        noise = (
            10 * torch.finfo(u.dtype).eps * torch.maximum(total, length + (memory.offset + memory.size) / memory.scale)
        )
        x = column[rows, place]
        radius = torch.hypot(x, rest)
        closed = rest <= noise  # A maps the subspace into itself: the residual is zero, or A is singular
        regular = radius > torch.where(closed, 100 * noise, noise)
        cosine, sine = torch.where(regular, x / radius, 1.0)[:, None], torch.where(regular, rest / radius, 0.0)[:, None]
        above, lower = memory.rotation[rows, place], memory.rotation[rows, place + 1]
        memory.rotation[rows, place] = cosine * above + sine * lower
        memory.rotation[rows, place + 1] = cosine * lower - sine * above
        left = torch.arange(column.shape[1] - 1, device=rows.device) < place[:, None]
        memory.upper[rows, :, place] = torch.where(left, column[:, :-1], 0.0)
        memory.upper[rows, place, place] = torch.where(regular, radius, torch.inf)  # a singular column gets no weight
        memory.count = torch.where(evaluated, place, place + 1)
        return closed | (memory.count == memory.upper.shape[1])

    def _least(self, memory: _ArnoldiMemory, used: int) -> tuple[Tensor, Tensor]:
        """Weights `(b, used)` of the steps that make the residual least, and whether it is within the tolerance."""
        first = memory.size[:, None] * memory.rotation[:, :, 0]
        taken = torch.arange(used, device=first.device) < memory.count[:, None]
        right = torch.where(taken, first[:, :used], 0.0)
        y = torch.linalg.solve_triangular(memory.upper[:, :used, :used], right[..., None], upper=True)[..., 0]
        residual = first.gather(1, memory.count[:, None])[:, 0].abs()
        moved = y if memory.steps is None else torch.bmm(memory.gram[:, :used, :used], y[..., None])[..., 0]
        square = memory.offset**2 + (y * (2 * memory.along[:, :used] + moved)).sum(dim=1)
        image = square.clamp_min(0).sqrt() - residual  # at most the norm of f(w) = w + r
        return y, residual <= self.tolerance(image.clamp_min(0))

    @staticmethod
    def _newest(memory: _ArnoldiMemory) -> tuple[Tensor, Tensor]:
        """The step that is to be multiplied next, and its norm; its products are noted."""
        rows = torch.arange(len(memory.count), device=memory.count.device)
        steps = memory.basis if memory.steps is None else memory.steps
        step = steps[rows, memory.count]
        memory.along[rows, memory.count] = _dot(step, memory.base)
        if memory.steps is None:
            return step, torch.ones_like(memory.size)
        used = min(memory.absorbed, memory.along.shape[1])
        products = row_dots(step, steps[:, :used]).to(memory.gram.dtype)
        memory.gram[rows, memory.count, :used] = products
        memory.gram[rows, :used, memory.count] = products
        return step, _norm(step)


def _scale(reach: Tensor, length: Tensor, first: Tensor, stretch: Tensor) -> Tensor:
    """How many steps of a `length` to go for a product, `(b,)`.

    As far as the point is from zero, for what is rounded there is then small against the product; but not so far that
    the residual there looks like divergence. A step that is long enough is taken once: it may lead to the answer.
    """
    longest = torch.log2(REACH * first / torch.where(stretch > 0, stretch, UNKNOWN) / length).round()
    wanted = torch.log2(reach / length).round()
    scale = torch.exp2(torch.minimum(longest, torch.where(wanted <= 3, 0.0, wanted)))
    return torch.where((scale > 0) & scale.isfinite(), scale, 1.0)  # a power of two: it scales without rounding


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row, in float64: `(b, D), (b, D) -> (b,)`."""
    return torch.linalg.vecdot(x, y).to(torch.float64)


def _norm(x: Tensor) -> Tensor:
    """Of each row, in float64: `(b, D) -> (b,)`."""
    return torch.linalg.vector_norm(x, dim=1).to(torch.float64)
