"""The solver protocol and the only loop: evaluate a point, judge it, let the solver propose the next one."""

import abc
import dataclasses
import numbers
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import InverseEstimate, LowRank, can_branch_on
from equipoise.core.map import Map, Point
from equipoise.core.solution import Solution, Status

NEVER = torch.iinfo(torch.int64).max  # number of an evaluation that no estimate includes
DIVERGED_AT = 1e8  # residual of a divergent sample, relative to the first
APART = 10.0  # largest residual of a best iterate with several blocks, relative to the first
RUNNING = -1  # status of a sample that has not stopped
STEPS_PER_READ = 8  # on devices, where reading a flag makes the host wait


def split_rows(memory: Any, keep: Tensor, gone: Tensor) -> tuple[Any, Any]:
    """Split a solver's memory into that of the rows that stay and of those that leave.

    Every tensor in it is split along its first dimension, also in nested dataclasses and tuples. Histories
    `(b, m, ...)` are sorted in place and split into views, so that they are never held twice.
    """
    if isinstance(memory, Tensor):
        if memory.ndim < 3:
            return memory[keep], memory[gone]
        order = torch.cat([keep, gone])
        for column in memory.unbind(dim=1):
            column.copy_(column[order])
        return memory[: len(keep)], memory[len(keep) :]
    if isinstance(memory, (tuple, list)):
        pairs = [split_rows(part, keep, gone) for part in memory]
        return type(memory)(stay for stay, _ in pairs), type(memory)(go for _, go in pairs)
    if dataclasses.is_dataclass(memory) and not isinstance(memory, type):
        names = [field.name for field in dataclasses.fields(memory)]
        pairs = [split_rows(getattr(memory, name), keep, gone) for name in names]
        return (
            dataclasses.replace(memory, **{name: stay for name, (stay, _) in zip(names, pairs, strict=True)}),
            dataclasses.replace(memory, **{name: go for name, (_, go) in zip(names, pairs, strict=True)}),
        )
    return memory, memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver(abc.ABC):
    r"""Solver of $z = f(z)$, one evaluation at a time; a subclass proposes the points.

    A sample stops when $\|f(z) - z\| \le \text{atol} + \text{rtol}\,\|f(z)\|$, in every block of the map, and its
    answer is the best iterate so far. The answer of a sample does not depend on the other samples of the batch.

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

    def tolerance(self, size: Tensor) -> Tensor:
        """Return the residual norm at which a sample stops, from the norm of its `f(z)`: `(b,) -> (b,)`."""
        return size * self.rtol + self.atol

    def measure(self, r: Tensor, fz: Tensor, blocks: tuple[int, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return residual norm, error in units of the tolerance (of the worst block), and if it is met, each `(b,)`."""
        if blocks is None:
            size = torch.linalg.vector_norm(r, dim=1)
            allowed = self.tolerance(torch.linalg.vector_norm(fz, dim=1))
            return size, self._error(size, allowed), size <= allowed
        sizes, images = (
            torch.stack([torch.linalg.vector_norm(part, dim=1) for part in x.split(blocks, dim=1)]) for x in (r, fz)
        )
        allowed = self.tolerance(images)
        size = torch.linalg.vector_norm(sizes, dim=0)
        # At a block of zeros the tolerance may be zero; one that stays there has converged.
        error = self._error(sizes, allowed.clamp_min(torch.finfo(allowed.dtype).tiny)).amax(dim=0)
        return size, error, (sizes <= allowed).all(dim=0)

    def _error(self, size: Tensor, allowed: Tensor) -> Tensor:
        # The least residual need not be the least error: the tolerance follows f(z) from point to point.
        return size if self.rtol == 0 and self.atol == 0 else size / allowed

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
        evals, vjps = f.counts.evals, f.counts.vjps
        on_host = can_branch_on(z0)
        tracing = torch.compiler.is_compiling()  # an exported solve runs all its steps and reads no flag
        with f.solve_context():
            z0 = f.project(z0)
            record = _Record(self, z0, trace, on_host)
            whole, z, memory, step = f, z0, None, 0
            point: Point | None = None
            for step in range(1, self.max_steps + 1):
                reads = on_host or (step % STEPS_PER_READ == 0 and not tracing)
                point = f.evaluate(z, record.rows, record.running, graph=self.uses_vjp)
                record.observe(point, step)
                if step == self.max_steps or (reads and record.all_done()):
                    break
                seen = _preconditioned(point, preconditioner)
                memory = self.init(seen) if memory is None else memory
                z = f.project(self.propose(memory, seen))
                point = None  # frees its states while rows leave and f is evaluated
                del seen
                if reads and f.droppable and record.half_done():
                    keep, memory = record.leave(memory)
                    f, z = f.select(keep), z[keep]
                    preconditioner = None if preconditioner is None else preconditioner.select(keep)
            absorbs = self.counted or (self.keeps_inverse and preconditioner is None)
            if absorbs and point is not None:
                point = _preconditioned(point, preconditioner)
                memory = self.init(point) if memory is None else memory
                self.propose(memory, point)  # absorbs the last point
        counts = whole.counts
        return record.solution(memory, whole, counts.evals - evals, counts.vjps - vjps, step)


