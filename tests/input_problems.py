"""Problems of input optimization with known answers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import equipoise as eq

METHOD = {field.name for field in dataclasses.fields(eq.inputs.InputOptimizer)}


def optimize(cell: Callable[..., Any], **options: Any) -> eq.inputs.InputSolution:
    """Optimize inputs; options are arguments of `optimize_inputs` and fields of `InputOptimizer`."""
    method = {name: options.pop(name) for name in METHOD & options.keys()}
    return eq.optimize_inputs(cell, **options, optimizer=eq.inputs.InputOptimizer(**method))


class Cell(nn.Module):
    """`act(z W^T + x U^T + b)`, `W` scaled to a norm."""

    def __init__(self, n: int, p: int, norm: float, *, linear: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        weight = torch.randn(n, n, generator=generator)
        self.w = nn.Parameter(weight * norm / torch.linalg.matrix_norm(weight, 2))
        self.u = nn.Parameter(torch.randn(n, p, generator=generator) / p**0.5)
        self.b = nn.Parameter(0.3 * torch.randn(n, generator=generator))
        self.linear = linear

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        out = z @ self.w.T + x @ self.u.T + self.b
        return out if self.linear else torch.tanh(out)

    @property
    def gain(self) -> Tensor:
        """`(I - W)^{-1}`, for a linear cell."""
        return torch.linalg.inv(torch.eye(len(self.w)) - self.w.detach())


class Fit(nn.Module):
    """`|C z - y|^2 / 2 + rho |x|^2 / 2`."""

    def __init__(self, n: int, m: int, rho: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.randn(m, n, generator=torch.Generator().manual_seed(8)) / n**0.5)
        self.rho = rho

    def forward(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z @ self.c.T - y).square().sum(1) + 0.5 * self.rho * x.square().sum(1)


@dataclasses.dataclass
class Fitting:
    """A cell, a cost, and starts and targets of some rows."""

    cell: Cell
    cost: Fit
    y: Tensor

    @property
    def arguments(self) -> dict[str, Any]:
        rows, (n, p) = len(self.y), self.cell.u.shape
        return {
            "z0": torch.zeros(rows, n),
            "x0": torch.zeros(rows, p),
            "cost": self.cost,
            "targets": (self.y,),
        }

    def solve(self, cell: Callable[..., Any] | None = None, **options: Any) -> eq.inputs.InputSolution:
        """Optimize the inputs, with other options or another cell."""
        return optimize(cell or self.cell, **self.arguments | options)


def fitting(
    n: int = 12, p: int = 4, rows: int = 3, norm: float = 0.8, rho: float = 0.1, *, linear: bool = False
) -> Fitting:
    y = torch.randn(rows, n // 2, generator=torch.Generator().manual_seed(9))
    return Fitting(Cell(n, p, norm, linear=linear), Fit(n, n // 2, rho), y)
