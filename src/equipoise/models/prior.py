"""A convolutional decoder for inverse problems: latents at two resolutions, an equilibrium, an image of any size."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.gradients import Gradient, Implicit
from equipoise.models.config import ModelConfig
from equipoise.nn.deq import DEQ
from equipoise.nn.operator_norm import conv_norm_bound
from equipoise.solvers import Anderson, Solver

TORUS = 16  # side of the torus on which norms are taken
# A trigonometric polynomial of degree 1 between the frequencies of that torus, in two directions (Ehlich and Zeller).
BETWEEN = 1 / math.cos(math.pi / TORUS) ** 2
WINDOWS = (6, 8)  # sides of the atoms of the fine and of the coarse latents, in pixels
COSINES = 4  # sides of the squares of frequencies with which the atoms begin
PENALTY, WEIGHT = 1.2, 10.0  # at first; with it what is noise of a tenth is left out
HASTE = 5.0  # by which logarithms of penalties and weights follow their gradients faster than atoms do
ATOM = 0.5  # norm of an atom: cosine windows that overlap by half are then a tight frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig(ModelConfig):
    """Shape of an `EquilibriumPrior`; it takes images of other sizes, too, if their sides are multiples of 4.

    Raises:
        ValueError: a field is out of range.
    """

    image_channels: int = 1
    fine: int = 16
    """Channels of latent and state at half the resolution."""
    coarse: int = 16
    """Channels of latent and state at a quarter of the resolution."""
    cap: float = 0.4
    """Norm of each of the four convolutions of the map, below 1/2: it is then a contraction by twice that."""
    smoothing: float = 0.02
    """Where the penalty of a latent turns from a parabola into an absolute value."""
    num_corruptions: int = 1
    """Number of data weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_channels != 1:
            raise ValueError(f"image_channels must be 1, got {self.image_channels}; take color channels one by one")
        for name in ("fine", "coarse", "num_corruptions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.cap < 0.5:
            raise ValueError(f"cap must lie in (0, 0.5), got {self.cap}; below 0.5 the map contracts")
        if not self.smoothing > 0:
            raise ValueError(f"smoothing must be > 0, got {self.smoothing}")
        if self.image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {self.image_size}; crop or pad the images")

    @property
    def state_size(self) -> int:
        return self.fine * (self.image_size // 2) ** 2 + self.coarse * (self.image_size // 4) ** 2


class PriorCell(nn.Module):
    r"""The map of two levels, in which latents are what the context does not foresee.

    $$ f(z, x)_1 = x_1 + \tanh(A_{11} z_1 + \mathrm{up}(A_{12} z_2) + b_1), \qquad
       f(z, x)_2 = x_2 + \tanh(A_{22} z_2 + A_{21} \mathrm{pool}(z_1) + b_2) $$

    Args:
        config: shape of the model.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        fine, coarse, cap = config.fine, config.coarse, config.cap
        # Nearest neighbors double a norm, a mean over four pixels halves it: with them each of the four has the cap.
        self.within = nn.ModuleList([_capped(fine, fine, cap), _capped(coarse, coarse, cap)])
        self.down, self.up = _capped(coarse, fine, cap / 2), _capped(fine, coarse, 2 * cap)
        self.biases = nn.ParameterList([torch.zeros(fine, 1, 1), torch.zeros(coarse, 1, 1)])

    def forward(self, z: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Fine `(B, fine, H/2, W/2)` and coarse `(B, coarse, H/4, W/4)`, twice, to the same."""
        (fine, coarse), (near, far) = z, x
        inner = self.within[0](fine) + F.interpolate(self.down(coarse), scale_factor=2.0)
        outer = self.within[1](coarse) + self.up(F.avg_pool2d(fine, 2))
        return near + torch.tanh(inner + self.biases[0]), far + torch.tanh(outer + self.biases[1])


class EquilibriumPrior(nn.Module):
    r"""What clean images look like, as an equilibrium of latents that are sparse: for denoising and inpainting.

    $$ z^* = f(z^*, x), \qquad \mathrm{image} = \sum_i z^*_i * a_i + b, \qquad
       r(x) = \sum_i w_i \sum_p \left( \sqrt{x_{ip}^2 + \delta^2} - \delta \right) $$

    The atoms $a_i$ begin as overlapping cosine windows of 4x4 and 8x8 pixels and keep their norm, so that the problem
    for the latents stays well conditioned. Atoms, map, the weights $w_i$ and a data weight for each kind of corruption
    are learned. There are no statistics of a batch, and any size of image is taken.

    Args:
        config: shape of the model.
        solver: finds the equilibrium.
        gradient: differentiates it.

    Example:
        >>> import torch
        >>> from equipoise.models import EquilibriumPrior, PriorConfig
        >>> model = EquilibriumPrior(PriorConfig(image_size=28))
        >>> x = model.latents(2, 40, 32)
        >>> model(x).shape, model.penalty(x).shape
        (torch.Size([2, 1, 40, 32]), torch.Size([2]))

    Source: the use of Gurumurthy, Bai, Manchester and Kolter (2021), with latents in space instead of one vector.
    """

    def __init__(self, config: PriorConfig, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> None:
        super().__init__()
        self.config = config
        self.deq = DEQ(PriorCell(config), solver=solver, gradient=gradient, init=self.start)
        self.atoms = nn.ModuleList(
            _atoms(channels, stride, window)
            for channels, stride, window in zip((config.fine, config.coarse), (2, 4), WINDOWS, strict=True)
        )
        self.bias = nn.Parameter(torch.zeros(()))
        self.log_penalties = nn.ParameterList([_graded(config.fine, 1, 0.5), _graded(config.coarse, 3, 0.1)])
        self.log_weights = nn.Parameter(torch.full((config.num_corruptions,), math.log(WEIGHT) / HASTE))

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """Images of latents, `(B, 1, H, W)`."""
        return self.decode(self.deq(x))

    def decode(self, z: tuple[Tensor, Tensor]) -> Tensor:
        """Images of states, `(B, 1, H, W)`; those of natural images lie in [0, 1], but nothing holds them there."""
        image: Tensor = self.atoms[0](z[0]) + self.atoms[1](z[1]) + self.bias
        return image

    def penalty(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """$r(x)$, `(B,)`."""
        width = self.config.smoothing
        total = x[0].new_zeros(len(x[0]))
        for part, log in zip(x, self.log_penalties, strict=True):
            total = total + ((HASTE * log).exp() * ((part.square() + width**2).sqrt() - width)).flatten(1).sum(1)
        return total

    def weights(self) -> Tensor:
        """The data weight of each kind of corruption, `(num_corruptions,)`."""
        return (HASTE * self.log_weights).exp()

    def latents(self, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Where the search for latents begins: zeros.

        Args:
            batch: number of images.
            height: of the images, a multiple of 4.
            width: of the images, likewise.

        Raises:
            ValueError: a side is no multiple of 4.
        """
        if height % 4 or width % 4:
            raise ValueError(f"images of {height}x{width}: sides must be multiples of 4; crop or pad them")
        zeros = self.bias.new_zeros
        return (
            zeros(batch, self.config.fine, height // 2, width // 2),
            zeros(batch, self.config.coarse, height // 4, width // 4),
        )

    def start(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Where the solve for the state begins: zeros."""
        return torch.zeros_like(x[0]), torch.zeros_like(x[1])


class _NormCap(nn.Module):
    """Divides a 3x3 kernel by its norm on images of any size over a cap, where the norm is larger."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap / BETWEEN

    def forward(self, kernel: Tensor) -> Tensor:
        # Zero padding cuts a part out of the convolution on the infinite plane, whose norm this is.
        norm = conv_norm_bound(kernel, (TORUS - 1, TORUS - 1), padding=1)
        return kernel * (self.cap / norm.clamp_min(self.cap))


class _UnitAtoms(nn.Module):
    """Gives each atom the norm with which it began."""

    def forward(self, kernel: Tensor) -> Tensor:
        return kernel * (ATOM / torch.linalg.vector_norm(kernel.flatten(1), dim=1))[:, None, None, None]


def _capped(inputs: int, outputs: int, cap: float) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.normal_(conv.weight, std=0.01)  # at first latents are all that there is
    parametrize.register_parametrization(conv, "weight", _NormCap(cap))
    return conv


def _atoms(channels: int, stride: int, window: int) -> nn.ConvTranspose2d:
    """Cosines in the middle of small random numbers, and no more than those for channels beyond the cosines."""
    conv = nn.ConvTranspose2d(channels, 1, window, stride=stride, padding=(window - stride) // 2, bias=False)
    nn.init.normal_(conv.weight, std=0.01)
    inside = 2 * stride
    edge = (window - inside) // 2
    cosines = _cosines(inside, COSINES)[:channels]
    with torch.no_grad():
        conv.weight[: len(cosines), 0, edge : edge + inside, edge : edge + inside] += ATOM * cosines
    parametrize.register_parametrization(conv, "weight", _UnitAtoms())
    return conv


def _cosines(side: int, count: int) -> Tensor:
    """The first `count` by `count` functions of the two-dimensional cosine transform, from low to high frequencies."""
    place = (torch.arange(side) + 0.5) * math.pi / side
    waves = torch.stack([torch.cos(k * place) * math.sqrt((1 if k == 0 else 2) / side) for k in range(count)])
    functions = torch.einsum("ia,jb->ijab", waves, waves).flatten(0, 1)
    order = sorted(range(count**2), key=lambda n: (n // count + n % count, n))
    return functions[order]


def _graded(channels: int, first: int, less: float) -> Tensor:
    """Logarithms of penalties: the lowest frequencies are not sparse and weigh less."""
    penalties = torch.full((channels, 1, 1), PENALTY)
    penalties[:first] *= less
    return penalties.log() / HASTE
