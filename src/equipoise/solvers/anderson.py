"""Anderson acceleration."""

import dataclasses

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import can_branch_on, row_dots, row_sums
from equipoise.core.map import Point
from equipoise.solvers.base import Solver
from equipoise.solvers.picard import CONTRACTION

CHUNK = 10  # points for which room is made at first, if all are kept
FORGOTTEN = 1e200  # squared norm of a column that later steps must not use


@dataclasses.dataclass(eq=False)
class _Memory:
    images: Tensor  # (b, m, D) f(z_i)
    residuals: Tensor  # (b, m, D) f(z_i) - z_i
    gram: Tensor  # (b, k, m, m) float64, products of residuals in each of k blocks
    count: int = 0  # points absorbed

    def grow(self) -> None:
        """Make room for twice as many points."""
        m = self.gram.shape[-1]
        self.images, self.residuals = (
            torch.cat([x, torch.empty_like(x)], dim=1) for x in (self.images, self.residuals)
        )
        self.gram = torch.nn.functional.pad(self.gram, (0, m, 0, m))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    r"""Anderson acceleration: the combination of the last points with the least residual.

    $$ z_{k+1} = \sum_i \alpha_i \bigl(z_i + \beta r_i\bigr), \qquad
       \alpha = \arg\min_{\sum_i \alpha_i = 1} \Bigl\|\sum_i \alpha_i r_i\Bigr\|^2, \qquad r_i = f(z_i) - z_i $$

    In a map with blocks of different scale, each block counts relative to its size.

    Safeguard: if the residual of a sample exceeds `growth` times the least in its memory, the sample restarts with the
    Picard step of the best point. It does not if that step was the last one: the two points then correct it together.

    With a proved Lipschitz constant $L < 1$ the safeguard proves convergence: a step that reduces the residual by less
    than a Picard step, $\|r_{k+1}\| > L\,\|r_{\text{best}}\|$, is undone, so at most every other evaluation is lost. As
    with `Picard`, the tolerance then bounds the error instead of the residual.

    Args:
        memory: number of points combined; None: all, in memory that grows with the steps. On an affine map, with
            `growth=math.inf`, this is GMRES.
        mixing: $\beta$.
        ridge: regularization of the least-squares problem beyond its rounding errors, relative to the squared norm of
            each residual, hence independent of the tolerance.
        growth: factor by which a residual may grow before the sample restarts.
        lipschitz: proved constant $L < 1$ of the map in the Euclidean norm of the whole state.

    Raises:
        ValueError: a field is out of range.

    Source: Walker and Ni (2011); here the normal equations of the constrained problem, with one new row of products a
    step.
    """

    memory: int | None = 5
    mixing: float = 1.0
    ridge: float = 0.0
    growth: float = 10.0
    lipschitz: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            memory=">= 1; 1 is Picard iteration, None keeps all points",
            mixing="> 0 and <= 1",
            ridge=">= 0",
            growth="> 1",
        )
        check_ranges(self, lipschitz=CONTRACTION)
        if self.lipschitz is not None and self.mixing != 1:
            raise ValueError(
                f"Anderson(mixing={self.mixing!r}): must be 1 with lipschitz, which is the constant of a Picard step"
            )

    def tolerance(self, size: Tensor) -> Tensor:
        allowed = super().tolerance(size)
        return allowed if self.lipschitz is None else allowed * (1 - self.lipschitz)

    def init(self, point: Point) -> _Memory:
        if self.lipschitz is not None and point.blocks is not None:
            raise ValueError(
                f"Anderson(lipschitz={self.lipschitz!r}): the proof is in the Euclidean norm of the whole state, and "
                "this map has blocks that converge separately; leave it out, or use Picard"
            )
        b, size = point.z.shape
        m = max(1, self.max_steps if self.memory is None else min(self.memory, self.max_steps))
        if self.memory is None:
            m = min(m, CHUNK)
        return _Memory(
            images=point.z.new_empty(b, m, size),
            residuals=point.z.new_empty(b, m, size),
            gram=torch.zeros(b, len(point.blocks or (1,)), m, m, dtype=torch.float64, device=point.z.device),
        )

    def propose(self, memory: _Memory, point: Point) -> Tensor:
        m = memory.gram.shape[-1]
        if self.memory is None and memory.count == m:
            memory.grow()
            m = memory.gram.shape[-1]
        slot, used = memory.count % m, min(memory.count + 1, m)
        memory.images[:, slot] = point.fz
        memory.residuals[:, slot] = point.residual
        memory.count += 1
        if m == 1:
            return point.z.add(point.residual, alpha=self.mixing)
        images, residuals = memory.images[:, :used], memory.residuals[:, :used]
        gram = memory.gram[..., :used, :used]
        if point.blocks is None:
            gram[:, 0, slot] = gram[:, 0, :, slot] = row_dots(point.residual, residuals)
        else:
            parts = zip(point.residual.split(point.blocks, dim=1), residuals.split(point.blocks, dim=2), strict=True)
            products = torch.stack([row_dots(r, block) for r, block in parts], dim=1)
            gram[:, :, slot] = gram[..., slot] = products
        weights = self._weights(gram, slot, torch.finfo(images.dtype).eps)
        z = row_sums(weights, images)
        return z if self.mixing == 1 else z.sub_(row_sums(weights * (1 - self.mixing), residuals))

    def _weights(self, gram: Tensor, slot: int, eps: float) -> Tensor:
        """Return the weights `(b, used)` of the next step; restarts are entered in `gram`."""
        matrix = gram[:, 0].clone() if gram.shape[1] == 1 else _balanced(gram)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        squares = diagonal.clone()
        if self.lipschitz is None:
            restart = ~(squares[:, slot] <= self.growth**2 * squares.amin(dim=1))
            if self.memory is None or self.memory > 2:
                # Of two points the newer is the Picard step of the older: a restart would repeat it.
                restart = restart & ((squares < FORGOTTEN).sum(dim=1) != 2)
        else:
            others = squares.clone()
            others[:, slot] = torch.inf
            restart = ~(squares[:, slot] <= self.lipschitz**2 * others.amin(dim=1))
        diagonal.mul_(1 + self.ridge + 4 * eps)  # relative to each column, at least the rounding of the products
        factor, info = torch.linalg.cholesky_ex(matrix)
        weights = torch.cholesky_solve(torch.ones_like(squares)[..., None], factor)[..., 0]
        weights = weights / weights.sum(dim=1, keepdim=True)
        restart = restart | (info != 0)
        if not can_branch_on(gram) or bool(restart.any()):
            best = torch.nn.functional.one_hot(squares.argmin(dim=1), squares.shape[1]).to(gram.dtype)
            weights = torch.where(restart[:, None], best, weights)
            best = best[:, None]
            alone = gram * best[..., :, None] * best[..., None, :] + torch.diag_embed((1 - best) * FORGOTTEN)
            gram.copy_(torch.where(restart[:, None, None, None], alone, gram))
        return weights


def _balanced(gram: Tensor) -> Tensor:
    """Return the sum `(b, m, m)` of the products of all blocks, each relative to the mean square of its block."""
    squares = gram.diagonal(dim1=2, dim2=3)
    scale = torch.where(squares < FORGOTTEN, squares, 0.0).sum(dim=2)
    return (gram / scale.clamp_min(torch.finfo(gram.dtype).tiny)[..., None, None]).sum(dim=1)
