"""Limited-memory BFGS with a strong-Wolfe line search; each trial is one evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import can_branch_on, dots
from equipoise.core.map import Point
from equipoise.core.solution import Solution
from equipoise.solvers.base import NEVER, Solver
from equipoise.solvers.pairs import Pairs, SecantInverse

NOISE = 1e3  # units of rounding of the largest value; smaller changes are computed from slopes


@dataclasses.dataclass(eq=False)
class _Memory:
    base: Tensor  # (b, D) start of the line search of each row
    residual: Tensor  # (b, D) minus the gradient there
    direction: Tensor  # (b, D)
    value: Tensor  # (b,) objective at the base; zeros if there is none
    noise: Tensor  # (b,) smaller differences of values are computed from slopes; infinite: slopes alone
    search: Tensor  # (b, 3) slope at the base, step of the current trial along the direction, trials so far
    bracket: Tensor  # (b, 6) left end: step, change of the objective since the base, slope; right end: the same
    pairs: Pairs
    taken: Tensor  # (b,) accepted steps; -1 before the first point, which ends a step of length zero
    probing: Tensor  # (b,) whether the current point is an outer-aware probe
    reach: Tensor  # (b,) length of the first probe; infinite before it
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

    Each evaluation is one trial of each sample's own line search. If the map has no objective value, or values differ
    by rounding only, the change of $h$ is computed from the slopes, as if $h$ were quadratic along $d$: the approximate
    Wolfe condition. The method thus also solves linear systems with a symmetric positive definite $I - J$.

    Outer-problem awareness (OPA): after the first accepted step, and after every `outer_every` steps from there, one
    evaluation goes to the probe $z_k + e$ and adds the pair $(e, r(z_k) - r(z_k + e))$. This makes $M$ exact in the
    direction that the derivative of an outer loss $L$ needs:

    $$ e = t M_k \nabla L(z_k), \qquad \|e\| = \min(\|s\|, \delta / j^2) $$

    for the $j$-th probe, with the last step $s$ and the length $\delta$ of the first probe: the sum of the lengths is
    finite. If $h$ is strongly convex, then $M \nabla L$ tends to the exact $(I - J)^{-1} \nabla L$.

    Args:
        memory: number of pairs (s, y) held; at least `max_steps` if the inverse is to serve the backward pass.
        armijo: $c_1$.
        wolfe: $c_2$.
        min_curvature: least $s^\top y$ of a pair that is stored, relative to $\|s\| \|y\|$.
        scaled: use $\gamma$ as above; otherwise $M_0 = I$.
        max_trials: of one line search; then the last trial is accepted if it is lower, else the search continues by
            slopes alone.
        outer_every: accepted steps from one probe to the next; no effect without `outer_loss`. A probe costs one
            evaluation and one place in the memory.
        outer_loss: `(z, rows) -> (b,)`, the loss $L$ of each row at a state in the structure of the map's; `rows` are
            the numbers of these rows in the batch.
        pairs: s and y, each `(B, k, D)`, oldest first, known before the first point, say `pairs_of` an earlier solve;
            zeros are skipped. They must hold for this map: pairs of another objective give a wrong inverse and mislead
            the line search. If the Hessian changed by a known $\Delta$ between the solves, $y + \Delta s$ is the pair
            of the new objective.

    Raises:
        ValueError: a field is out of range; `outer_loss` without `outer_every`; when solving, pairs of another shape.

    Example:
        >>> import torch, equipoise as eq
        >>> from equipoise.fixed_point import solve_map
        >>> z0 = torch.zeros(1, 2, dtype=torch.float64)
        >>> f = eq.DescentMap(lambda z: (z - 1).pow(4).sum(1) + z[:, 0] ** 2, z0, params=())
        >>> solution = solve_map(f, z0, solver=eq.LBFGS(max_steps=60, rtol=1e-9), gradient=eq.Implicit())
        >>> solution.converged.item()
        True

    Source: Nocedal and Wright, Numerical Optimization (2006), sections 3.5 and 7.2; inverse: Byrd, Nocedal and Schnabel
    (1994), theorem 2.2; slopes alone: Hager and Zhang (2005), section 2; bracket: Lewis and Overton (2013), section 4;
    outer-problem awareness: Ramzi et al. (2022), section 2.3. There the first probe comes later: at the same cost the
    median error of the direction was two to three times larger.
    """

    memory: int = 10
    armijo: float = 1e-4
    wolfe: float = 0.9
    min_curvature: float = 1e-10
    scaled: bool = True
    max_trials: int = 20
    outer_every: int | None = None
    outer_loss: Callable[[Any, Tensor], Tensor] | None = None
    pairs: tuple[Tensor, Tensor] | None = dataclasses.field(default=None, repr=False, compare=False)

    keeps_inverse: ClassVar[bool] = True
    supports_projection: ClassVar[bool] = False  # a line search needs the points that it proposed
    retries: ClassVar[int] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, memory=">= 1", max_trials=">= 1", outer_every=">= 1, or None for no probes")
        check_ranges(self, min_curvature=">= 0, else the inverse may be indefinite")
        if not 0 < self.armijo < self.wolfe < 1:
            raise ValueError(
                f"LBFGS(armijo={self.armijo!r}, wolfe={self.wolfe!r}): must obey 0 < armijo < wolfe < 1, "
                "else no step may meet both conditions"
            )
        if self.outer_loss is not None and self.outer_every is None:
            raise ValueError(
                "LBFGS(outer_loss=...) without outer_every: set how many steps lie between probes, say outer_every=5"
            )

    def init(self, point: Point) -> _Memory:
        b = len(point.z)
        zeros = torch.zeros(b, 3, dtype=torch.float64, device=point.z.device)
        taken = torch.full((b,), -1, device=point.z.device)
        return _Memory(
            base=point.z,
            residual=point.residual,
            direction=torch.zeros_like(point.z),  # the first point ends a search of length zero
            value=zeros[:, 0] if point.value is None else point.value,
            noise=torch.full_like(zeros[:, 0], torch.inf if point.value is None else 0.0),
            search=zeros,
            bracket=zeros.new_zeros(b, 6),
            pairs=self._carried(point),
            taken=taken,
            probing=taken == 0,
            reach=torch.full_like(zeros[:, 0], torch.inf),
        )

    def propose(self, memory: _Memory, point: Point) -> Tensor:
        memory.absorbed += 1
        trial = self._trial(memory, point)
        start, step, trials = memory.search.unbind(dim=1)
        lower = trial.isfinite().all(dim=1) & (trial[:, 1] <= self.armijo * step * start)
        met = lower & (trial[:, 2].abs() <= -self.wolfe * start)
        accepted = ~memory.probing & (met | (lower & (trials + 1 >= self.max_trials)))
        failed = ~memory.probing & ~met & (trials + 1 == self.max_trials)
        begun = accepted | failed | memory.probing
        if not can_branch_on(trial) or not bool(begun.all()):
            self._narrow(memory, trial, lower)
        if not can_branch_on(trial) or bool(begun.any()):
            self._advance(memory, point, accepted, begun, failed)
        return torch.addcmul(memory.base, memory.search[:, 1:2].to(point.z.dtype), memory.direction)

    def inverse(self, memory: _Memory, step: Tensor) -> SecantInverse:
        return memory.pairs.inverse(step, scaled=self.scaled)

    @staticmethod
    def pairs_of(solution: Solution[Any]) -> tuple[Tensor, Tensor] | None:
        """Return the pairs behind the inverse of an L-BFGS solve, for the field `pairs` of another.

        Args:
            solution: of an L-BFGS solve.

        Returns:
            s and y, each `(B, k, D)`, oldest first and scaled to s.y = 1; samples with fewer than k begin with zeros.
            None if the solve took no steps.

        Raises:
            TypeError: the inverse is not one of L-BFGS.
        """
        if solution.inverse is None:
            return None
        found = []
        for rows, part in solution.inverse.parts:
            if not isinstance(part, SecantInverse):
                raise TypeError(f"pairs_of: the inverse must be that of an LBFGS solve, got {type(part).__name__}")
            found.append((rows, *part.pairs()))
        batch, count = solution.inverse.batch, max(s.shape[1] for _, s, _ in found)
        joined = found[0][1].new_zeros(2, batch, count, found[0][1].shape[2])
        for rows, s, y in found:
            joined[0, rows, count - s.shape[1] :] = s
            joined[1, rows, count - s.shape[1] :] = y
        return joined[0], joined[1]

    def _carried(self, point: Point) -> Pairs:
        """Return the memory of pairs at the first point, with those of an earlier solve."""
        if self.pairs is None:
            return Pairs.empty(point.z, max(1, min(self.memory, self.max_steps)))
        s, y = self.pairs
        b, size = point.z.shape
        if s.ndim != 3 or s.shape != y.shape or s.shape[::2] != (b, size):
            raise ValueError(
                f"LBFGS(pairs=...): s and y must be of shape ({b}, k, {size}), "
                f"got {tuple(s.shape)} and {tuple(y.shape)}"
            )
        count = s.shape[1]
        known = Pairs.empty(point.z, max(1, min(self.memory, self.max_steps + count)))
        for i in range(count):
            s_i, y_i = s[:, i].to(point.z), y[:, i].to(point.z)
            known.add(s_i, y_i, number=i + 1 - count, rows=point.running, min_curvature=self.min_curvature)
        return known

    @staticmethod
    def _trial(memory: _Memory, point: Point) -> Tensor:
        """Return step, change and slope of the objective along the direction of each row, `(b, 3)`."""
        start, step, _ = memory.search.unbind(dim=1)
        slope = -dots(point.residual, memory.direction)
        change = step * (start + slope) / 2
        if point.value is not None:
            difference = (point.value - memory.value).to(change.dtype)
            change = torch.where(difference.abs() <= memory.noise, change, difference)
        return torch.stack([step, change, slope], dim=1)

    @staticmethod
    def _narrow(memory: _Memory, trial: Tensor, lower: Tensor) -> None:
        """Narrow or extend the bracket by a rejected trial, and choose the next trial."""
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
        # Without a right end: the zero of the extrapolated slope.
        ahead = -slope / (slope - low[:, 2])
        ahead = torch.where(ahead > 0, ahead, torch.inf).clamp(1, 9) * (start - low[:, 0])
        step = start + torch.where(width.isfinite(), part * width, ahead)
        memory.search = torch.stack([memory.search[:, 0], step, trials], dim=1)

    def _advance(self, memory: _Memory, point: Point, accepted: Tensor, begun: Tensor, failed: Tensor) -> None:
        """Begin a new line search, from the accepted trial or, after the last trial, from the same base."""
        base = torch.where(accepted[:, None], point.z, memory.base)
        residual = torch.where(accepted[:, None], point.residual, memory.residual)
        there, answer = base, residual
        if self.outer_loss is not None:  # a probe adds a pair but does not move
            there = torch.where(memory.probing[:, None], point.z, base)
            answer = torch.where(memory.probing[:, None], point.residual, residual)
        step = there - memory.base
        memory.pairs.add(
            step, memory.residual - answer, number=memory.absorbed, rows=point.running, min_curvature=self.min_curvature
        )
        memory.base, memory.residual = base, residual
        if point.value is not None:
            memory.value = torch.where(accepted, point.value, memory.value)
            unit = NOISE * torch.finfo(point.value.dtype).eps
            memory.noise = torch.maximum(memory.noise, unit * memory.value.abs())
        inverse = self.inverse(memory, torch.full_like(memory.taken, NEVER - 1))
        direction = inverse.mv(residual)
        square, slope = dots(residual, residual), -dots(residual, direction)
        # A line search that fails on a smooth objective was misled by rounding: from then on it uses slopes alone. If
        # these fail, too, the direction is the gradient until a trial is lower.
        plain = (failed & ~accepted & memory.noise.isinf()) | ~(slope < 0)
        memory.noise = memory.noise.masked_fill(failed, torch.inf)
        # The scale along a bare gradient is unknown: no step is longer than one.
        unknown = plain | memory.pairs.none
        part = torch.where(unknown, square.rsqrt().clamp_max(1), 1.0)
        slope = torch.where(plain, -square, slope)
        direction = torch.where(plain[:, None], residual, direction)
        trials = torch.where(plain, float(self.max_trials), 0.0)
        zero, begun = torch.zeros_like(slope), begun[:, None]
        ends = torch.stack([zero, zero, slope, zero + torch.inf, zero, zero], dim=1)
        memory.bracket = torch.where(begun, ends, memory.bracket)
        memory.search = torch.where(begun, torch.stack([slope, part, trials], dim=1), memory.search)
        memory.direction = torch.where(begun, direction, memory.direction)
        memory.taken = memory.taken + accepted
        memory.probing = torch.zeros_like(memory.probing)
        if self.outer_loss is not None and self.outer_every is not None:
            due = accepted & point.running & ((memory.taken - 1) % self.outer_every == 0) & (memory.taken > 0)
            if not can_branch_on(due) or bool(due.any()):
                self._probe(memory, point, inverse, dots(step, step).sqrt(), due)

    def _probe(self, memory: _Memory, point: Point, inverse: SecantInverse, length: Tensor, due: Tensor) -> None:
        """Insert a probe, in rows in which it is `due`, before the line search from this point."""
        assert self.outer_loss is not None
        assert self.outer_every is not None
        direction = inverse.mv(point.loss_gradient(self.outer_loss))
        memory.reach = torch.where(due & memory.reach.isinf(), length, memory.reach)
        count = ((memory.taken - 1) // self.outer_every + 1).double()
        length = torch.minimum(length, memory.reach / count.square())
        scale = length / dots(direction, direction).sqrt()
        memory.probing = due & scale.isfinite() & (scale > 0)  # not if the outer gradient is zero or NaN
        probing = memory.probing[:, None]
        whole = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device=scale.device)
        memory.search = torch.where(probing, whole, memory.search)
        memory.direction = torch.where(probing, scale.to(direction.dtype)[:, None] * direction, memory.direction)
