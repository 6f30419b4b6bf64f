"""The DEQ layer: cell, solver, gradient and init in one module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.fixed_point import fixed_point
from equipoise.gradients import Gradient, Implicit
from equipoise.solution import Solution
from equipoise.solvers import Anderson, Solver


class DEQ(nn.Module):
    r"""Layer whose output is the equilibrium $z^* = f(z^*, x)$ of its cell.

    The layer remembers nothing between calls.

    Args:
        cell: module `f(z, *inputs) -> z`.
        solver: finds the equilibrium.
        gradient: how it is differentiated.
        init: module or function `(*inputs) -> z0`; None: zeros like the first input.

    Raises:
        TypeError: an argument is of another kind.

    Example:
        >>> import torch, equipoise as eq
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self, d):
        ...         super().__init__()
        ...         self.w, self.u = torch.nn.Linear(d, d, bias=False), torch.nn.Linear(d, d)
        ...     def forward(self, z, x):
        ...         return torch.tanh(0.5 * self.w(z) + self.u(x))
        >>> layer = eq.nn.DEQ(Cell(8), solver=eq.Broyden(), gradient=eq.Shine())
        >>> layer(torch.ones(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver = Anderson(),
        gradient: Gradient = Implicit(),
        init: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be a torch.nn.Module, got {type(cell).__name__}; for functions use fixed_point")
        self.cell = cell
        self.init = init
        self.solver = solver
        self.gradient = gradient
        self._check()

    def forward(self, *inputs: Any, z0: Any = None) -> Any:
        """The equilibrium, differentiable.

        Args:
            inputs: tensors (or containers of tensors) with the batch as first dimension.
            z0: start; None: what `init` gives.
        """
        return self.solve(*inputs, z0=z0).value

    def solve(self, *inputs: Any, z0: Any = None, trace: bool = False) -> Solution[Any]:
        """The equilibrium and all that the solve told about it; arguments as in `forward`.

        Args:
            inputs: as in `forward`.
            z0: as in `forward`.
            trace: record the residual of every evaluation.
        """
        if z0 is None:
            z0 = self._start(inputs)
        return fixed_point(self.cell, z0, *inputs, solver=self.solver, gradient=self.gradient, trace=trace)

    @contextlib.contextmanager
    def using(self, *, solver: Solver | None = None, gradient: Gradient | None = None) -> Iterator[DEQ]:
        """Within the block, another solver or gradient."""
        before = self.solver, self.gradient
        self.solver, self.gradient = solver or self.solver, gradient or self.gradient
        try:
            self._check()
            yield self
        finally:
            self.solver, self.gradient = before

    def extra_repr(self) -> str:
        return f"solver={self.solver}, gradient={self.gradient}"

    def _start(self, inputs: tuple[Any, ...]) -> Any:
        if self.init is not None:
            return self.init(*inputs)
        if not inputs or not isinstance(inputs[0], Tensor):
            raise ValueError(
                "DEQ(init=None) starts from zeros like its first input, which must be a tensor; pass init="
            )
        return torch.zeros_like(inputs[0])

    def _check(self) -> None:
        if self.init is not None and not callable(self.init):
            raise TypeError(
                f"init must be a module or a function (*inputs) -> z0, got {type(self.init).__name__}; "
                "pass a tensor in the call, layer(x, z0=...)"
            )
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a solver such as Anderson(), got {self.solver!r}")
        if not isinstance(self.gradient, Gradient):
            raise TypeError(f"gradient must be a gradient such as Implicit(), got {self.gradient!r}")
