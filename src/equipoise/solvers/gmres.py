"""GMRES for affine maps, such as adjoint systems."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import can_branch_on, dots, norms, row_dots, row_sums
from equipoise.core.map import Point
from equipoise.solvers.base import Solver
from equipoise.solvers.probes import probe_scale

ORTHOGONAL = 0.3  # a vector that Gram-Schmidt leaves at least this part of is orthogonal up to rounding


@dataclasses.dataclass(eq=False)
class _Memory:
    base: Tensor  # (b, D) iterate at which the subspace of each row begins
    basis: Tensor  # (b, m + 1, D) v_0, v_1, ..., orthonormal; v_0 along the residual at the base
    steps: Tensor | None  # (b, m + 1, D) basis times the preconditioner; None: the basis itself
    rotation: Tensor  # (b, m + 1, m + 1) float64, the orthogonal Q of Q H = R
    upper: Tensor  # (b, m, m) float64, R in the columns of products, the identity in the others
    along: Tensor  # (b, m + 1) float64, dot products of the steps with the base
    gram: Tensor  # (b, m + 1, m + 1) float64, dot products of the steps with each other
    size: Tensor  # (b,) norm of the residual at the base
    offset: Tensor  # (b,) norm of the base
    products: Tensor  # (b,) number since the base was evaluated
    scale: Tensor  # (b,) the point to evaluate is base + scale * newest step; 0: the iterate itself
    norm: Tensor  # (b,) largest |A s| / |s| so far
    first: Tensor  # (b,) norm of the first residual
    absorbed: int = 0  # points absorbed


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMRES(Solver):
    r"""GMRES, for affine maps $f(w) = (I - A) w + b$ with any invertible $A$: the least residual in a Krylov space.

    $$ w_k = w_0 + M V_k y_k, \qquad y_k = \arg\min_y \|r_0 - A M V_k y\|, \qquad
       A M V_k = V_{k+1} H_k, \quad V_k^\top V_k = I, \quad v_0 = r_0 / \|r_0\| $$

    with the preconditioner $M$ of `solve`, the identity if there is none. It is a right preconditioner: the method
    minimizes the residual itself, by which samples are judged. An evaluation at $w_0 + t M v$ gives $A M v$; $t$ is
    chosen so that rounding is small. The preconditioned residual there gives $M A M v$: the next $M v$ is a combination
    of those, so $M$ is not applied once more.

    The iterate is evaluated when the recurrence has met the tolerance, when the memory is full, and last; the method
    restarts from it. A sample whose residual cannot be reduced, since $A$ is singular or every restart stagnates, ends
    as MAX_STEPS or STALLED with its best point. So does a sample whose map is not affine, unless the evaluated iterate
    is within the tolerance.

    Args:
        memory: largest number of products between two evaluations of the iterate. So many vectors are held, and twice
            as many with a preconditioner. `patience` must be larger: only these evaluations are better points.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> import torch, equipoise as eq
        >>> A = torch.tensor([[0.5, 0.9], [-0.9, 3.0]])
        >>> solution = eq.fixed_point(lambda w: w - w @ A + 1, torch.zeros(1, 2), solver=eq.GMRES(rtol=1e-5))
        >>> solution.converged.item(), solution.num_evals
        (True, 4)

    Source: Saad and Schultz (1986), with a second Gram-Schmidt pass if needed; stored preconditioned vectors: Saad
    (1993).
    """

    memory: int = 20

    supports_projection: ClassVar[bool] = False  # products are read from the points that it proposed

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, memory=">= 1")

    def init(self, point: Point) -> _Memory:
        b, size = point.z.shape
        m = max(1, min(self.memory, self.max_steps - 2))
        small = torch.zeros(b, m + 1, m + 1, dtype=torch.float64, device=point.z.device)
        zero = small.new_zeros(b)
        return _Memory(
            base=point.z,
            basis=point.z.new_zeros(b, m + 1, size),
            steps=None if point.unpreconditioned is None else point.z.new_zeros(b, m + 1, size),
            rotation=small,
            upper=small.new_zeros(b, m, m),
            along=small.new_zeros(b, m + 1),
            gram=small.clone(),
            size=zero,
            offset=zero,
            products=torch.zeros_like(zero, dtype=torch.int64),
            scale=zero,
            norm=zero,
            first=norms(point.true_residual),
        )

    def propose(self, memory: _Memory, point: Point) -> Tensor:
        memory.absorbed += 1
        last = memory.absorbed == self.max_steps - 1
        evaluated = memory.scale == 0
        verify, z = torch.zeros_like(evaluated), memory.base
        if memory.absorbed > 1:
            used = min(memory.absorbed - 1, memory.upper.shape[1])
            complete = self._extend(memory, point, used, evaluated)
            weights, met = self._minimize(memory, used)
            verify = ~evaluated & (complete | met | last)
            if not can_branch_on(verify) or bool(verify.any()):
                steps = memory.basis if memory.steps is None else memory.steps
                z = z + row_sums(torch.where(verify[:, None], weights, 0.0), steps[:, :used])
        if not can_branch_on(evaluated) or bool(evaluated.any()):
            self._begin(memory, point, evaluated)
            z = torch.where(evaluated[:, None], memory.base, z)
        step, length = self._newest(memory)
        # A row whose base is the last point but one has no time for a product and takes a step of the map.
        size = torch.maximum(memory.offset, memory.size)
        unit = torch.where(evaluated, memory.size, 1.0)
        scale = unit if last else unit * probe_scale(size, unit * length, memory.first, memory.norm)
        memory.scale = torch.where(verify, 0.0, scale)
        return torch.addcmul(z, memory.scale.to(z.dtype)[:, None], step)

    @staticmethod
    def _begin(memory: _Memory, point: Point, evaluated: Tensor) -> None:
        """Begin the subspace of the evaluated rows at their point."""
        r, chosen = point.true_residual, evaluated[:, None]
        size = norms(r)
        memory.base = torch.where(chosen, point.z, memory.base)
        memory.size = torch.where(evaluated, size, memory.size)
        memory.offset = torch.where(evaluated, norms(point.z), memory.offset)
        memory.products = torch.where(evaluated, 0, memory.products)
        for matrix in (memory.rotation, memory.upper):
            eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
            matrix.copy_(torch.where(chosen[:, None], eye, matrix))
        unit = size.clamp_min(torch.finfo(r.dtype).tiny).to(r.dtype)[:, None]
        memory.basis[:, 0] = torch.where(chosen, r / unit, memory.basis[:, 0])
        if memory.steps is not None:
            memory.steps[:, 0] = torch.where(chosen, point.residual / unit, memory.steps[:, 0])

    @staticmethod
    def _extend(memory: _Memory, point: Point, used: int, evaluated: Tensor) -> Tensor:
        """Add a product to the subspace, which then has at most `used` columns.

        Returns:
            `(b,)` mask of rows whose subspace cannot grow further: their iterate is evaluated next.
        """
        rows, place = torch.arange(len(evaluated), device=evaluated.device), torch.where(evaluated, 0, memory.products)
        size, scale = (
            x.to(point.residual.dtype)[:, None] for x in (memory.size, torch.where(evaluated, 1.0, memory.scale))
        )
        basis = memory.basis[:, :used]
        held = torch.arange(used, device=rows.device) <= place[:, None]
        u = torch.addcmul(-point.true_residual, size, basis[:, 0]) / scale
        column, rest = torch.zeros_like(memory.along), torch.zeros_like(memory.size)
        for again in (False, True):
            if again:  # one pass of Gram-Schmidt is enough if little cancels, which each row decides for itself
                cancels = ~(rest > ORTHOGONAL * norms(column))
                if can_branch_on(rest) and not bool((point.running & cancels).any()):
                    break
                held = held & cancels[:, None]
            products = row_dots(u, basis) * held
            u = u - row_sums(products, basis)
            column[:, :used] += products
            rest = norms(u)
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
        memory.norm = torch.maximum(memory.norm, torch.where(evaluated, 0.0, total / length).nan_to_num(nan=0.0))

        # One more Givens rotation makes the new column triangular.
        column = torch.bmm(memory.rotation, column[..., None])[..., 0]
        # Rounding error of the product, from the base and from the probe.
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
        memory.products = torch.where(evaluated, place, place + 1)
        return closed | (memory.products == memory.upper.shape[1])

    def _minimize(self, memory: _Memory, used: int) -> tuple[Tensor, Tensor]:
        """Return the weights `(b, used)` of the steps of least residual, and whether that meets the tolerance."""
        first = memory.size[:, None] * memory.rotation[:, :, 0]
        taken = torch.arange(used, device=first.device) < memory.products[:, None]
        right = torch.where(taken, first[:, :used], 0.0)
        y = torch.linalg.solve_triangular(memory.upper[:, :used, :used], right[..., None], upper=True)[..., 0]
        residual = first.gather(1, memory.products[:, None])[:, 0].abs()
        moved = y if memory.steps is None else torch.bmm(memory.gram[:, :used, :used], y[..., None])[..., 0]
        square = memory.offset**2 + (y * (2 * memory.along[:, :used] + moved)).sum(dim=1)
        image = square.clamp_min(0).sqrt() - residual  # at most the norm of f(w) = w + r
        return y, residual <= self.tolerance(image.clamp_min(0))

    @staticmethod
    def _newest(memory: _Memory) -> tuple[Tensor, Tensor]:
        """Return the step to be multiplied next, and its norm; store its dot products."""
        rows = torch.arange(len(memory.products), device=memory.products.device)
        steps = memory.basis if memory.steps is None else memory.steps
        step = steps[rows, memory.products]
        memory.along[rows, memory.products] = dots(step, memory.base)
        if memory.steps is None:
            return step, torch.ones_like(memory.size)
        used = min(memory.absorbed, memory.along.shape[1])
        products = row_dots(step, steps[:, :used]).to(memory.gram.dtype)
        memory.gram[rows, memory.products, :used] = products
        memory.gram[rows, :used, memory.products] = products
        return step, norms(step)
