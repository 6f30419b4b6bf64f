"""Decoders, whose latents are optimized: their interface, and a decoder of one latent vector by an equilibrium."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.core.checks import check_ranges
from equipoise.gradients import Gradient, Implicit
from equipoise.nn import DEQ, spectral_norm
from equipoise.solvers import Anderson, Solver
from equipoise.zoo.base import ImageModelConfig
from equipoise.zoo.generative.corruptions import Corruption


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageDecoderConfig(ImageModelConfig):
    """Shape of a decoder of latents; a subclass adds its own fields.

    Attributes:
        conditional: whether the map has the observation as an input. Then latents of zero are a guess, and the model
            has a penalty of latents and a data weight for each kind of corruption.
    """

    conditional: ClassVar[bool] = False

    def check_corruptions(self, corruptions: Sequence[Corruption]) -> None:
        """Check that the model can be trained for corruptions.

        Raises:
            ValueError: it cannot.
        """


class ImageDecoder(nn.Module, abc.ABC):
    """Decoder of latents by an equilibrium."""

    config: Any  # of the model's own class
    deq: DEQ

    @abc.abstractmethod
    def decode(self, z: Any) -> Tensor:
        """Images of states, `(B, C, H, W)`."""

    @abc.abstractmethod
    def latents(self, batch: int, height: int, width: int) -> Tensor:
        """Start of the search for latents, zeros.

        Args:
            batch: number of images.
            height: of the images.
            width: of the images.
        """

    @abc.abstractmethod
    def start(self, x: Tensor, *context: Tensor) -> Any:
        """Start of the solve for the state, zeros."""

    def context(self, observed: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Inputs of the map beside state and latents.

        Args:
            observed: `(B, C, H, W)`.
            mask: of the same shape.
        """
        return ()

    def penalty(self, x: Tensor) -> Tensor:
        """Penalty of latents, `(B,)`."""
        raise NotImplementedError(f"{type(self).__name__} has no penalty of latents")

    def weights(self) -> Tensor:
        """Data weight of each kind of corruption, `(num_corruptions,)`."""
        raise NotImplementedError(f"{type(self).__name__} has no data weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(ImageDecoderConfig):
    """Shape of a decoder of latent vectors.

    Raises:
        ValueError: a field is out of range.
    """

    latent_size: int = 64
    """Size of a latent."""
    width: int = 256
    """Size of the state."""
    contraction: float = 0.5
    """Norm of the matrix of the map; a smaller norm means fewer solver steps and a simpler map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self, "model.", latent_size=">= 1", width=">= 1", contraction="> 0 and < 1; below 1 the map contracts"
        )

    def build(self, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> LatentDecoder:
        return LatentDecoder(self, solver=solver, gradient=gradient)

    @property
    def state_size(self) -> int:
        return self.width


class DecoderCell(nn.Module):
    r"""The map $f(z, x) = \tanh(\rho \, W z + U x + b)$ with $\|W\|_2 = 1$: smooth, and a contraction by $\rho$.

    Args:
        config: shape of the model.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.contraction = config.contraction
        self.state = spectral_norm(nn.Linear(config.width, config.width, bias=False))
        self.injection = nn.Linear(config.latent_size, config.width)
        nn.init.normal_(self.injection.weight, std=config.latent_size**-0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """`(B, width), (B, latent_size) -> (B, width)`."""
        return torch.tanh(self.contraction * self.state(z) + self.injection(x))


class LatentDecoder(ImageDecoder):
    r"""Decoder of one latent vector per image, a generative model.

    $$ z^* = \tanh(\rho \, W z^* + U x + b), \qquad \mathrm{image} = \sigma(V z^* + c) $$

    It has no encoder: `optimize_inputs` finds the latent of an image, in training and afterwards.

    Args:
        config: shape of the model.
        solver: finds the equilibrium.
        gradient: differentiates it.

    Example:
        >>> import torch, equipoise as eq
        >>> from equipoise.zoo import DecoderConfig, LatentDecoder
        >>> model = LatentDecoder(DecoderConfig(image_size=8, image_channels=1, latent_size=4, width=32))
        >>> x = model.latents(3, 8, 8)
        >>> model(x).shape
        torch.Size([3, 1, 8, 8])
        >>> images = torch.rand(3, 1, 8, 8)
        >>> cost = lambda z, x: (model.decode(z) - images).square().sum((1, 2, 3))
        >>> z, mu, x = eq.optimize_inputs(model.deq.cell, z0=model.start(x), x0=x, cost=cost).value

    Source: Gurumurthy, Bai, Manchester and Kolter (2021), with a dense map in place of the multiscale one.
    """

    def __init__(self, config: DecoderConfig, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> None:
        super().__init__()
        self.config = config
        self.deq = DEQ(DecoderCell(config), solver=solver, gradient=gradient, init=self.start)
        size = math.prod(config.image_shape)
        self.head = nn.Sequential(nn.Linear(config.width, size), nn.Sigmoid(), nn.Unflatten(1, config.image_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Images of latents, `(B, latent_size) -> (B, C, H, W)`, between 0 and 1."""
        return self.decode(self.deq(x))

    def decode(self, z: Tensor) -> Tensor:
        """Images of states, `(B, width) -> (B, C, H, W)`, between 0 and 1."""
        images: Tensor = self.head(z)
        return images

    def latents(self, batch: int, height: int, width: int) -> Tensor:
        """Return zeros `(batch, latent_size)`, the start of the search for latents.

        Args:
            batch: number of images.
            height: of the images.
            width: of the images.

        Raises:
            ValueError: the images of the model have another size.
        """
        size = self.config.image_size
        if (height, width) != (size, size):
            raise ValueError(f"the decoder makes images of {size}x{size}, not of {height}x{width}; resize them")
        return next(self.parameters()).new_zeros(batch, self.config.latent_size)

    def start(self, x: Tensor, *context: Tensor) -> Tensor:
        """Return zeros `(B, width)`, the start of the solve for the state."""
        return x.new_zeros(len(x), self.config.width)
