"""Classification head of an MDEQ."""

import itertools

import torch
from torch import Tensor, nn

from equipoise.zoo.mdeq.config import MDEQShape
from equipoise.zoo.mdeq.stem import conv1x1, conv3x3, initialize


class MDEQHead(nn.Module):
    r"""Classification head on all levels of an equilibrium.

    $$y_0 = \mathrm{bottleneck}_0(z_0), \quad y_{i+1} = \mathrm{bottleneck}_{i+1}(z_{i+1}) +
    \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{3 \times 3, \mathrm{stride}\,2}\, y_i)),$$

    then a 1x1 convolution, BatchNorm, ReLU, the mean over the image and a linear layer.

    Args:
        config: shape of the model.

    Source: Bai et al. 2020; widths as in the released code.
    """

    def __init__(self, config: MDEQShape) -> None:
        super().__init__()
        outputs = [Bottleneck.expansion * width for width in config.head_channels]
        self.bottlenecks = nn.ModuleList(map(Bottleneck, config.channels, config.head_channels))
        self.downs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fine, coarse, 3, stride=2, padding=1), nn.BatchNorm2d(coarse), nn.ReLU(inplace=True)
            )
            for fine, coarse in itertools.pairwise(outputs)
        )
        self.final = nn.Sequential(
            nn.Conv2d(outputs[-1], config.final_channels, 1),
            nn.BatchNorm2d(config.final_channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(config.final_channels, config.num_classes),
        )
        initialize(self)

    def forward(self, z: tuple[Tensor, ...]) -> Tensor:
        """One `(B, C_i, H_i, W_i)` per level, finest first, to logits `(B, num_classes)`."""
        y = self.bottlenecks[0](z[0])
        for down, bottleneck, level in zip(self.downs, self.bottlenecks[1:], z[1:], strict=True):
            y = bottleneck(level) + down(y)
        return self.final(y)


class Bottleneck(nn.Module):
    """Residual bottleneck of the head: 1x1, 3x3 and 1x1 convolutions around an inner width.

    Args:
        inputs: channels that come in.
        width: inner width; `expansion * width` channels go out. A shortcut convolution adapts the residual if the
            two differ.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.layers = nn.Sequential(
            conv1x1(inputs, width),
            nn.BatchNorm2d(width, affine=False),
            nn.ReLU(inplace=True),
            conv3x3(width, width),
            nn.BatchNorm2d(width, affine=False),
            nn.ReLU(inplace=True),
            conv1x1(width, outputs),
            nn.BatchNorm2d(outputs, affine=False),
        )
        self.shortcut = (
            nn.Identity() if inputs == outputs else nn.Sequential(conv1x1(inputs, outputs), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W) -> (B, 4 width, H, W)`."""
        return torch.relu(self.layers(x) + self.shortcut(x))
