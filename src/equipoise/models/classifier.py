"""Image classification by an equilibrium: stem, DEQ, head; and the MDEQ that does so."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from equipoise.core.solution import Solution
from equipoise.gradients import Gradient, Implicit
from equipoise.models.config import ClassifierConfig, MDEQConfig
from equipoise.models.contraction import SLLLayers
from equipoise.models.mdeq import MDEQCell, MDEQEncoder, MDEQStem, conv1x1, conv3x3, initialize
from equipoise.models.predictor import MDEQPredictor
from equipoise.nn.deq import DEQ
from equipoise.solvers import Anderson, Solver


class EquilibriumClassifier(nn.Module):
    r"""Base of classifiers of images: what is before the equilibrium, the equilibrium, what reads it.

    $$u = \mathrm{stem}(x), \quad z^* = f(z^*, u), \quad \mathrm{logits} = \mathrm{head}(z^*).$$

    Args:
        config: shape of the model.
        stem: from images to what the map takes beside its state.
        deq: the equilibrium.
        head: from the equilibrium to logits.
    """

    def __init__(self, config: ClassifierConfig, *, stem: nn.Module, deq: DEQ, head: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.stem = stem
        self.deq = deq
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `(B, image_channels, image_size, image_size)`.

        Returns:
            `(B, num_classes)` logits.

        Raises:
            ValueError: `images` has another shape.
        """
        return self.classify(images)[0]

    def classify(self, images: Tensor) -> tuple[Tensor, Solution]:
        """Classify images and tell how the equilibrium was found.

        Args:
            images: `(B, image_channels, image_size, image_size)`.

        Returns:
            `(B, num_classes)` logits, and the `Solution` whose value the head has read: steps and statuses for the
            training log, the map for a Jacobian penalty.

        Raises:
            ValueError: `images` has another shape.
        """
        expected = (self.config.image_channels, self.config.image_size, self.config.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}; resize them, "
                "or build the model with another image_size"
            )
        solution = self.deq.solve(self.stem(images))
        return self.head(solution.value), solution


class MDEQClassifier(EquilibriumClassifier):
    r"""Multiscale deep equilibrium classifier.

    The equilibrium is the module `deq`, so its solver and gradient can be replaced for a while: fixed-depth
    pre-training, with which an MDEQ starts, is the second example. The output is the best iterate of the solver, in
    training as in evaluation.

    Args:
        config: shape of the model.
        solver: finds the equilibrium.
        gradient: differentiates it.

    Example:
        >>> import torch, equipoise as eq
        >>> from equipoise.models import MDEQClassifier, MDEQConfig
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
        stem = (MDEQEncoder if isinstance(config.contraction, SLLLayers) else MDEQStem)(config)
        cell = MDEQCell(config)
        super().__init__(
            config,
            stem=stem,
            deq=DEQ(
                cell,
                solver=solver,
                gradient=gradient,
                init=MDEQPredictor(config) if config.predictor else cell.zeros,
                explicit_steps=config.explicit_steps,
            ),
            head=MDEQHead(config),
        )


class MDEQHead(nn.Module):
    r"""Classification head on all levels of an equilibrium.

    $$y_0 = \mathrm{bottleneck}_0(z_0), \quad y_{i+1} = \mathrm{bottleneck}_{i+1}(z_{i+1}) +
    \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{3 \times 3, \mathrm{stride}\,2}\, y_i)),$$

    then a 1x1 convolution, BatchNorm, ReLU, the mean over the image and a linear layer.

    Args:
        config: shape of the model.

    Source: Bai et al. 2020; widths as in the released code.
    """

    def __init__(self, config: MDEQConfig) -> None:
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
