"""Norms of convolutions as operators on zero-padded images: bounds from above, and power iteration from below.

The norm of the reshaped kernel is not the norm of the convolution: for a 3x3 kernel it can be three times too small.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a Gram matrix of r rows: its bound is then at most r^(1/64) times the norm, mostly a percent above it.
SQUARINGS = 4


def conv_norm_bound(
    kernel: Tensor, size: tuple[int, int], *, stride: int = 1, padding: int = 0, exact: bool = False
) -> Tensor:
    r"""Upper bound of the norm of a zero-padded convolution, for all images up to a size.

    The convolution is a part of a circular one on a torus of side $N \ge n + p$, whose norm is the largest over the
    frequencies $\omega$ of $\|\hat K(\omega)\|_2$; with a stride $q$, of the $q^2$ aliased matrices side by side,
    divided by $q$. The norm of each matrix is bounded by Gram iteration,
    $\|A\|_2 \le \|(A^* A)^{2^t}\|_F^{1 / 2^{t+1}}$, which holds for every $t$.

    Args:
        kernel: `(C_out, C_in, k, k)`.
        size: largest height and width of the input images.
        stride: $q$.
        padding: $p$, zeros on each side.
        exact: take the singular values instead of the Gram iteration; slower, about a percent tighter.

    Returns:
        Scalar, of the dtype of the kernel, or float32 if that is half; differentiable.

    Example:
        >>> import torch
        >>> from equipoise.contraction import conv_norm_bound
        >>> box = torch.ones(1, 1, 3, 3) / 9  # a mean of nine pixels enlarges nothing
        >>> round(float(conv_norm_bound(box, (16, 16), padding=1, exact=True)), 6)
        1.0

    Source: the torus and the strided form are derived in the documentation; Gram iteration is of B. Delattre et al.,
    "Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration", ICML 2023.
    """
    with torch.autocast(kernel.device.type, enabled=False):
        kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
        matrices = _symbols(kernel, size, stride, padding)
        return torch.linalg.matrix_norm(matrices, ord=2).amax() if exact else _gram_bound(matrices)


def _symbols(kernel: Tensor, size: tuple[int, int], stride: int, padding: int) -> Tensor:
    """One matrix per frequency, `(F, C_out, q^2 C_in)`, over q; of two conjugate frequencies only one."""
    outs, ins, *taps = kernel.shape
    if taps == [1, 1] and padding == 0:
        return kernel.flatten(1)[None]  # the same at every pixel, and a stride only leaves pixels out
    sides = [-(-max(n + padding, k) // stride) * stride for n, k in zip(size, taps, strict=True)]
    low = sides[0] // stride, sides[1] // stride // 2 + 1
    angles = []
    for side, count, k in zip(sides, low, taps, strict=True):
        # (count, q, k): frequencies that a stride maps onto one another stand side by side
        shifts = torch.arange(0, side, side // stride, device=kernel.device)
        frequencies = torch.arange(count, device=kernel.device)[:, None] + shifts
        turns = frequencies[..., None] * torch.arange(k, device=kernel.device) % side
        angles.append(turns.to(kernel.dtype) * (-2 * math.pi / side))
    angle = (angles[0][:, None, :, None, :, None] + angles[1][:, None, :, None, :]).reshape(-1, math.prod(taps))
    # The transform of so few taps is a product, and gives the matrices in the order in which they are needed.
    pixels = kernel.flatten(2).permute(2, 0, 1).flatten(1)
    waves = torch.complex(angle.cos() @ pixels, angle.sin() @ pixels)
    if stride == 1:
        return waves.unflatten(1, (outs, ins))
    return waves.view(-1, stride**2, outs, ins).transpose(1, 2).flatten(2) / stride


def _gram_bound(matrices: Tensor) -> Tensor:
    """Upper bound of the largest spectral norm of `(F, m, n)`, by repeated squaring of the smaller Gram matrices."""
    m, n = matrices.shape[-2:]
    # So scaled, squares neither overflow nor vanish.
    unit = _parts(matrices.detach()).abs().amax().clamp_min(torch.finfo(matrices.dtype).tiny)
    matrices = _scaled(matrices, 1 / unit.expand(len(matrices)))
    gram = matrices @ matrices.mH if m <= n else matrices.mH @ matrices
    log = torch.zeros(len(gram), dtype=unit.dtype, device=unit.device)
    for _ in range(SQUARINGS):
        size = _frobenius(gram)
        gram = _scaled(gram, 1 / size)
        gram = gram @ gram
        log = 2 * (log + size.log())
    log = log + _frobenius(gram).log()
    return (log.amax() / 2 ** (SQUARINGS + 1)).exp() * unit


def _frobenius(matrices: Tensor) -> Tensor:
    """`(F,)`, positive."""
    return torch.linalg.vector_norm(_parts(matrices).flatten(1), dim=1).clamp_min(torch.finfo(matrices.dtype).tiny)


def _parts(matrices: Tensor) -> Tensor:
    """Real and imaginary parts: norms of complex numbers, and products with real ones, are several times slower."""
    return torch.view_as_real(matrices) if matrices.is_complex() else matrices


def _scaled(matrices: Tensor, factors: Tensor) -> Tensor:
    if not matrices.is_complex():
        return matrices * factors[:, None, None]
    return torch.view_as_complex(torch.view_as_real(matrices) * factors[:, None, None, None])


def conv_power_iteration(
    kernel: Tensor, image: Tensor, *, stride: int = 1, padding: int = 0, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    r"""Power iteration on a convolution, `image <- K^T K image`: a lower bound of its norm.

    Args:
        kernel: `(C_out, C_in, k, k)`.
        image: `(1, C_in, H, W)` start, not zero.
        stride: of the convolution.
        padding: zeros on each side.
        iterations: convolutions and transposed convolutions.

    Returns:
        The bound, a scalar, and the image of unit norm that it belongs to.
    """
    for _ in range(iterations):
        out = F.conv2d(image, kernel, stride=stride, padding=padding)
        back = conv_transpose(out, kernel, image.shape[-2:], stride=stride, padding=padding)
        size = torch.linalg.vector_norm(back)
        # Of a kernel that is zero for now, nothing is learned, and the image is still a start for the next one.
        image = torch.where(size > 0, back / size.clamp_min(torch.finfo(back.dtype).tiny), image)
    return torch.linalg.vector_norm(F.conv2d(image, kernel, stride=stride, padding=padding)), image


def conv_transpose(out: Tensor, kernel: Tensor, size: torch.Size, *, stride: int = 1, padding: int = 0) -> Tensor:
    """The transpose of a convolution of images of some height and width, applied to what it gives."""
    rest = [
        n + 2 * padding - (m - 1) * stride - k for n, m, k in zip(size, out.shape[-2:], kernel.shape[-2:], strict=True)
    ]
    return F.conv_transpose2d(out, kernel, stride=stride, padding=padding, output_padding=rest)
