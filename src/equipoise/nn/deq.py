"""The DEQ layer: cell, solver, gradient and start in one module."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.core.checks import check_ranges
from equipoise.core.function_map import FunctionMap
from equipoise.core.solution import Solution
from equipoise.fixed_point import check_methods, solve_map
from equipoise.gradients import Gradient, Implicit
from equipoise.solvers import Anderson, Solver


class DEQ(nn.Module):
    r"""Deep equilibrium layer (DEQ): its output is the equilibrium $z^* = f(z^*, x)$ of its cell.

    The layer keeps no state between calls.

    Args:
        cell: module `f(z, *inputs) -> z`.
        solver: finds the equilibrium.
        gradient: differentiates it.
        init: module or function `(*inputs) -> z0`; None: zeros like the first input. A module that predicts the
            equilibrium makes a Skip DEQ, with `skip_penalty` to train it.
        explicit_steps: differentiable applications of the cell to that start, before the solve. One of them, with
            `skip_penalty`, makes a Skip Reg DEQ.
        coupled: as in `fixed_point`; or a function `(*inputs) -> (B,)` of group numbers.
        per_part: as in `fixed_point`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `explicit_steps` is negative.

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

    Source: Bai, Kolter and Koltun (2019); predictor and explicit step: Pal, Edelman and Rackauckas (2022), Skip DEQ and
    Skip Reg DEQ.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver = Anderson(),
        gradient: Gradient = Implicit(),
        init: Callable[..., Any] | None = None,
        explicit_steps: int = 0,
        coupled: bool | Tensor | Callable[..., Tensor] = False,
        per_part: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be a torch.nn.Module, got {type(cell).__name__}; for functions use fixed_point")
        self.cell = cell
        self.init = init
        self.explicit_steps = explicit_steps
        self.coupled, self.per_part = coupled, per_part
        self.solver = solver
        self.gradient = gradient
        self._check()

    def forward(self, *inputs: Any, z0: Any = None) -> Any:
        """Return the equilibrium, differentiable.

        Args:
            inputs: tensors (or containers of tensors) with the batch as first dimension.
            z0: start; None: that of `init`.
        """
        return self.solve(*inputs, z0=z0).value

    def solve(self, *inputs: Any, z0: Any = None, trace: bool = False) -> Solution[Any]:
        """Return the equilibrium and its convergence record.

        Args:
            inputs: as in `forward`.
            z0: as in `forward`.
            trace: record the residual of every evaluation.
        """
        if z0 is not None or self.init is None:
            return self._solve(self.start(*inputs) if z0 is None else z0, inputs, trace)
        z0 = self.start(*inputs)
        try:
            return self._solve(z0, inputs, trace)
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(self.init, nn.Module):
                error.add_note(f"init returned {_described(z0)}; it must return a state of the cell")
            raise

    def _solve(self, z0: Any, inputs: tuple[Any, ...], trace: bool) -> Solution[Any]:
        coupled = self.coupled(*inputs) if callable(self.coupled) else self.coupled
        f = FunctionMap(self.cell, z0, inputs, coupled=coupled, per_part=self.per_part)
        if not self.explicit_steps:
            return solve_map(f, z0, solver=self.solver, gradient=self.gradient, trace=trace)
        with f.solve_context(backward=True):  # the masks and weights of the solve, without updates of buffers
            start = f.pack(z0)
            for _ in range(self.explicit_steps):
                start = f.call(start)
        solution = solve_map(f, f.unpack(start), solver=self.solver, gradient=self.gradient, trace=trace)
        return dataclasses.replace(
            solution,
            num_steps=solution.num_steps + self.explicit_steps,
            num_evals=solution.num_evals + self.explicit_steps,
        )

    def start(self, *inputs: Any) -> Any:
        """Return the start of a solve, before explicit steps: that of `init`, or zeros like the first input.

        Args:
            inputs: as in `forward`.

        Raises:
            ValueError: there is no `init`, and the first input is no tensor.
        """
        if self.init is not None:
            return self.init(*inputs)
        if not inputs or not isinstance(inputs[0], Tensor):
            raise ValueError(
                "DEQ(init=None) starts from zeros like its first input, which must be a tensor; pass init="
            )
        return torch.zeros_like(inputs[0])

    @contextlib.contextmanager
    def using(self, *, solver: Solver | None = None, gradient: Gradient | None = None) -> Iterator[DEQ]:
        """Context with another solver or gradient.

        Args:
            solver: None: the layer's.
            gradient: None: the layer's; `Implicit()` where that takes the place of a solver, as `Reversible` does, and
                a solver is given.
        """
        before = self.solver, self.gradient
        if gradient is None and solver is not None and self.gradient.replaces_solver and solver.max_steps > 0:
            gradient = Implicit()
        self.solver, self.gradient = solver or self.solver, gradient or self.gradient
        try:
            self._check()
            yield self
        finally:
            self.solver, self.gradient = before

    def extra_repr(self) -> str:
        steps = f", explicit_steps={self.explicit_steps}" if self.explicit_steps else ""
        return f"solver={self.solver}, gradient={self.gradient}{steps}"

    def _check(self) -> None:
        if self.init is not None and not callable(self.init):
            raise TypeError(
                f"init must be a module or a function (*inputs) -> z0, got {type(self.init).__name__}; "
                "pass a tensor in the call, layer(x, z0=...)"
            )
        if isinstance(self.explicit_steps, bool) or not isinstance(self.explicit_steps, int):
            raise TypeError(f"explicit_steps must be an integer, got {self.explicit_steps!r}")
        check_ranges(self, explicit_steps=">= 0")
        check_methods(self.solver, self.gradient)


def _described(state: Any) -> str:
    """Return the shapes of a state, for a message."""
    if isinstance(state, Tensor):
        return f"a tensor {tuple(state.shape)}"
    if isinstance(state, (tuple, list)):
        return f"a {type(state).__name__} of {', '.join(map(_described, state))}"
    return f"a {type(state).__name__}"
