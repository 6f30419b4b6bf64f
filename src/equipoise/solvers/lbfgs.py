"""Limited-memory BFGS with a strong-Wolfe search, every trial of which is one evaluation of the loop."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.linalg import LowRank, readable, row_dots
from equipoise.map import Point
from equipoise.solvers.base import Solver

NEVER = torch.iinfo(torch.int64).max
NOISE = 1e3  # rounding errors, relative to the largest value seen, below which a change is taken from the slopes


@dataclasses.dataclass(eq=False)
class _Memory:
    base: Tensor  # (b, D) where the search of each row began
    residual: Tensor  # (b, D) minus the gradient there
    direction: Tensor  # (b, D)
    value: Tensor  # (b,) objective at the base; zeros if there is none
    noise: Tensor  # (b,) values that differ by less are told apart by the slopes; infinite: slopes alone
    search: Tensor  # (b, 3) slope at the base, length of the trial under way in units of the direction, trials so far
    bracket: Tensor  # (b, 6) left end: step, change of the objective since the base, slope; right end: the same
    pairs: Tensor  # (b, 2m + 2, D): s_0, y_0, s_1, y_1, ... divided by the root of s.y, in m + 1 slots
    factor: Tensor  # (b, m + 1, m + 1) float64, inverse of R_ij = s_i . y_j, i not younger than j
    gram: Tensor  # (b, m + 1, m + 1) float64, y_i . y_j
    learned: Tensor  # (b, m + 1) number of the evaluation that taught each pair, or NEVER
    spare: Tensor  # (b,) slot that the next pair goes to
    absorbed: int = 0  # points absorbed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LBFGS(Solver):
    r"""L-BFGS for maps $f(z) = z - \nabla h(z)$, whose fixed points are stationary points of $h$.

    $$ z_{k+1} = z_k + t_k M_k r_k, \qquad r = -\nabla h, \qquad
       M_{k+1} = V^\top M_k V + \frac{s s^\top}{s^\top y}, \quad V = I - \frac{y s^\top}{s^\top y} $$

    with $s = z_{k+1} - z_k$, $y = r_k - r_{k+1}$ and $M_0 = \gamma I$, $\gamma = s^\top y / y^\top y$ of the last pair.
    The step $t_k$ meets the strong Wolfe conditions

    $$ h(z + t d) \le h(z) + c_1 t\, \nabla h(z)^\top d, \qquad
       |\nabla h(z + t d)^\top d| \le c_2\, |\nabla h(z)^\top d| . $$

    Each evaluation is one trial of each sample's own search. Where the point has no value, or values differ by their
    rounding only, the change of $h$ is taken from the slopes, as if $h$ were quadratic along $d$: the approximate
    Wolfe condition. So it also solves linear systems with a symmetric positive definite $I - J$.

    Args:
        memory: number of pairs (s, y) held; at least `max_steps` if the inverse is to serve the backward pass.
        armijo: $c_1$.
        wolfe: $c_2$.
        guard: a pair is learned only if $s^\top y$ exceeds `guard` $\|s\| \|y\|$.
        scaled: take $\gamma$ as above; otherwise $M_0 = I$.
        max_trials: of one search; then the last trial is taken if it is lower, else values are no longer heeded.

    Raises:
        ValueError: a field is out of its range.

    Example:
        >>> import torch, equipoise as eq
        >>> from equipoise.fixed_point import solve_map
        >>> from equipoise.map import DescentMap
        >>> z0 = torch.zeros(1, 2, dtype=torch.float64)
        >>> f = DescentMap(lambda z: (z - 1).pow(4).sum(1) + z[:, 0] ** 2, z0, params=())
        >>> solution = solve_map(f, z0, solver=eq.LBFGS(max_steps=60, rtol=1e-9), gradient=eq.Implicit())
        >>> solution.converged.item()
        True

    Source: Nocedal and Wright, Numerical Optimization (2006), sections 3.5 and 7.2; inverse: Byrd, Nocedal and Schnabel
    (1994), theorem 2.2; slopes alone: Hager and Zhang (2005), section 2; bracket: Lewis and Overton (2013), section 4.
    """

    memory: int = 10
    armijo: float = 1e-4
    wolfe: float = 0.9
    guard: float = 1e-10
    scaled: bool = True
    max_trials: int = 20

    keeps_inverse: ClassVar[bool] = True
    supports_projection: ClassVar[bool] = False  # a search needs the points that it named
    retries: ClassVar[int] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("memory", "max_trials"):
            if getattr(self, field) < 1:
                raise ValueError(f"LBFGS({field}={getattr(self, field)!r}): must be >= 1")
        if not 0 < self.armijo < self.wolfe < 1:
            raise ValueError(
                f"LBFGS(armijo={self.armijo!r}, wolfe={self.wolfe!r}): must obey 0 < armijo < wolfe < 1, "
                "else no step need exist that meets both conditions"
            )
        if not self.guard >= 0:
            raise ValueError(f"LBFGS(guard={self.guard!r}): must be >= 0, so that the inverse stays positive definite")

    def init(self, point: Point) -> _Memory:
        b, size = point.z.shape
        slots = max(1, min(self.memory, self.max_steps)) + 1
        zeros = torch.zeros(b, 3, dtype=torch.float64, device=point.z.device)
        return _Memory(
            base=point.z,
            residual=point.r,
            direction=torch.zeros_like(point.z),  # the first point ends a search of length zero
            value=zeros[:, 0] if point.value is None else point.value,
            noise=torch.full_like(zeros[:, 0], torch.inf if point.value is None else 0.0),
            search=zeros,
            bracket=zeros.new_zeros(b, 6),
            pairs=point.z.new_zeros(b, 2 * slots, size),
            factor=zeros.new_zeros(b, slots, slots),
            gram=zeros.new_zeros(b, slots, slots),
            learned=torch.full((b, slots), NEVER, device=zeros.device),
            spare=torch.zeros(b, dtype=torch.int64, device=zeros.device),
        )

    def propose(self, memory: _Memory, point: Point) -> Tensor:
        memory.absorbed += 1
        trial = self._trial(memory, point)
        start, step, trials = memory.search.unbind(dim=1)
        lower = trial.isfinite().all(dim=1) & (trial[:, 1] <= self.armijo * step * start)
        met = lower & (trial[:, 2].abs() <= -self.wolfe * start)
        accepted = met | (lower & (trials + 1 >= self.max_trials))
        failed = ~met & (trials + 1 == self.max_trials)
        begun = accepted | failed
        if not readable(trial) or not bool(begun.all()):
            self._narrow(memory, trial, lower)
        if not readable(trial) or bool(begun.any()):
            self._advance(memory, point, accepted, begun, failed)
        return torch.addcmul(memory.base, memory.search[:, 1:2].to(point.z.dtype), memory.direction)

    def inverse(self, memory: _Memory, step: Tensor) -> LowRank:
        # Pairs are evicted from the old end and disregarded from the young one, and the inverse of a triangular matrix
        # without its first or last rows and columns is its inverse without them.
        used = min(memory.absorbed, memory.learned.shape[1])
        learned = memory.learned[:, :used]
        known = learned <= step[:, None]
        factor = memory.factor[:, :used, :used] * (known[:, :, None] & known[:, None, :])
        gram = memory.gram[:, :used, :used]
        gamma = torch.ones_like(memory.noise)
        if self.scaled:
            newest = torch.where(known, learned, -1).argmax(dim=1, keepdim=True)
            square = gram.diagonal(dim1=1, dim2=2).gather(1, newest)[:, 0]
            gamma = torch.where(known.any(dim=1), 1 / square, gamma)
        core = gram.new_zeros(len(gram), 2 * used, 2 * used)
        mixed = factor * gamma[:, None, None]
        core[:, ::2, ::2] = torch.bmm(factor.mT, torch.baddbmm(factor, gram, mixed))
        core[:, 1::2, ::2] = -mixed
        core[:, ::2, 1::2] = -mixed.mT
        return LowRank(gamma, memory.pairs[:, : 2 * used], core)

    @staticmethod
    def _trial(memory: _Memory, point: Point) -> Tensor:
        """What the point says of the objective along its row's direction: step, change, slope, `(b, 3)`."""
        start, step, _ = memory.search.unbind(dim=1)
        slope = -_dot(point.r, memory.direction)
        change = step * (start + slope) / 2
        if point.value is not None:
            difference = (point.value - memory.value).to(change.dtype)
            change = torch.where(difference.abs() <= memory.noise, change, difference)
        return torch.stack([step, change, slope], dim=1)

    @staticmethod
    def _narrow(memory: _Memory, trial: Tensor, lower: Tensor) -> None:
        """Shorten or extend the bracket by a trial that was not accepted, and choose the next."""
        # Left ends are lower and fall steeply, right ends are higher or rise steeply: a step that meets both
        # conditions lies between them, whatever the objective.
        left = (lower & (trial[:, 2] < 0))[:, None]
        low, high = memory.bracket.split(3, dim=1)
        memory.bracket = torch.cat([torch.where(left, trial, low), torch.where(left, high, trial)], dim=1)
        start, fall, slope, end, rise, steep = memory.bracket.unbind(dim=1)
        width, trials = end - start, memory.search[:, 2] + 1
        # Minimum of the cubic through both ends; NaN if the right end is not finite: then go most of the way back.
        middle = slope + steep - 3 * (rise - fall) / width
        root = (middle.square() - slope * steep).clamp_min(0).sqrt()
        part = 1 - (steep + root - middle) / (steep - slope + 2 * root)
        part = part.nan_to_num(nan=0.1).clamp(0.1, 0.9)
        part = torch.where(trials % 3 == 0, 0.5, part)  # the bracket shrinks, however bad the cubic
        # Without a right end: where the slopes extrapolate to zero.
        ahead = -slope / (slope - low[:, 2])
        ahead = torch.where(ahead > 0, ahead, torch.inf).clamp(1, 9) * (start - low[:, 0])
        step = start + torch.where(width.isfinite(), part * width, ahead)
        memory.search = torch.stack([memory.search[:, 0], step, trials], dim=1)

    def _advance(self, memory: _Memory, point: Point, accepted: Tensor, begun: Tensor, failed: Tensor) -> None:
        """Begin a new search: where a trial was accepted from there, after the last trial from the same base."""
        base = torch.where(accepted[:, None], point.z, memory.base)
        residual = torch.where(accepted[:, None], point.r, memory.residual)
        self._learn(memory, base - memory.base, memory.residual - residual, point.running)
        memory.base, memory.residual = base, residual
        if point.value is not None:
            memory.value = torch.where(accepted, point.value, memory.value)
            unit = NOISE * torch.finfo(point.value.dtype).eps
            memory.noise = torch.maximum(memory.noise, unit * memory.value.abs())
        direction = self.inverse(memory, torch.full_like(memory.spare, NEVER - 1)).mv(residual)
        square, slope = _dot(residual, residual), -_dot(residual, direction)
        # A search that fails on a smooth objective was misled by rounding: from then on the slopes judge alone. If
        # they fail, too, the gradient is followed until it leads to something lower.
        plain = (failed & ~accepted & memory.noise.isinf()) | ~(slope < 0)
        memory.noise = memory.noise.masked_fill(failed, torch.inf)
        # Nothing is known of the scale along a bare gradient: no step longer than one.
        unknown = plain | (memory.learned == NEVER).all(dim=1)
        step = torch.where(unknown, square.rsqrt().clamp_max(1), 1.0)
        slope = torch.where(plain, -square, slope)
        direction = torch.where(plain[:, None], residual, direction)
        trials = torch.where(plain, float(self.max_trials), 0.0)
        zero, begun = torch.zeros_like(slope), begun[:, None]
        ends = torch.stack([zero, zero, slope, zero + torch.inf, zero, zero], dim=1)
        memory.bracket = torch.where(begun, ends, memory.bracket)
        memory.search = torch.where(begun, torch.stack([slope, step, trials], dim=1), memory.search)
        memory.direction = torch.where(begun, direction, memory.direction)

    def _learn(self, memory: _Memory, s: Tensor, y: Tensor, running: Tensor) -> None:
        """Store a pair in the rows where the objective is convex enough along it."""
        curvature = _dot(s, y)
        keep = running & (curvature > self.guard * (_dot(s, s) * _dot(y, y)).sqrt())
        pair = torch.stack([s, y], dim=1) * torch.where(keep, curvature.rsqrt(), 0.0).to(s.dtype)[:, None, None]
        rows, slot = torch.arange(len(s), device=s.device), memory.spare
        used = min(memory.absorbed, memory.learned.shape[1])
        memory.pairs.unflatten(1, (-1, 2))[rows, slot] = pair
        products = row_dots(pair[:, 1], memory.pairs[:, : 2 * used]).to(memory.gram.dtype)
        memory.gram[rows, slot, :used] = products[:, 1::2]
        memory.gram[rows, :used, slot] = products[:, 1::2]
        # R grows by a column that ends in one, and so does its inverse.
        known = (memory.learned[:, :used] != NEVER).to(products.dtype)
        column = torch.bmm(memory.factor[:, :used, :used], (products[:, ::2] * known)[:, :, None])[:, :, 0]
        memory.factor[rows, slot] = 0.0
        memory.factor[rows, :used, slot] = -column * known
        memory.factor[rows, slot, slot] = 1.0
        memory.learned[rows, slot] = torch.where(keep, memory.absorbed, NEVER)
        # The oldest pair makes room for the next one, though not in rows that stopped: they keep nothing new.
        memory.spare = torch.where(keep, (slot + 1) % memory.learned.shape[1], slot)
        memory.learned[rows, memory.spare] = NEVER


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row, in float64: `(b, D), (b, D) -> (b,)`."""
    return torch.linalg.vecdot(x, y).to(torch.float64)
