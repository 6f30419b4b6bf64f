"""Layers of an MDEQ with a tight bound: blocks with constant 1, isometric resampling, a learned budget."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from equipoise.contraction import CappedConv2d, IsometricUpsample, LevelWeights, MaxMin, SLLBlock, lipschitz_bound
from equipoise.core.checks import check_ranges
from equipoise.zoo.mdeq import Contraction, MDEQShape, MDEQStem
from equipoise.zoo.mdeq.cell import Fusion, constants, zeros
from equipoise.zoo.mdeq.stem import conv1x1, conv3x3, initialize


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLLLayers(Contraction):
    r"""Residual blocks with constant 1, isometric resampling and a budget for the sum: a tight bound.

    $$ f_i(z) = \kappa \sum_j A_{ij} U_{ij}(\mathrm{SLL}_j(z_j; a_j)) + u_i, \qquad \|A\|_2 = 1, \quad
       \kappa = \bar\kappa\,\sigma(k) $$

    An explicit encoder, in which nothing is bounded, injects $u_i$ and $a_i$ at every level. $\kappa$ is learned below
    its ceiling, and the map contracts by $\kappa$ at least.

    Raises:
        ValueError: a field is out of range.

    Source: `docs/theory`; the blocks are those of A. Araujo et al. (2023).
    """

    allows_dropout: ClassVar[bool] = False

    ceiling: float = 0.9
    """Bound $\\bar\\kappa < 1$ of the budget."""
    start: float = 0.8
    """Share of the ceiling at which the budget starts, in (0, 1)."""
    exchange: float = 0.3
    """Share of the other levels in the sum before training, in [0, 1]."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "model.contraction.",
            ceiling="> 0 and < 1; with a budget of 1 or more the map need not contract",
            start="> 0 and < 1; it is a share of the ceiling",
            exchange=">= 0 and <= 1",
        )

    def constant(self, num_levels: int, *, dropout: float = 0.0) -> float:
        return self.ceiling

    def stem(self, shape: MDEQShape) -> nn.Module:
        return SLLEncoder(shape)

    def cell(self, shape: MDEQShape) -> nn.Module:
        return SLLCell(shape, self)


class SLLEncoder(nn.Module):
    r"""Encoder of images into injections at every level, $u_i$ to the sum and $a_i$ into the block.

    $$x_0 = \mathrm{stem}(x), \quad x_{i+1} = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{3 \times 3,
    \mathrm{stride}\,2}\, x_i)), \quad u_i = \mathrm{BN}(\mathrm{conv}_{1 \times 1} x_i), \quad
    a_i = \mathrm{BN}(\mathrm{conv}_{3 \times 3} x_i).$$

    It runs once per input, outside the fixed point, so nothing in it is bounded.

    Args:
        shape: shape of the model.
    """

    def __init__(self, shape: MDEQShape) -> None:
        super().__init__()
        self.stem = MDEQStem(shape)
        pairs = zip(shape.channels, shape.channels[1:], strict=False)
        self.downs = nn.ModuleList(
            nn.Sequential(conv3x3(fine, coarse, stride=2), nn.BatchNorm2d(coarse), nn.ReLU(inplace=True))
            for fine, coarse in pairs
        )
        self.outer = nn.ModuleList(nn.Sequential(conv1x1(c, c), nn.BatchNorm2d(c)) for c in shape.channels)
        self.inner = nn.ModuleList(
            nn.Sequential(conv3x3(c, shape.expansion * c), nn.BatchNorm2d(shape.expansion * c)) for c in shape.channels
        )
        initialize(self)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """`(B, image_channels, H, W)` to `u_i`, `(B, C_i, H_i, W_i)`, then `a_i`, `(B, expansion C_i, H_i, W_i)`."""
        features = [self.stem(images)]
        for down in self.downs:
            features.append(down(features[-1]))
        outer = tuple(layer(x) for layer, x in zip(self.outer, features, strict=True))
        return outer + tuple(layer(x) for layer, x in zip(self.inner, features, strict=True))


class Budget(nn.Module):
    r"""$\kappa y + u$ with a learned budget $\kappa = \bar\kappa \sigma(k)$, the same at every level.

    Args:
        layers: ceiling $\bar\kappa$ and start.
    """

    def __init__(self, layers: SLLLayers) -> None:
        super().__init__()
        self.ceiling = layers.ceiling
        self.logit = nn.Parameter(torch.tensor(math.log(layers.start / (1 - layers.start))))

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        """`(B, C, H, W), (B, C, H, W) -> (B, C, H, W)`."""
        return torch.addcmul(u, y, self.ceiling * torch.sigmoid(self.logit))

    def lipschitz_bound(self, training: bool) -> float:
        """Return the budget."""
        return self.ceiling * float(torch.sigmoid(self.logit.detach()))


class SLLCell(nn.Module):
    r"""Map of an MDEQ with `SLLLayers`, `f(z, u)`, on a tuple of levels.

    The paths between levels are isometric resampling and a capped 1x1 convolution with MaxMin.

    Args:
        shape: shape of the model.
        layers: budget and exchange.
    """

    def __init__(self, shape: MDEQShape, layers: SLLLayers) -> None:
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(SLLBlock(width, shape.expansion * width) for width in shape.channels)
        weights = LevelWeights(shape.num_levels, "learned", exchange=layers.exchange)
        self.fusion = Fusion(shape.num_levels, self._path, weights)
        self.budget = Budget(layers)

    def forward(self, z: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Evaluate the map.

        Args:
            z: one `(B, C_i, H_i, W_i)` per level, finest first.
            u: the injections that `SLLEncoder` returns.

        Returns:
            A tuple of the shapes of `z`.
        """
        outer, inner = u[: len(z)], u[len(z) :]
        b = tuple(block(level, a) for block, level, a in zip(self.blocks, z, inner, strict=True))
        return tuple(self.budget(y, v) for y, v in zip(self.fusion(b), outer, strict=True))

    def block_matrix(self, training: bool = False) -> Tensor:
        """Bounds of the influence of the levels on each other, as `MDEQCell.block_matrix`."""
        budget = lipschitz_bound(self.budget, training=training)
        return budget * self.fusion.block_matrix(training) * constants(self.blocks, training)

    def zeros(self, u: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the start of a solve: zeros at every level, for the batch and size of `u`."""
        return zeros(u[0], self.shape.channels)

    def _path(self, source: int, target: int) -> nn.Module:
        """Build the path from level `source` to another level, `target`, with constant 1."""
        start, end = self.shape.channels[source], self.shape.channels[target]
        if source > target:
            size = self.shape.level_shapes[source][1]
            convolution = CappedConv2d(start, end, 1, cap=1.0, size=size)
            return nn.Sequential(convolution, MaxMin(), IsometricUpsample(2 ** (source - target)))
        factor = 2 ** (target - source)
        convolution = CappedConv2d(start * factor**2, end, 1, cap=1.0, size=self.shape.level_shapes[target][1])
        return nn.Sequential(nn.PixelUnshuffle(factor), convolution, MaxMin())
