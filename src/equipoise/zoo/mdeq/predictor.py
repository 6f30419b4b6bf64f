"""Explicit guess of a multiscale equilibrium, where the solve of a Skip DEQ begins."""

import dataclasses

from torch import Tensor, nn

from equipoise.zoo.mdeq.cell import ResidualBlock
from equipoise.zoo.mdeq.config import MDEQShape
from equipoise.zoo.mdeq.stem import conv3x3, initialize


class MDEQPredictor(nn.Module):
    r"""Guess of the equilibrium at every level, from the injection.

    $$ z_{0,0} = \mathrm{block}(u), \qquad z_{0,i} = \mathrm{down}^i(u), $$

    with a residual block of expansion 3 without injection or dropout, and $i$ stride-2 3x3 convolutions, each with
    GroupNorm and ReLU, that double the width where this leads to that of level $i$, and else keep it until the last.

    Args:
        shape: shape of the model.

    Example:
        >>> import torch
        >>> from equipoise.zoo import MDEQConfig, MDEQPredictor
        >>> predictor = MDEQPredictor(MDEQConfig.cifar10_tiny())
        >>> sum(p.numel() for p in predictor.parameters())
        36672
        >>> [tuple(level.shape) for level in predictor(torch.randn(2, 24, 32, 32))]
        [(2, 24, 32, 32), (2, 24, 16, 16)]

    Source: Pal, Edelman and Rackauckas (2022), Skip DEQ; widths as in the released code, which has BatchNorm.
    """

    def __init__(self, shape: MDEQShape) -> None:
        super().__init__()
        self.block = ResidualBlock(0, dataclasses.replace(shape, expansion=3, dropout=0.0))
        self.downs = nn.ModuleList(_down(shape, level) for level in range(1, shape.num_levels))
        initialize(self)

    def forward(self, u: Tensor) -> tuple[Tensor, ...]:
        """`(B, C_0, H_0, W_0)` to one `(B, C_i, H_0 / 2^i, W_0 / 2^i)` per level."""
        return (self.block(u), *(down(u) for down in self.downs))


def _down(shape: MDEQShape, level: int) -> nn.Sequential:
    width, end = shape.channels[0], shape.channels[level]
    doubles = width * 2**level == end
    layers: list[nn.Module] = []
    for number in range(1, level + 1):
        following = 2 * width if doubles else end if number == level else width
        layers += [
            conv3x3(width, following, stride=2),
            nn.GroupNorm(shape.num_groups, following),
            nn.ReLU(inplace=True),
        ]
        width = following
    return nn.Sequential(*layers)