def _preconditioned(point: Point, estimate: InverseEstimate | None) -> Point:
    """Return the point of the map `z + P (f(z) - z)`, `P` the estimate; without one, the point itself."""
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
        self.num_running = b  # current on the host only
        self.status = torch.full((b,), RUNNING, dtype=torch.int8, device=device)
        self.num_steps = torch.zeros(b, dtype=torch.int64, device=device)
        self.best_z = z0
        self.best_step = torch.zeros_like(self.num_steps)
        self.best_size = torch.full((b,), torch.inf, dtype=z0.dtype, device=device)
        self.best_error = torch.full_like(self.best_size, torch.inf)
        self.bound = self.limit = self.best_size
        self.failures = torch.zeros_like(self.num_steps)  # unsound points in a row
        self.left: list[tuple[Tensor, tuple[Tensor, ...], LowRank | None]] = []
        self.trace: list[Tensor] | None = [] if trace else None

    def observe(self, point: Point, step: int) -> None:
        """Update best iterates and statuses by a point; flags are read on the host only."""
        size, error, met = self.solver.measure(point.residual, point.fz, point.blocks)
        if step == 1:
            top = torch.finfo(size.dtype).max
            self.limit = torch.where(size.isfinite(), (size * DIVERGED_AT).clamp_max(top), torch.nan)
            # If an iteration blows up, so does f(z), and the error relative to it may fall: such a point is not better
            # than the start. The blocks of a joint state may move apart before they converge.
            self.bound = size if point.blocks is None else size * APART
        sound = size <= self.limit  # False for NaN, too
        converged = met & point.running & (size < torch.inf)  # an infinite residual meets an infinite tolerance
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

    def all_done(self) -> bool:
        return self.num_running == 0 if self.on_host else not bool(self.running.any())

    def half_done(self) -> bool:
        if not self.on_host:
            self.num_running = int(self.running.sum())
        return 0 < 2 * self.num_running <= self.rows.shape[0]

    def leave(self, memory: Any) -> tuple[Tensor, Any]:
        """Store the rows that stopped, with their inverse; return places and memory of the others."""
        gone, keep = (~self.running).nonzero()[:, 0], self.running.nonzero()[:, 0]
        memory, parted = split_rows(memory, keep, gone)
        results = tuple(x[gone] for x in (self.best_z, self.status, self.best_size, self.num_steps))
        results += self._statistics(parted, gone.shape[0])
        self.left.append((self.rows[gone], results, self._inverse(parted, self.best_step[gone])))
        for name in (
            "rows", "running", "status", "num_steps", "best_z", "best_step", "best_size", "best_error", "bound",
            "limit", "failures",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[keep])
        return keep, memory

    def _inverse(self, memory: Any, step: Tensor) -> LowRank | None:
        return self.solver.inverse(memory, step) if self.solver.keeps_inverse and memory is not None else None

    def _statistics(self, memory: Any, rows: int) -> tuple[Tensor, ...]:
        names = self.solver.counted
        return tuple(self.rows.new_zeros(rows) if memory is None else getattr(memory, name) for name in names)

    def solution(self, memory: Any, f: Map, evals: int, vjps: int, steps: int) -> Solution[Tensor]:
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
        return Solution(value, status, residual, num_steps, evals, vjps, estimate, trace, f, statistics=statistics)
