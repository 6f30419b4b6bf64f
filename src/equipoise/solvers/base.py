"""The solver protocol and the only loop: evaluate a point, judge it, let the solver propose the next one."""

import abc
import dataclasses
import numbers
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.guards import COUPLED, RANDOM, refuse_coupling, refuse_randomness
from equipoise.core.linalg import InverseEstimate, LowRank, can_branch_on, safe_norms
from equipoise.core.map import Map, Point
from equipoise.core.solution import Solution, Status
from equipoise.solvers.rows import block_norms, split_rows

NEVER = torch.iinfo(torch.int64).max  # number of an evaluation that no estimate includes
DIVERGED_AT = 1e8  # residual of a divergent sample, relative to the first
APART = 10.0  # largest residual of a best iterate with several blocks, relative to the first
ROUNDING = 0.1  # part of the rounding between batches that a batch of the same size may have
RUNNING = -1  # status of a sample that has not stopped
STEPS_PER_READ = 8  # on devices, where reading a flag makes the host wait


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver(abc.ABC):
    r"""Solver of $z = f(z)$, one evaluation at a time; a subclass proposes the points.

    A sample stops when $\|f(z) - z\| \le \text{atol} + \text{rtol}\,\|f(z)\|$, in every block of the map, and its
    answer is the best iterate so far. The answer of a sample does not depend on the other samples of the batch.

    A tolerance that grows with $f(z)$ may be met although no residual ever fell, as by $f(z) = z + 1$. After the first
    evaluation, a sample has therefore CONVERGED only if its residual and the rounding of $f(z)$ are at most half of the
    first residual, or at most the tolerance at $\|f(z)\| = 10 \max(\|z_0\|, \|f(z_0)\|)$.

    Args:
        max_steps: largest number of evaluations per sample; 0 returns the start.
        rtol: tolerance relative to the norm of f(z).
        atol: absolute tolerance.
        patience: a sample is STALLED after so many evaluations without a better point; None: never.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range.
    """

    max_steps: int = 30
    rtol: float = 1e-3
    atol: float = 0.0
    patience: int | None = None

    uses_vjp: ClassVar[bool] = False  # points must keep their graphs
    keeps_inverse: ClassVar[bool] = False  # `inverse` returns an estimate
    supports_projection: ClassVar[bool] = True  # a proposed point may be projected
    counted: ClassVar[tuple[str, ...]] = ()  # fields of the memory, (b,) int64, for `Solution.statistics`
    retries: ClassVar[int] = 0  # non-finite or blown-up points in a row from which the solver recovers

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            kind, _, optional = getattr(option.type, "__name__", str(option.type)).partition(" | ")
            wanted = {"int": numbers.Integral, "float": numbers.Real}.get(kind)
            if wanted is None or (optional and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, wanted):
                needs = ("an integer" if kind == "int" else "a number") + (" or None" if optional else "")
                raise TypeError(f"{type(self).__name__}({option.name}={value!r}): must be {needs}")
        check_ranges(self, max_steps=">= 0", patience=">= 1, or None to wait until max_steps")
        check_ranges(self, **dict.fromkeys(("rtol", "atol"), ">= 0; with both at 0 all max_steps are used"))

    @abc.abstractmethod
    def init(self, point: Point) -> Any:
        """Return the memory of a new solve at its first point: a dataclass whose tensors are all `(b, ...)`."""

    @abc.abstractmethod
    def propose(self, memory: Any, point: Point) -> Tensor:
        """Absorb a point into the memory and return the next one to evaluate, `(b, D)`."""

    def inverse(self, memory: Any, step: Tensor) -> LowRank | None:
        """Return the estimate of `(I - J)^{-1}` as it stood after evaluation number `step` of each sample, `(b,)`."""
        return None

    @property
    def unlimited(self) -> bool:
        """Whether no tolerance ends a solve."""
        return self.rtol == 0 and self.atol == 0

    def tolerance(self, size: Tensor) -> Tensor:
        """Return the residual norm at which a sample stops, from the norm of its `f(z)`: `(b,) -> (b,)`."""
        return size * self.rtol + self.atol

    def within(self, r: Tensor, fz: Tensor, blocks: tuple[int, ...] | None) -> Tensor:
        """Return whether a residual meets the tolerance, in every block, `(b,)`."""
        met = block_norms(r, blocks) <= self.tolerance(block_norms(fz, blocks))
        return met if blocks is None else met.all(dim=1)

    @torch.no_grad()
    def solve(
        self, f: Map, z0: Tensor, *, preconditioner: InverseEstimate | None = None, trace: bool = False
    ) -> Solution[Tensor]:
        r"""Solve `z = f(z)` from the flat start `z0`.

        Args:
            f: the map on flat states.
            z0: `(B, D)` start.
            preconditioner: $P$, an estimate of $(I - J)^{-1}$. The solver gets the points of $z + P (f(z) - z)$;
                samples are still judged by the residual of `f`.
            trace: record the residual of every evaluation.

        Returns:
            The solution with a flat `(B, D)` value.
        """
        if f.projected and not self.supports_projection:
            raise ValueError(f"{type(self).__name__} cannot follow a projected map; use Anderson or Picard")
        if torch.is_inference_mode_enabled():  # tensors made there have no version counters
            with torch.inference_mode(False), torch.no_grad():
                return self._solve(f, z0, preconditioner, trace)
        return self._solve(f, z0, preconditioner, trace)

    def _solve(self, f: Map, z0: Tensor, preconditioner: InverseEstimate | None, trace: bool) -> Solution[Tensor]:
        evals, vjps = f.counts.evals, f.counts.vjps
        on_host = can_branch_on(z0)
        tracing = torch.compiler.is_compiling()  # an exported solve runs all its steps and reads no flag
        with f.solve_context():
            watch = None if tracing else f.watch()
            z0 = f.project(z0)
            record = _Record(self, z0, trace, on_host)
            whole, z, memory, step = f, z0, None, 0
            point: Point | None = None
            scale: Tensor | None = None
            for step in range(1, self.max_steps + 1):
                reads = on_host or (step % STEPS_PER_READ == 0 and not tracing)
                point = f.evaluate(z, record.rows, record.running, graph=self.uses_vjp)
                record.observe(point, step)
                if step == 1:
                    scale = record.unit()
                if reads:
                    record.read()
                    if step > 1:  # the start may be zeros, which hide that rows depend on each other
                        record.check_mates(point)
                if step == self.max_steps or (reads and record.num_running == 0):
                    break
                seen = _seen(point, preconditioner, scale)
                memory = self.init(seen) if memory is None else memory
                z = self.propose(memory, seen)
                z = f.project(z if scale is None else z * scale)
                point = None  # frees its states while rows leave and f is evaluated
                del seen
                if reads and record.apart and 2 * record.num_running <= z.shape[0]:
                    keep, memory = record.leave(memory)
                    f, z = f.select(keep), z[keep]
                    preconditioner = None if preconditioner is None else preconditioner.select(keep)
                    scale = None if scale is None else scale[keep]
            if watch is not None and point is not None:
                refuse_randomness(watch, point)
            absorbs = self.counted or (self.keeps_inverse and preconditioner is None)
            if absorbs and point is not None:
                point = _seen(point, preconditioner, scale)
                memory = self.init(point) if memory is None else memory
                self.propose(memory, point)  # absorbs the last point
            solution = record.solution(memory, whole, step)
            if not tracing and point is not None:
                solution = record.verified(whole, solution)
        counts = whole.counts
        return dataclasses.replace(solution, num_evals=counts.evals - evals, num_vjps=counts.vjps - vjps)


