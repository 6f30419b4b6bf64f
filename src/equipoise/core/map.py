"""The map protocol: what a solver needs of a map, and the result of one evaluation."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False, slots=True)
class Counts:
    """Calls made so far, shared by a map and its selections."""

    evals: int = 0
    vjps: int = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose calls are not counted: those of checks."""
        before = self.evals, self.vjps
        try:
            yield
        finally:
            self.evals, self.vjps = before


@dataclasses.dataclass(eq=False, slots=True)
class Point:
    """Result of one evaluation. Its tensors are never written to again.

    Attributes:
        z: `(b, D)` argument of the map.
        fz: `(b, D)` value of the map.
        residual: `(b, D)` the residual `f(z) - z`; in a preconditioned solve, that of the preconditioned map.
        rows: `(b,)` numbers of these rows in the original batch.
        running: `(b,)` mask of rows that had not stopped before this point.
        map: the map that was evaluated.
        value: `(b,)` objective at `z` if the map is a descent map, else None.
        pullback: `v -> J^T v` on the kept graph; None without a graph.
        unpreconditioned: `(b, D)` the residual of the map itself in a preconditioned solve, else None.
        scale: `(b, 1)` unit in which `z`, `fz` and the residuals are measured where squares of them would under- or
            overflow, else None.
    """

    z: Tensor
    fz: Tensor
    residual: Tensor
    rows: Tensor
    running: Tensor
    map: Map
    value: Tensor | None = None
    pullback: Callable[[Tensor], Tensor] | None = None
    unpreconditioned: Tensor | None = None
    scale: Tensor | None = None

    @property
    def true_residual(self) -> Tensor:
        """The residual of the map itself, by which samples are judged."""
        return self.residual if self.unpreconditioned is None else self.unpreconditioned

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """Sizes of the parts of the state that converge separately; None for one."""
        return self.map.blocks

    def vjp(self, v: Tensor) -> Tensor:
        """Return `J^T v` at this point, `(b, D) -> (b, D)`; the solver must declare `uses_vjp`."""
        if self.pullback is None:
            raise RuntimeError("this point kept no graph: a solver that calls vjp must set uses_vjp = True")
        return self.pullback(v)

    def loss_gradient(self, loss: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """Return the gradient `(b, D)` of `loss(z, rows) -> (b,)`, `z` in the structure of the caller's state."""
        return self.map.loss_gradient(loss, self.z if self.scale is None else self.z * self.scale, self.rows)


class Map(abc.ABC):
    """A map of flat states `(b, D)`, as solvers use it. Subclasses implement `call` and `select`.

    Args:
        counts: shared with the maps that this one is made of; None: new ones.
        droppable: whether rows may leave the batch as they converge, by `select`.
        blocks: sizes of consecutive parts of the flat state that must converge separately; None: one block.
        precision: dtype in which the map computes, if it is coarser than that of the flat states; None: that one.
    """

    def __init__(
        self,
        counts: Counts | None = None,
        *,
        droppable: bool = False,
        blocks: tuple[int, ...] | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        self.counts = Counts() if counts is None else counts
        self.droppable, self.blocks, self.precision = droppable, blocks, precision

    def uncounted(self) -> contextlib.AbstractContextManager[None]:
        """Return a context whose calls are not counted."""
        return self.counts.paused()

    @property
    def copies_rows(self) -> bool:
        """Whether `select` may name a row twice."""
        return True

    @abc.abstractmethod
    def call(self, z: Tensor) -> Tensor:
        """Return the value of the map, `(b, D) -> (b, D)`, in the caller's grad mode; it is counted."""

    @abc.abstractmethod
    def select(self, index: Tensor) -> Map:
        """Return the same map for some of its rows; it shares the counts."""

    def evaluate(self, z: Tensor, rows: Tensor, running: Tensor, *, graph: bool = False) -> Point:
        """Evaluate once, without tracking; with `graph` the point offers products with `J^T`."""
        if graph:
            raise ValueError(f"{type(self).__name__} keeps no graph: use a solver without vjp")
        fz = self.call(z)
        return Point(z, fz, fz - z, rows, running, self)

    def loss_gradient(self, loss: Callable[[Any, Tensor], Tensor], z: Tensor, rows: Tensor) -> Tensor:
        """Return the gradient `(b, D)` of an outer loss of the state, `loss(z, rows) -> (b,)`."""
        raise RuntimeError(f"{type(self).__name__} has flat states only, and no outer loss")

    def rounding(self, dtype: torch.dtype) -> float:
        """Return the relative difference that two evaluations of states of a dtype may have, in different batches."""
        return float(torch.finfo(self.precision or dtype).eps ** 0.6)

    @property
    def projected(self) -> bool:
        """Whether there is a feasible set, so that iterates must be projected."""
        return False

    def project(self, z: Tensor) -> Tensor:
        """Project a state onto the feasible set."""
        return z

    def watch(self) -> Any:
        """Return a watch on the random generators that an evaluation may draw from; None: it cannot draw."""
        return None

    def solve_context(self, *, backward: bool = False) -> contextlib.AbstractContextManager[None]:
        """Return the context of all evaluations of one solve."""
        return contextlib.nullcontext()
