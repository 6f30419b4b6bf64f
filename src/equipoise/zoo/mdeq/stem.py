"""Stem of an MDEQ, and the convolutions that its parts share."""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.zoo.mdeq.config import MDEQShape


class MDEQStem(nn.Module):
    r"""Stem: images to the injection `u_0`, once per input and outside the fixed point.

    Two or more 3x3 convolutions, each with BatchNorm and ReLU, as many of stride 2 as `num_downsamplings` says; then,
    unless the model has at most two levels and no down-sampling, $u_0 = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{1
    \times 1}(\cdot)))$.

    Args:
        config: shape of the model.

    Source: the code released with Bai et al. 2020.
    """

    def __init__(self, config: MDEQShape) -> None:
        super().__init__()
        width = config.channels[0]
        layers: list[nn.Module] = []
        for number in range(max(2, config.num_downsamplings)):
            layers += [
                conv3x3(
                    width if number else config.image_channels, width, stride=1 + (number < config.num_downsamplings)
                ),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        if config.num_downsamplings > 0 or config.num_levels > 2:
            layers += [conv1x1(width, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, image_channels, H, W) -> (B, C_0, H_0, W_0)`."""
        return self.layers(images)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution with zero padding 1, without bias: the norm that follows has a shift."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    """Build a 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def initialize(module: nn.Module) -> None:
    r"""Draw weights and biases of all plain convolutions from $N(0, 0.01^2)$, in place.

    Weight-normalized convolutions keep PyTorch's default, as they do in the released code, whose initialization
    writes to their derived weight without effect. Linear layers keep the default, norms start at scale 1, shift 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not parametrize.is_parametrized(layer, "weight"):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.01)
