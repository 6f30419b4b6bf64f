"""Equilibrium that restores images: its inputs are the observation, and latents in space."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.core.checks import check_ranges
from equipoise.gradients import Gradient, Implicit
from equipoise.nn import DEQ, spectral_norm
from equipoise.solvers import Anderson, Solver
from equipoise.zoo.generative import Corruption, Downsample, ImageDecoder, ImageDecoderConfig

STEEPEST = 1.1  # slope of SiLU, at most

Levels = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig(ImageDecoderConfig):
    """Shape of an `EquilibriumPrior`, which also takes other sizes of images.

    Raises:
        ValueError: a field is out of range.
    """

    conditional: ClassVar[bool] = True

    image_channels: int = 1
    channels: tuple[int, ...] = (16, 24, 32)
    """Width of each level, finest first; each has half the resolution of the one before it."""
    latent_channels: int = 4
    """Channels of the latents, which have the resolution of the image."""
    gain: float = 0.35
    """Norm of the kernels of the map, as matrices."""
    reach: float = 1.0
    """Norm of the kernel through which the latents act."""
    num_corruptions: int = 1
    """Number of data weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels must be the widths of at least one level, got {self.channels}")
        check_ranges(self, "model.", latent_channels=">= 1", num_corruptions=">= 1", gain="> 0", reach="> 0")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size must be a multiple of {self.stride}, got {self.image_size}: each of {len(self.channels)} "
                "levels halves the one before it; crop or pad the images"
            )

    @property
    def stride(self) -> int:
        """Required divisor of the image sides."""
        return 1 << (len(self.channels) - 1)

    def check_corruptions(self, corruptions: Sequence[Corruption]) -> None:
        if self.num_corruptions != len(corruptions):
            raise ValueError(
                f"model.num_corruptions={self.num_corruptions} must be the number of task.corruptions, "
                f"{len(corruptions)}: the model learns a data weight for each"
            )
        if any(isinstance(corruption, Downsample) for corruption in corruptions):
            raise ValueError(
                f"task.corruptions={corruptions}: a PriorConfig sees the observation pixel by pixel, and Downsample "
                "leaves fewer of them; take a DecoderConfig"
            )

    def build(self, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> EquilibriumPrior:
        return EquilibriumPrior(self, solver=solver, gradient=gradient)

    @property
    def state_size(self) -> int:
        levels = sum(width * (self.image_size >> level) ** 2 for level, width in enumerate(self.channels))
        return levels + self.image_channels * self.image_size**2


class PriorCell(nn.Module):
    r"""Map on levels $z_i$ and the observation $y$, a constant part of the state.

    $$ f_0(z, x) = \phi(u_0 + A_{00} z_0 + \mathrm{up}(A_{01} z_1) + B x), \qquad
       f_i(z, x) = \phi(u_i + A_{ii} z_i + A_{i,i-1} z_{i-1} + \mathrm{up}(A_{i,i+1} z_{i+1})) $$

    $\phi$ is SiLU, scaled to slopes of at most one.

    Args:
        config: shape of the model.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.gain, self.reach = config.gain, config.reach
        widths = config.channels
        pairs = list(itertools.pairwise(widths))
        self.within = nn.ModuleList(_kernel(width, width) for width in widths)
        self.down = nn.ModuleList(_kernel(fine, coarse, stride=2) for fine, coarse in pairs)
        self.up = nn.ModuleList(_kernel(coarse, fine, size=1) for fine, coarse in pairs)
        self.injection = _kernel(config.latent_channels, widths[0])

    def forward(self, z: Levels, x: Tensor, *context: Tensor) -> Levels:
        """State `(z_0, ..., z_{L-1}, y)`, latents and `EquilibriumPrior.context` to a state."""
        found = []
        for i, (level, outer) in enumerate(zip(z[:-1], context[:-1], strict=True)):
            total = outer + self.gain * self.within[i](level)
            if i == 0:
                total = total + self.reach * self.injection(x)
            else:
                total = total + self.gain * self.down[i - 1](z[i - 1])
            if i < len(self.up):  # nearest neighbors double a norm
                total = total + self.gain / 2 * F.interpolate(self.up[i](z[i + 1]), scale_factor=2.0)
            found.append(F.silu(total) / STEEPEST)
        return (*found, context[-1])


class EquilibriumPrior(ImageDecoder):
    r"""Prior of clean images, given an observation: for denoising and inpainting.

    $$ z^* = f(z^*, x, u), \quad u = \mathrm{stem}(y, m), \quad \mathrm{image} = y + h(z^*_0), \quad
       r(x) = \tfrac12 \|x\|^2 $$

    With latents of zero the equilibrium is a guess of the image; optimized latents correct it. The weight of the data
    against the latents is learned for each kind of corruption. Samples of a batch are independent, and images may have
    any sides that are multiples of `config.stride`.

    Args:
        config: shape of the model.
        solver: finds the equilibrium.
        gradient: differentiates it.

    Example:
        >>> import torch
        >>> from equipoise.zoo import EquilibriumPrior, PriorConfig
        >>> model = EquilibriumPrior(PriorConfig(image_size=28))
        >>> observed, mask = torch.rand(2, 1, 40, 32), torch.ones(2, 1, 40, 32)
        >>> model(model.latents(2, 40, 32), observed, mask).shape
        torch.Size([2, 1, 40, 32])

    Source: Gurumurthy, Bai, Manchester and Kolter (2021); new here are latents in space instead of one vector, and the
    observation as an input of the map.
    """

    def __init__(self, config: PriorConfig, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> None:
        super().__init__()
        self.config = config
        self.deq = DEQ(PriorCell(config), solver=solver, gradient=gradient, init=self.start)
        widths = config.channels
        self.first = nn.Conv2d(2 * config.image_channels, widths[0], 5, padding=2)
        self.second = nn.Conv2d(widths[0], widths[0], 3, padding=1)
        self.finest = nn.Conv2d(widths[0], widths[0], 3, padding=1)
        self.coarser = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in itertools.pairwise(widths)
        )
        self.head = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)
        nn.init.normal_(self.head.weight, std=0.02)  # the first estimate is the observation
        self.log_weights = nn.Parameter(torch.full((config.num_corruptions,), math.log(10.0)))

    def forward(self, x: Tensor, observed: Tensor, mask: Tensor) -> Tensor:
        """Images of latents, given an observation.

        Args:
            x: `(B, latent_channels, H, W)`.
            observed: `(B, C, H, W)`.
            mask: of the same shape, 1 where a pixel was seen.

        Returns:
            `(B, C, H, W)`, not clipped to [0, 1].
        """
        return self.decode(self.deq(x, *self.context(observed, mask)))

    def context(self, observed: Tensor, mask: Tensor) -> Levels:
        """Inputs of the map beside state and latents: an injection for each level, and the observation.

        Args:
            observed: `(B, C, H, W)`.
            mask: of the same shape.

        Raises:
            ValueError: the size of the images does not fit the levels.
        """
        height, width = observed.shape[-2:]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"the sides of images must be multiples of {self.config.stride}, got {height}x{width}; crop or pad them"
            )
        h = F.gelu(self.first(torch.cat([observed, mask], dim=1)))
        h = h + F.gelu(self.second(h))
        injections = [self.finest(h)]
        for coarser in self.coarser:
            h = F.gelu(coarser(h))
            injections.append(h)
        return (*injections, observed)

    def decode(self, z: Levels) -> Tensor:
        """Images of states, `(B, C, H, W)`."""
        image: Tensor = z[-1] + self.head(z[0])
        return image

    def penalty(self, x: Tensor) -> Tensor:
        """$r(x)$, `(B,)`."""
        return x.square().flatten(1).sum(1) / 2

    def weights(self) -> Tensor:
        """Data weight of each kind of corruption, `(num_corruptions,)`."""
        return self.log_weights.exp()

    def latents(self, batch: int, height: int, width: int) -> Tensor:
        """Return zeros `(batch, latent_channels, height, width)`, the start of the search for latents."""
        return self.head.weight.new_zeros(batch, self.config.latent_channels, height, width)

    def start(self, x: Tensor, *context: Tensor) -> Levels:
        """Return zeros, the start of the solve for the state."""
        batch, _, height, width = x.shape
        levels = [x.new_zeros(batch, c, height >> i, width >> i) for i, c in enumerate(self.config.channels)]
        return (*levels, x.new_zeros(batch, self.config.image_channels, height, width))


def _kernel(inner: int, outer: int, *, size: int = 3, stride: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv2d(inner, outer, size, stride=stride, padding=size // 2, bias=False))
