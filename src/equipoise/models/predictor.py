"""The explicit guess of a multiscale equilibrium, with which a Skip DEQ begins."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.models.config import MDEQConfig
from equipoise.models.mdeq import ResidualBlock, conv3x3, initialize


class MDEQPredictor(nn.Module):
    r"""From the injection to a guess of the equilibrium at every level.

    $$ z_{0,0} = \mathrm{block}(u), \qquad z_{0,i} = \mathrm{down}^i(u), $$

    with a residual block of expansion 3 without injection or dropout, and $i$ stride-2 3x3 convolutions, each with
    GroupNorm and ReLU, that double the width where this leads to that of level $i$, and else keep it until the last.

    Args:
        config: shape of the model.
        weight_norm: whether the convolutions of the block are weight-normalised, as those of the map.

    Example:
        >>> import torch
        >>> from equipoise.models import MDEQConfig, MDEQPredictor
        >>> predictor = MDEQPredictor(MDEQConfig.cifar10_tiny(), weight_norm=False)
        >>> sum(p.numel() for p in predictor.parameters())
        36576
        >>> [tuple(level.shape) for level in predictor(torch.randn(2, 24, 32, 32))]
        [(2, 24, 32, 32), (2, 24, 16, 16)]

    Source: Pal, Edelman and Rackauckas (2022), Skip DEQ; widths as in the released code, which has BatchNorm.
    """

    def __init__(self, config: MDEQConfig, *, weight_norm: bool = True) -> None:
        super().__init__()
        self.block = ResidualBlock(0, dataclasses.replace(config, expansion=3, dropout=0.0, contraction=None))
        if not weight_norm:
            for conv in (self.block.conv1, self.block.conv2):
                parametrize.remove_parametrizations(conv, "weight")
        self.downs = nn.ModuleList(_down(config, level) for level in range(1, config.num_levels))
        initialize(self)

    def forward(self, u: Tensor) -> tuple[Tensor, ...]:
        """`(B, C_0, H_0, W_0)` to one `(B, C_i, H_0 / 2^i, W_0 / 2^i)` per level."""
        return (self.block(u), *(down(u) for down in self.downs))


def _down(config: MDEQConfig, level: int) -> nn.Sequential:
    width, end = config.channels[0], config.channels[level]
    doubles = width * 2**level == end
    layers: list[nn.Module] = []
    for number in range(1, level + 1):
        following = 2 * width if doubles else end if number == level else width
        layers += [
            conv3x3(width, following, stride=2),
            nn.GroupNorm(config.num_groups, following),
            nn.ReLU(inplace=True),
        ]
        width = following
    return nn.Sequential(*layers)
