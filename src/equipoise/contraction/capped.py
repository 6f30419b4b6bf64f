"""Convolution with a capped operator norm, by a parametrization that is computed once per solve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.contraction.bounds import require_one_parametrization
from equipoise.contraction.operator_norm import conv_norm_bound, conv_power_iteration
from equipoise.core.checks import check_ranges

MOVED = 0.05  # relative change of a kernel after which its bound is renewed


class CappedConv2d(nn.Conv2d):
    r"""Zero-padded convolution with an operator norm of at most `cap`.

    $$ W = K \min(1, c / \|K\|) $$

    The weight is computed from the kernel once per solve. In evaluation mode $\|K\|$ is the bound of
    `conv_norm_bound`, so the cap is proved. In training mode that would be too expensive in every step, and $\|K\|$ is
    an estimate: two power iterations whenever the kernel has changed, times the ratio of the bound to the estimate at
    the last renewal. A renewal takes place when the kernel has moved by a twentieth of itself in the Frobenius norm
    (later if it is far below its cap), and the estimate never falls below the last bound. So the cap is proved at a
    renewal; in between, small changes can exceed it, in the tests by at most a tenth. The gradient is that of the
    leading singular value in either mode.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: an odd number.
        stride: stride of the convolution.
        cap: $c$.
        size: largest height and width of the input images; norms grow with them.
        bias: learn a bias.

    Raises:
        ValueError: `cap` or `size` is not positive, or `kernel_size` is even; in the forward pass, an image is larger
            than `size`.

    Example:
        >>> import torch
        >>> from equipoise.contraction import CappedConv2d, lipschitz_bound
        >>> conv = CappedConv2d(4, 8, 3, cap=0.5, size=8).eval()
        >>> lipschitz_bound(conv) <= 0.5 * (1 + 1e-6)
        True

    Source: the cap is that of Sato and Iiduka (2026), on the norm of the operator instead of the reshaped kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        cap: float,
        size: int | tuple[int, int],
        bias: bool = False,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd")
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias)
        self.size = (size, size) if isinstance(size, int) else size
        self.cap = cap
        check_ranges(self, cap="> 0", size=">= 1")
        # The norm of a 1x1 convolution does not depend on the image, so one pixel is enough.
        image, step = (self.size, stride) if kernel_size > 1 else ((1, 1), 1)
        parametrize.register_parametrization(self, "weight", _Cap(self.weight, cap, image, step, kernel_size // 2))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))`."""
        if x.shape[-2] > self.size[0] or x.shape[-1] > self.size[1]:
            raise ValueError(
                f"an image of {tuple(x.shape[-2:])} pixels is larger than size={self.size} of this layer; crop it, or "
                "build the layer with a larger size"
            )
        return super().forward(x)

    def lipschitz_bound(self, training: bool) -> float:
        """Bound the norm of the weight of the present mode, in 64-bit arithmetic."""
        require_one_parametrization(self)
        weight = self.weight.detach().double()
        return float(conv_norm_bound(weight, self.size, stride=self.stride[0], padding=int(self.padding[0])))

    def train(self, mode: bool = True) -> CappedConv2d:
        """Switch the mode; a switch to evaluation renews the bound."""
        if parametrize.is_parametrized(self, "weight"):  # a user may have removed the cap
            parts: Any = self.parametrizations["weight"]  # type: ignore[index]
            if parts[0].following and not mode:
                parts[0].renew(parts.original)
            parts[0].following = mode
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cap={self.cap}, size={self.size}"


class _Cap(nn.Module):
    """Parametrization that scales a kernel down to its cap.

    Changes of the kernel are found by its values: PyTorch's version counters miss the writes of fused optimizers.
    """

    def __init__(self, kernel: Tensor, cap: float, size: tuple[int, int], stride: int, padding: int) -> None:
        super().__init__()
        self.cap, self.size, self.stride, self.padding = cap, size, stride, padding
        # Not `training`, which a backward pass switches off although it needs the weights of the forward pass.
        self.following = True
        self.known: tuple[Tensor, Tensor] | None = None  # a kernel and its bound
        with torch.no_grad():
            image = torch.randn(1, kernel.shape[1], *size, dtype=kernel.dtype, device=kernel.device)
            norm, image = self._iterate(kernel, image, 20)
            self.vector = nn.Buffer(image)
            # Kernel of the last power iteration.
            self.followed = nn.Buffer(torch.full_like(kernel, torch.nan), persistent=False)
            # Bound at the last renewal, and its ratio to the estimate.
            self.bound = nn.Buffer(self._bound(kernel).to(kernel.dtype))
            self.slack = nn.Buffer(_ratio(self.bound, norm))
            # Random projections of the kernel of that bound nearly preserve distances, so a checkpoint need not hold
            # a second kernel.
            signs = torch.randint(2, (kernel[0].numel(), 4), generator=torch.Generator().manual_seed(0), device="cpu")
            self.probe = nn.Buffer((2 * signs - 1).to(kernel), persistent=False)
            self.sketch = nn.Buffer(kernel.flatten(1) @ self.probe)

    def forward(self, kernel: Tensor) -> Tensor:
        with torch.autocast(kernel.device.type, enabled=False):
            return kernel * (self.cap / self._norm(kernel).clamp_min(self.cap))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def _norm(self, kernel: Tensor) -> Tensor:
        """Estimate or bound the norm, with the derivative of the leading singular value."""
        if self.following and self.training:
            self._follow(kernel)
        if not self.following and not torch.is_grad_enabled():
            return self._bound(kernel)
        norm, _ = self._iterate(kernel, self.vector.clone(), 0)
        if self.following:
            norm = norm * self.slack
            if torch.compiler.is_compiling():  # a traced graph has no renewals
                return norm
            # The estimate can fall while another singular value overtakes the followed one.
            return norm + (self.bound - norm.detach()).clamp_min(0)
        bound, found = self._bound(kernel), norm.detach()
        return bound + (norm - found) * _ratio(bound, found)

    @torch.no_grad()
    def _follow(self, kernel: Tensor) -> None:
        """Adapt the power iteration to a kernel that has changed, and renew the bound if it is due."""
        changed = (kernel != self.followed).any()
        tracing = torch.compiler.is_compiling()
        if not tracing and not bool(changed):
            return
        _, image = self._iterate(kernel, self.vector, 2)
        self.vector.copy_(torch.where(changed, image, self.vector))
        self.followed.copy_(kernel)
        moved = (kernel.flatten(1) @ self.probe - self.sketch).norm()
        # A kernel far below its cap is not scaled, and may move by a quarter of its distance to the cap.
        allowed = ((self.cap / self.bound - 1) / 4).clamp_min(MOVED) * self.sketch.norm()
        if not tracing and not bool(moved <= allowed):
            self.renew(kernel)

    @torch.no_grad()
    def renew(self, kernel: Tensor) -> None:
        """Renew the bound and its ratio to the power iteration, after four more iterations."""
        norm, image = self._iterate(kernel, self.vector, 4)
        self.vector.copy_(image)
        self.bound.copy_(self._bound(kernel))
        self.slack.copy_(_ratio(self.bound, norm))
        self.sketch.copy_(kernel.flatten(1) @ self.probe)

    @torch.no_grad()
    def _bound(self, kernel: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._compute(kernel)
        if self.known is None or self.known[0].dtype != kernel.dtype or not torch.equal(self.known[0], kernel):
            self.known = kernel.clone(), self._compute(kernel)
        return self.known[1]

    def _compute(self, kernel: Tensor) -> Tensor:
        return conv_norm_bound(kernel, self.size, stride=self.stride, padding=self.padding)

    def _iterate(self, kernel: Tensor, image: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        return conv_power_iteration(kernel, image, stride=self.stride, padding=self.padding, iterations=iterations)

    def _apply(self, fn: Any, recurse: bool = True) -> _Cap:
        self.known = None  # the type or device may change
        return super()._apply(fn, recurse)


def _ratio(bound: Tensor, norm: Tensor) -> Tensor:
    """Ratio of a bound to a norm; 1 for a kernel of zeros."""
    return torch.where(norm > 0, bound / norm, 1.0)