def _seen(point: Point, estimate: InverseEstimate | None, scale: Tensor | None) -> Point:
    """Return a point as the solver sees it: in other units, of the map `z + P (f(z) - z)` with an estimate P."""
    if scale is not None:
        z, fz, r = (x / scale for x in (point.z, point.fz, point.residual))
        value = None if point.value is None else point.value / scale[:, 0].square()
        point = dataclasses.replace(point, z=z, fz=fz, residual=r, value=value, scale=scale)
    if estimate is None:
        return point
    r = estimate.mv(point.residual)

    def pullback(v: Tensor) -> Tensor:
        w = estimate.rmv(v)
        return v - w + point.vjp(w)

    return dataclasses.replace(point, fz=point.z + r, residual=r, unpreconditioned=point.residual, pullback=pullback)


class _Record:
    """Statuses, best iterates and counts of the rows in the batch, and results of those that left."""

    def __init__(self, solver: Solver, z0: Tensor, trace: bool, on_host: bool) -> None:
        b, device = z0.shape[0], z0.device
        self.solver, self.batch, self.on_host = solver, b, on_host
        self.rows = torch.arange(b, device=device)
        self.running = torch.ones(b, dtype=torch.bool, device=device)
        self.num_running = b  # on a device that of the last read
        self.apart: bool | None = None  # whether rows can be evaluated apart, once it is known
        self.status = torch.full((b,), RUNNING, dtype=torch.int8, device=device)
        self.num_steps = torch.zeros(b, dtype=torch.int64, device=device)
        self.best_z = z0
        self.best_step = torch.zeros_like(self.num_steps)
        self.best_size = torch.full((b,), torch.inf, dtype=z0.dtype, device=device)
        self.best_error = torch.full_like(self.best_size, torch.inf)
        self.bound = self.limit = self.best_size
        self.bar = torch.full_like(self.best_size, torch.finfo(z0.dtype).max)
        self.failures = torch.zeros_like(self.num_steps)  # unsound points in a row
        self.left: list[tuple[Tensor, tuple[Tensor, ...], LowRank | None]] = []
        self.trace: list[Tensor] | None = [] if trace else None

    def observe(self, point: Point, step: int) -> None:
        """Update best iterates and statuses by a point; flags are read on the host only."""
        sizes, images = self._norms(point)
        allowed = self.solver.tolerance(images)
        if step == 1:
            # A residual that never falls may meet a tolerance that grows with f(z): see `Solver`.
            cap = 10 * torch.maximum(images, block_norms(point.z, point.blocks, safe_norms))
            self.bar = torch.maximum(sizes / 2, self.solver.tolerance(cap)).clamp_max(torch.finfo(sizes.dtype).max)
            self.first = torch.maximum(sizes, images)
            met = (sizes <= allowed) & (sizes < torch.inf)
        else:
            if point.blocks is not None:
                # A block may rest until others have moved; one that goes to zero ends where it is rounded.
                self.bar = torch.maximum(self.bar, sizes / 2).nan_to_num(nan=0.0)
                allowed = torch.maximum(allowed, self.bar * torch.finfo(sizes.dtype).eps)
            met = sizes <= torch.minimum(allowed, self.bar)
        if point.blocks is None:
            size, error = sizes, sizes if self.solver.unlimited else sizes / allowed
        else:
            size = torch.linalg.vector_norm(sizes, dim=1)
            # At a block of zeros the tolerance may be zero; one that stays there has converged.
            floor = torch.finfo(allowed.dtype).tiny
            error = (sizes if self.solver.unlimited else sizes / allowed.clamp_min(floor)).amax(dim=1)
            met = met.all(dim=1)
        if step == 1:
            top = torch.finfo(size.dtype).max
            self.limit = torch.where(size.isfinite(), (size * DIVERGED_AT).clamp_max(top), torch.nan)
            # If an iteration blows up, so does f(z), and the error relative to it may fall: such a point is not better
            # than the start. The blocks of a joint state may move apart before they converge.
            self.bound = size if point.blocks is None else size * APART
        sound = size <= self.limit  # False for NaN, too
        converged = met & point.running
        better = (error < self.best_error) & (size <= self.bound) & point.running | converged
        if step == 1:
            better |= sound
        self._keep(point, step, better, size, error)
        if self.trace is not None:
            line = torch.full((self.batch,), torch.nan, dtype=size.dtype, device=size.device)
            self.trace.append(line.index_copy(0, point.rows, torch.where(point.running, size, torch.nan)))

        stopped = converged
        if not (self.on_host and bool(sound.all())):
            stopped = stopped | self._fail(point, step, size, sound)
        elif self.solver.retries:
            self.failures = torch.zeros_like(self.failures)
        if self.solver.patience is not None:
            stalled = point.running & ~stopped & (step - self.best_step >= self.solver.patience)
            self.status = self.status.masked_fill(stalled, Status.STALLED)
            stopped = stopped | stalled
        if not (self.on_host and not bool(stopped.any())):
            if step > 1:  # a residual says nothing where the rounding of f(z) is as large
                known = images * (10 * torch.finfo(sizes.dtype).eps) <= self.bar
                unknown = converged & ~(known if point.blocks is None else known.all(dim=1))
                converged, stopped = converged & ~unknown, stopped & ~unknown
            self.status = self.status.masked_fill(converged, Status.CONVERGED)
            self.num_steps = self.num_steps.masked_fill(stopped, step)
            self.running = point.running & ~stopped
            if self.on_host:
                self.num_running = int(self.running.sum())

    def _keep(self, point: Point, step: int, better: Tensor, size: Tensor, error: Tensor) -> None:
        count = int(better.sum()) if self.on_host else -1
        if self.on_host and count == better.shape[0]:
            # Points are never written to again, so the best iterates can be the point itself instead of a copy.
            self.best_z, self.best_size, self.best_error = point.z, size, error
            self.best_step = torch.full_like(self.best_step, step)
        elif count != 0:
            self.best_z = torch.where(better[:, None], point.z, self.best_z)
            self.best_size = torch.where(better, size, self.best_size)
            self.best_error = torch.where(better, error, self.best_error)
            self.best_step = self.best_step.masked_fill(better, step)

    def _fail(self, point: Point, step: int, size: Tensor, sound: Tensor) -> Tensor:
        """Stop the rows that are unsound too often in a row; the last point decides their status."""
        self.failures = torch.where(sound, 0, self.failures + 1)
        failed = point.running & (self.failures > (self.solver.retries if step > 1 else 0))
        finite = size.isfinite()
        self.status = self.status.masked_fill(failed & ~finite, Status.NONFINITE)
        self.status = self.status.masked_fill(failed & finite, Status.DIVERGED)
        return failed

    def _norms(self, point: Point) -> tuple[Tensor, Tensor]:
        """Return the norms of residual and value, `(b,)` or `(b, k)` for `k` blocks, in the dtype of the state."""
        vectors, blocks = (point.residual, point.fz), point.blocks
        if not self.on_host:
            sizes, images = (block_norms(x, blocks, safe_norms) for x in vectors)
            return sizes, images
        sizes, images = (block_norms(x, blocks) for x in vectors)
        info = torch.finfo(sizes.dtype)
        least = info.tiny**0.5 / info.eps  # below, squares of entries that count are subnormal
        if not (float(sizes.min()) >= least and float(images.max()) <= info.max):
            sizes, images = (
                torch.where((norm >= least) & (norm <= info.max), norm, block_norms(x, blocks, safe_norms))
                for x, norm in zip(vectors, (sizes, images), strict=True)
            )
        return sizes, images

    def unit(self) -> Tensor | None:
        """Return units `(b, 1)` in which the first point has usual numbers; None if it has them as it is."""
        if not self.on_host:
            return None
        size = self.first.amax(dim=1) if self.first.ndim == 2 else self.first
        info = torch.finfo(size.dtype)
        extreme = (size > 0) & ((size < info.tiny ** (1 / 3)) | (size > info.max ** (1 / 3))) & (size < torch.inf)
        if not bool(extreme.any()):
            return None
        return torch.where(extreme, torch.exp2(torch.log2(size.to(torch.float64)).round()).to(size.dtype), 1.0)[:, None]

    def read(self) -> None:
        """Read how many rows are running, which makes the host wait for a device."""
        if not self.on_host:
            self.num_running = int(self.running.sum())

    def check_mates(self, point: Point) -> None:
        """Raise if rows depend on each other, once some of them are finished before others."""
        if self.apart is not None or not point.map.droppable or self.num_running == self.rows.shape[0]:
            return
        late = self.running if self.num_running else self.num_steps == self.num_steps.max()
        if not bool(late.all()):  # else one point finished all rows
            self.apart = refuse_coupling(point, late.nonzero()[-1, 0])

    def verified(self, f: Map, solution: Solution[Tensor]) -> Solution[Tensor]:
        """Evaluate rows that cannot be evaluated apart once, together, at the returned values.

        Raises:
            ValueError: the residual of a converged row is another one there. On a device its status is STALLED.
        """
        if self.batch == 1 or self.apart or (self.apart is None and f.droppable and self.on_host):
            return solution
        converged = solution.converged
        if self.on_host and not (bool(converged.any()) and bool((self.best_step != self.best_step[0]).any())):
            return solution
        with f.uncounted():
            point = f.evaluate(solution.value, self.rows, self.running)
        sizes, images = self._norms(point)
        allowed = torch.minimum(self.solver.tolerance(images), self.bar)
        size = sizes if point.blocks is None else torch.linalg.vector_norm(sizes, dim=1)
        met = (sizes <= 1.001 * allowed).reshape(self.batch, -1).all(dim=1)
        scale = torch.linalg.vector_norm(point.fz, dim=1) + torch.linalg.vector_norm(point.z, dim=1)
        same = (size - solution.residual).abs() <= ROUNDING * f.rounding(size.dtype) * scale
        wrong = converged & ~(met | same)
        if not self.on_host:
            return dataclasses.replace(solution, status=solution.status.masked_fill(wrong, Status.STALLED))
        if bool(wrong.any()):
            with f.uncounted():
                raise ValueError(COUPLED if torch.equal(f.call(point.z), point.fz) else RANDOM)
        return solution

    def leave(self, memory: Any) -> tuple[Tensor, Any]:
        """Store the rows that stopped, with their inverse; return places and memory of the others."""
        gone, keep = (~self.running).nonzero()[:, 0], self.running.nonzero()[:, 0]
        memory, parted = split_rows(memory, keep, gone)
        results = tuple(x[gone] for x in (self.best_z, self.status, self.best_size, self.num_steps))
        results += self._statistics(parted, gone.shape[0])
        self.left.append((self.rows[gone], results, self._inverse(parted, self.best_step[gone])))
        for name in (
            "rows", "running", "status", "num_steps", "best_z", "best_step", "best_size", "best_error", "bound",
            "limit", "bar", "failures",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[keep])
        return keep, memory

    def _inverse(self, memory: Any, step: Tensor) -> LowRank | None:
        return self.solver.inverse(memory, step) if self.solver.keeps_inverse and memory is not None else None

    def _statistics(self, memory: Any, rows: int) -> tuple[Tensor, ...]:
        names = self.solver.counted
        return tuple(self.rows.new_zeros(rows) if memory is None else getattr(memory, name) for name in names)

    def solution(self, memory: Any, f: Map, steps: int) -> Solution[Tensor]:
        """Join the rows in their original order."""
        open_ = self.status == RUNNING
        self.status = self.status.masked_fill(open_, Status.MAX_STEPS)
        self.num_steps = self.num_steps.masked_fill(open_, steps)
        results: tuple[Tensor, ...] = (self.best_z, self.status, self.best_size, self.num_steps)
        results += self._statistics(memory, self.rows.shape[0])
        parts = [(self.rows, results, self._inverse(memory, self.best_step)), *self.left]
        inverse = tuple((rows, estimate) for rows, _, estimate in parts if estimate is not None)
        if self.left:
            order = torch.argsort(torch.cat([rows for rows, _, _ in parts]))
            results = tuple(torch.cat(column)[order] for column in zip(*(part[1] for part in parts), strict=True))
        value, status, residual, num_steps, *counts = results
        trace = (
            None if self.trace is None else torch.stack(self.trace) if self.trace else value.new_zeros(0, self.batch)
        )
        estimate = InverseEstimate(inverse, self.batch) if inverse else None
        statistics = dict(zip(self.solver.counted, counts, strict=True))
        return Solution(value, status, residual, num_steps, 0, 0, estimate, trace, f, statistics=statistics)
