"""The cells on which solver cost is measured: a dense, a convolutional and a multiscale one, from a fixed seed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 0


class TanhCell(nn.Module):
    """`tanh(W z + u)` with `u = U x + b`."""

    def __init__(self, d: int = 512, gain: float = 1.25) -> None:
        super().__init__()
        self.W = nn.Parameter(gain * torch.randn(d, d) / d**0.5)
        self.U = nn.Parameter(torch.randn(d, d) / d**0.5)
        self.b = nn.Parameter(0.1 * torch.randn(d))

    def inject(self, x: Tensor) -> Tensor:
        return F.linear(x, self.U, self.b)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(F.linear(z, self.W) + u)


class ConvCell(nn.Module):
    """Residual block `GN(relu(z + GN(u + conv2(GN(relu(conv1 z))))))`; spectral radius about 0.92."""

    def __init__(self, c: int = 32, groups: int = 8, gain: float = 1.0) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.c2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.n1, self.n2, self.n3 = (nn.GroupNorm(groups, c) for _ in range(3))
        self.inj = nn.Conv2d(c, c, 1)
        with torch.no_grad():
            for conv in (self.c1, self.c2):
                conv.weight.normal_(0, gain * (2.0 / (9 * c)) ** 0.5)
            self.c2.weight.mul_(0.2)

    def inject(self, x: Tensor) -> Tensor:
        return self.inj(x)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        y = self.n1(F.relu(self.c1(z)))
        return self.n3(F.relu(z + self.n2(u + self.c2(y))))


class MultiscaleCell(nn.Module):
    """Two resolutions, a residual block each, then cross-scale fusion; spectral radius about 0.84."""

    def __init__(self, c: tuple[int, int] = (32, 64)) -> None:
        super().__init__()
        self.b0, self.b1 = ConvCell(c[0]), ConvCell(c[1])
        self.down = nn.Conv2d(c[0], c[1], 3, stride=2, padding=1, bias=False)
        self.up = nn.Conv2d(c[1], c[0], 1, bias=False)
        self.g0, self.g1 = nn.GroupNorm(8, c[0]), nn.GroupNorm(8, c[1])
        with torch.no_grad():
            self.down.weight.mul_(0.1)
            self.up.weight.mul_(0.1)
            self.b0.c2.weight.mul_(0.3)
            self.b1.c2.weight.mul_(0.3)

    def inject(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b0.inj(x), self.b1.inj(F.avg_pool2d(torch.cat([x, x.flip(1)], 1), 2))

    def forward(self, z: tuple[Tensor, Tensor], u: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y0, y1 = self.b0(z[0], u[0]), self.b1(z[1], u[1])
        o0 = self.g0(y0 + F.interpolate(self.up(y1), scale_factor=2, mode="nearest"))
        return o0, self.g1(y1 + self.down(y0))


CELLS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "tanh": (TanhCell, (64, 512)),
    "conv": (ConvCell, (16, 32, 32, 32)),
    "multiscale": (MultiscaleCell, (4, 32, 32, 32)),
}
"""Class of each cell, and shape of its input, which is that of the state, or of its finest level."""


def problem(name: str) -> tuple[nn.Module, Any, Any]:
    """Cell, input and start of a name in `CELLS`."""
    torch.manual_seed(SEED)
    make, shape = CELLS[name]
    cell, x = make(), torch.randn(shape)
    z0 = torch.zeros(shape)
    return cell, x, (z0, torch.zeros(4, 64, 16, 16)) if name == "multiscale" else z0
