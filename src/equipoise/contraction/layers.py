r"""Layers with known Lipschitz constants, in the Euclidean norm of one sample.

Each layer has a method `lipschitz_bound(training)`; the function `lipschitz_bound(module)` multiplies the constants of
a chain. A map made of such layers can contract, and `equipoise.certify` proves it.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.contraction.bounds import require_one_parametrization
from equipoise.core.checks import check_ranges


class _Clip(torch.autograd.Function):
    """Clipping whose gradient vanishes only where a descent step would move a weight further outside."""

    @staticmethod
    def forward(weight: Tensor, bound: float) -> Tensor:
        return weight.clamp(-bound, bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        weight, bound = inputs
        ctx.save_for_backward(torch.where(weight.abs() >= bound, weight.sign(), 0.0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (outside,) = ctx.saved_tensors
        return torch.where(gradient * outside < 0, 0.0, gradient), None


class _Clipped(nn.Module):
    """Parametrization by `_Clip`."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        return _Clip.apply(weight, self.bound)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class MeanOnlyGroupNorm(nn.Module):
    r"""Group normalization without the division by the standard deviation.

    $$ y = \gamma\,(x - \mathrm{mean}_{\text{group}}(x)) + \delta, \qquad |\gamma| \le \gamma_{\max} $$

    Its constant is the largest $|\gamma|$, as centering is an orthogonal projection. The division has no useful
    constant, as the standard deviation may vanish.

    Args:
        num_groups: number of groups of channels; a group shares one mean, taken over its channels and pixels.
        num_channels: a multiple of `num_groups`.
        max_gamma: $\gamma_{\max}$. The forward pass clips larger weights; their gradients may still reduce them.
        affine: learn $\gamma$, which starts at $\min(1, \gamma_{\max})$, and $\delta$.

    Raises:
        ValueError: the groups do not divide the channels, or a bound is not positive.

    Source: Sato and Iiduka, "Lipschitz Multiscale Deep Equilibrium Models", AISTATS 2026, in the released code.
    """

    def __init__(self, num_groups: int, num_channels: int, *, max_gamma: float = 1.0, affine: bool = True) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_channels={num_channels} must be a multiple of num_groups={num_groups}")
        self.num_groups, self.num_channels, self.max_gamma, self.affine = num_groups, num_channels, max_gamma, affine
        check_ranges(self, max_gamma="> 0")
        if affine:
            self.weight = nn.Parameter(torch.full((num_channels,), min(1.0, max_gamma)))
            self.bias = nn.Parameter(torch.zeros(num_channels))
            parametrize.register_parametrization(self, "weight", _Clipped(max_gamma))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`."""
        mean = x.unflatten(1, (self.num_groups, -1)).mean(dim=(2, 3, 4))
        mean = mean.repeat_interleave(self.num_channels // self.num_groups, dim=1)
        if not self.affine:
            return x - mean[:, :, None, None]
        weight = self.weight
        shift = self.bias - weight * mean
        return torch.addcmul(shift[:, :, None, None], x, weight[:, None, None])

    def lipschitz_bound(self, training: bool) -> float:
        """The largest $|\\gamma|$."""
        return float(self.weight.detach().abs().amax()) if self.affine else 1.0

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, max_gamma={self.max_gamma}, affine={self.affine}"


class ScaledReLU(nn.Module):
    r"""The activation $s \max(x, 0)$ with a fixed slope, which is its constant.

    Args:
        slope: $s$ in (0, 1].

    Raises:
        ValueError: `slope` is out of range.

    Source: as `MeanOnlyGroupNorm`.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope
        check_ranges(self, slope="> 0 and <= 1")

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.relu(x) if self.slope == 1 else (x * self.slope).relu_()

    def lipschitz_bound(self, training: bool) -> float:
        """The slope."""
        return self.slope

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


class MaxMin(nn.Module):
    """Activation that sorts pairs of channels, the larger first; it preserves norms, so its constant is 1.

    Raises:
        ValueError: in the forward pass, for an odd number of channels.

    Source: C. Anil, J. Lucas, R. Grosse, "Sorting out Lipschitz function approximation", ICML 2019 (GroupSort 2).
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...) -> (B, C, ...)`, `C` even."""
        if x.shape[1] % 2:
            raise ValueError(f"MaxMin needs an even number of channels, got {x.shape[1]}")
        first, second = x.unflatten(1, (-1, 2)).unbind(2)
        return torch.stack([torch.maximum(first, second), torch.minimum(first, second)], dim=2).flatten(1, 2)

    def lipschitz_bound(self, training: bool) -> float:
        """One."""
        return 1.0


class NearestUpsample(nn.Upsample):
    """Nearest-neighbor upsampling by an integer factor, which is its constant.

    Args:
        factor: ratio of the new height and width to the old.

    Raises:
        ValueError: `factor` is below 1.
    """

    def __init__(self, factor: int) -> None:
        super().__init__(scale_factor=factor, mode="nearest")
        self.factor = factor
        check_ranges(self, factor=">= 1")

    def lipschitz_bound(self, training: bool) -> float:
        """The factor: every value is copied `factor^2` times."""
        return float(self.factor)


class IsometricUpsample(NearestUpsample):
    """Nearest-neighbor upsampling divided by its factor; it preserves norms, so its constant is 1.

    The counterpart for downsampling is `torch.nn.PixelUnshuffle`, which moves pixels into channels.

    Args:
        factor: ratio of the new height and width to the old.

    Raises:
        ValueError: `factor` is below 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, factor H, factor W)`."""
        return super().forward(x / self.factor)

    def lipschitz_bound(self, training: bool) -> float:
        """One."""
        return 1.0


class SLLBlock(nn.Module):
    r"""Residual block with constant 1, including its skip connection: the SDP-based Lipschitz layer (SLL).

    $$ y = z - 2 L^T \mathrm{ReLU}(L z + a), \qquad L = T^{-1/2} K, \qquad
       T_c = \sum_{c'} \sum_{\text{offsets}} |(K \star K)_{c c'}|\, q_{c'} / q_c $$

    The diagonal $T$ dominates $K K^T$, so $L L^T \preceq I$ and $\|y - y'\| \le \|z - z'\|$ for every kernel, with zero
    padding. The weights $K$ and $q > 0$ are unconstrained, and $L$ is computed once per solve.

    Args:
        channels: channels of the state.
        hidden: channels of $L z$.
        kernel_size: an odd number.

    Raises:
        ValueError: `kernel_size` is even.

    Example:
        >>> import torch
        >>> from equipoise.contraction import SLLBlock
        >>> block = SLLBlock(4, 8)
        >>> a, b = torch.randn(2, 1, 4, 6, 6)
        >>> bool((block(a) - block(b)).norm() <= (a - b).norm())
        True

    Source: A. Araujo et al., "A Unified Algebraic Perspective on Lipschitz Neural Networks", ICLR 2023; written with
        $T^{-1/2}$ on both sides, as ReLU commutes with positive factors.
    """

    def __init__(self, channels: int, hidden: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd")
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(torch.empty(hidden, channels, kernel_size, kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.zeros(hidden))
        parametrize.register_parametrization(self, "weight", _Dominated())

    def forward(self, z: Tensor, u: Tensor | None = None) -> Tensor:
        """Evaluate the block.

        Args:
            z: `(B, channels, H, W)`.
            u: `(B, hidden, H, W)` injection, added to the bias to give $a$; None: the bias alone.

        Returns:
            `(B, channels, H, W)`.
        """
        weight = self.weight
        h = F.conv2d(z, weight, self.bias, padding=self.padding)
        h = torch.relu(h if u is None else h + u)
        # The transpose of a convolution with stride 1 is a convolution with the flipped kernel.
        back = F.conv2d(h, weight.transpose(0, 1).flip(2, 3), padding=self.padding)
        return torch.add(z, back, alpha=-2)

    def lipschitz_bound(self, training: bool) -> float:
        """One."""
        require_one_parametrization(self)
        return 1.0


class _Dominated(nn.Module):
    """Parametrization that scales the rows of a kernel so that its operator norm is at most 1."""

    def forward(self, kernel: Tensor, log_scale: Tensor) -> Tensor:
        with torch.autocast(kernel.device.type, enabled=False):
            products = F.conv2d(kernel, kernel, padding=kernel.shape[-1] - 1).abs().sum(dim=(2, 3))
            scale = log_scale.exp()
            rows = products @ scale / scale
            return kernel * rows.clamp_min(torch.finfo(kernel.dtype).tiny).rsqrt()[:, None, None, None]

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, weight.new_zeros(weight.shape[0])


class LevelWeights(nn.Module):
    r"""Nonnegative weights of the sums over levels in a multiscale map, $y_i = \sum_j A_{ij} T_{ij}(b_j)$.

    - `softmax`: $A_{ii} = 1 - \beta$; a softmax over $-\max(j - i, 0)$ shares $\beta$ among the other levels $j$, of
      which those above $i$ are coarser.
    - `uniform`: $A_{ii} = 1 - \beta$, and equal shares for the others.
    - `learned`: $A = |V| / \|V\|_2$, which starts proportional to `softmax`.

    Args:
        num_levels: number of levels.
        mode: one of the above.
        exchange: $\beta$ in [0, 1].

    Raises:
        ValueError: `mode` is unknown or `exchange` is out of range.

    Source: as `MeanOnlyGroupNorm`; the learned weights are ours.
    """

    def __init__(
        self, num_levels: int, mode: Literal["softmax", "uniform", "learned"], *, exchange: float = 0.3
    ) -> None:
        super().__init__()
        if mode not in ("softmax", "uniform", "learned"):
            raise ValueError(f"mode={mode!r}: must be softmax, uniform or learned")
        self.mode, self.exchange = mode, exchange
        check_ranges(self, exchange=">= 0 and <= 1")
        fixed = torch.ones(1, 1) if num_levels == 1 else _shares(num_levels, mode, exchange)
        if mode == "learned":
            self.weight: Tensor = nn.Parameter(fixed)
            parametrize.register_parametrization(self, "weight", _UnitNorm())
        else:
            self.weight = nn.Buffer(fixed, persistent=False)

    def forward(self) -> Tensor:
        """Return the weights, `(n, n)`."""
        return self.weight

    def extra_repr(self) -> str:
        return f"mode={self.mode}"


class _UnitNorm(nn.Module):
    """Parametrization by absolute values over their spectral norm."""

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight.abs()
        return weight / torch.linalg.matrix_norm(weight, ord=2)


def _shares(n: int, mode: str, exchange: float) -> Tensor:
    target, source = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    score = torch.zeros(n, n) if mode == "uniform" else -(source - target).clamp_min(0).to(torch.get_default_dtype())
    share = score.masked_fill(source == target, -torch.inf).softmax(dim=1)
    return exchange * share + (1 - exchange) * torch.eye(n)
