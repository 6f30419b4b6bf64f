"""Multiscale deep equilibrium classifier: configuration, published shapes, model, predictor of Skip DEQ.

Source: S. Bai, V. Koltun, J. Z. Kolter, "Multiscale Deep Equilibrium Models", NeurIPS 2020 (arXiv 2006.08656);
widths and training lengths as in the code released by its authors. The "regularized" configurations are those of
S. Bai, V. Koltun, J. Z. Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization", ICML 2021
(arXiv 2106.14342).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from equipoise.gradients import Gradient, Implicit
from equipoise.nn import DEQ
from equipoise.solvers import Anderson, Solver
from equipoise.zoo.classification import EquilibriumClassifier
from equipoise.zoo.mdeq.cell import MDEQCell, ResidualBlock
from equipoise.zoo.mdeq.config import MDEQShape
from equipoise.zoo.mdeq.head import MDEQHead
from equipoise.zoo.mdeq.stem import MDEQStem, conv3x3, initialize


@dataclasses.dataclass(frozen=True, kw_only=True)
class MDEQConfig(MDEQShape):
    """Shape of an MDEQ classifier; a variant is `dataclasses.replace(config, field=value)`.

    The side of the images is a multiple of `2^(num_downsamplings + levels - 1)`.

    Raises:
        ValueError: a field is out of range, or two fields do not fit each other.

    Example:
        >>> from equipoise.zoo import MDEQConfig
        >>> config = MDEQConfig.cifar10_large()
        >>> config.level_shapes
        ((32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4))
        >>> config.state_size
        61440
    """

    def build(self, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> MDEQClassifier:
        return MDEQClassifier(self, solver=solver, gradient=gradient)

    def stem(self) -> nn.Module:
        """Build the modules from images to injections."""
        return MDEQStem(self) if self.contraction is None else self.contraction.stem(self)

    def cell(self) -> nn.Module:
        """Build the map."""
        return MDEQCell(self) if self.contraction is None else self.contraction.cell(self)

    @classmethod
    def digits(cls) -> MDEQConfig:
        """8x8 grayscale digits, two levels, small enough to train in a minute."""
        return cls(
            image_size=8,
            image_channels=1,
            num_classes=10,
            channels=(16, 32),
            expansion=2,
            num_groups=4,
            dropout=0.1,
            head_channels=(8, 16),
            final_channels=64,
        )

    @classmethod
    def fashion_mnist(cls) -> MDEQConfig:
        """28x28 grayscale images, two levels, 14x14 and 7x7, small enough to train on a CPU."""
        return cls(
            image_size=28,
            image_channels=1,
            num_classes=10,
            channels=(32, 64),
            num_downsamplings=1,
            expansion=2,
            head_channels=(16, 32),
            final_channels=128,
        )

    @classmethod
    def cifar10_tiny(cls) -> MDEQConfig:
        """CIFAR-10 without augmentation, two levels, 158,890 parameters (published as "170K")."""
        return cls(
            image_size=32,
            num_classes=10,
            channels=(24, 24),
            dropout=0.25,
            head_channels=(8, 16),
            final_channels=200,
        )

    @classmethod
    def cifar10_large(cls) -> MDEQConfig:
        """CIFAR-10 with augmentation, four levels, 11,097,438 parameters (published as "10M")."""
        return cls(
            image_size=32,
            num_classes=10,
            channels=(32, 64, 128, 256),
            dropout=0.3,
            head_channels=(14, 28, 56, 112),
            final_channels=1680,
        )

    @classmethod
    def cifar10_large_regularized(cls) -> MDEQConfig:
        """`cifar10_large` for training with a Jacobian penalty: less dropout, 11,097,438 parameters."""
        return dataclasses.replace(cls.cifar10_large(), dropout=0.22)

    @classmethod
    def imagenet_small(cls) -> MDEQConfig:
        """ImageNet, four levels from 56x56, 16,808,936 parameters (published as "18M")."""
        return cls(
            image_size=224,
            num_classes=1000,
            channels=(32, 64, 128, 256),
            num_downsamplings=2,
            post_norm_affine=True,
            head_channels=(24, 48, 96, 192),
            final_channels=2048,
        )

    @classmethod
    def imagenet_small_regularized(cls) -> MDEQConfig:
        """`imagenet_small` for training with a Jacobian penalty: wider head, 18,613,496 parameters."""
        return dataclasses.replace(
            cls.imagenet_small(), dropout=0.02, post_norm_affine=False, head_channels=(28, 56, 112, 224)
        )

    @classmethod
    def imagenet_large(cls) -> MDEQConfig:
        """ImageNet, four levels from 56x56, 67,063,624 parameters (published as "63M")."""
        return dataclasses.replace(cls.imagenet_small(), channels=(80, 160, 320, 640), head_channels=(32, 64, 128, 256))

    @classmethod
    def imagenet_large_regularized(cls) -> MDEQConfig:
        """`imagenet_large` for training with a Jacobian penalty, 67,061,224 parameters."""
        return dataclasses.replace(cls.imagenet_large(), post_norm_affine=False)

    @classmethod
    def imagenet_xl(cls) -> MDEQConfig:
        """ImageNet, four levels from 56x56, 90,463,280 parameters (published as "81M")."""
        return dataclasses.replace(cls.imagenet_large(), channels=(88, 176, 352, 704), expansion=6)


class MDEQClassifier(EquilibriumClassifier):
    r"""Multiscale deep equilibrium classifier.

    The equilibrium is the module `deq`, so its solver and gradient can be replaced for a while: the second example is
    fixed-depth pretraining, the usual start. The output is the best iterate of the solver, in training and evaluation.

    Args:
        config: shape of the model.
        solver: finds the equilibrium.
        gradient: differentiates it.

    Example:
        >>> import torch, equipoise as eq
        >>> from equipoise.zoo import MDEQClassifier, MDEQConfig
        >>> model = MDEQClassifier(MDEQConfig.digits(), solver=eq.Anderson(max_steps=10), gradient=eq.JacobianFree())
        >>> images = torch.randn(3, 1, 8, 8)
        >>> model(images).shape
        torch.Size([3, 10])
        >>> with model.deq.using(solver=eq.Picard(max_steps=0), gradient=eq.Unrolled(steps=4)):
        ...     logits, solution = model.classify(images)
        >>> logits.sum().backward()

    Source: S. Bai, V. Koltun, J. Z. Kolter, "Multiscale Deep Equilibrium Models", NeurIPS 2020 (arXiv 2006.08656).
    """

    def __init__(self, config: MDEQConfig, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> None:
        stem, cell = config.stem(), config.cell()
        start: Any = MDEQPredictor(config) if config.predictor else cell.zeros
        super().__init__(
            config,
            stem=stem,
            deq=DEQ(
                cell,
                solver=solver,
                gradient=gradient,
                init=start,
                explicit_steps=config.explicit_steps,
            ),
            head=MDEQHead(config),
        )


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
