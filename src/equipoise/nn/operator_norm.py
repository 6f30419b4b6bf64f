"""Norms of convolutions as operators on zero-padded images: bounds from above, and power iteration from below.

The norm of the reshaped kernel is not the norm of the convolution: for a 3x3 kernel it can be three times too small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SQUARINGS = (
    4  # of a Gram matrix of r rows: its bound is then at most r^(1/64) times the norm, mostly a percent above it
)


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
        Scalar of the kernel's dtype; differentiable.

    Example:
        >>> import torch
        >>> from equipoise.nn import conv_norm_bound
        >>> box = torch.ones(1, 1, 3, 3) / 9  # a mean of nine pixels enlarges nothing
        >>> round(float(conv_norm_bound(box, (16, 16), padding=1, exact=True)), 6)
        1.0

    Source: the torus and the strided form are derived in the documentation; Gram iteration is of B. Delattre et al.,
    "Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration", ICML 2023.
    """
    matrices = _symbols(kernel, size, stride, padding)
    norms = torch.linalg.matrix_norm(matrices, ord=2) if exact else _gram_bound(matrices)
    return norms.amax()


def _symbols(kernel: Tensor, size: tuple[int, int], stride: int, padding: int) -> Tensor:
    """One matrix per frequency, `(F, C_out, q^2 C_in)`, over q; of two conjugate frequencies only one."""
    if kernel.shape[-2:] == (1, 1) and padding == 0:
        return kernel.flatten(1)[None]  # the same at every pixel, and a stride only leaves pixels out
    sides = [-(-max(n + padding, kernel.shape[-1]) // stride) * stride for n in size]
    if stride == 1:
        return torch.fft.rfft2(kernel, s=sides).flatten(2).permute(2, 0, 1)
    rows, columns = (side // stride for side in sides)
    waves = torch.fft.fft2(kernel, s=sides).unflatten(3, (stride, columns)).unflatten(2, (stride, rows))
    # (C_out, C_in, q, rows, q, columns): frequencies that a stride maps onto one another stand side by side
    half = waves[..., : columns // 2 + 1]
    return half.permute(3, 5, 0, 2, 4, 1).flatten(0, 1).flatten(2) / stride


def _gram_bound(matrices: Tensor) -> Tensor:
    """Upper bounds of the spectral norms of `(F, m, n)`, by repeated squaring of the smaller Gram matrix."""
    m, n = matrices.shape[-2:]
    tiny = torch.finfo(matrices.dtype).tiny
    unit = matrices.detach().abs().amax().clamp_min(tiny)  # squares neither overflow nor vanish
    matrices = matrices / unit
    gram = matrices @ matrices.mH if m <= n else matrices.mH @ matrices
    log = torch.zeros(gram.shape[:-2], dtype=matrices.real.dtype, device=matrices.device)
    for _ in range(SQUARINGS):
        size = torch.linalg.matrix_norm(gram).clamp_min(tiny)
        gram = gram / size[..., None, None]
        gram = gram @ gram
        log = 2 * (log + size.log())
    log = log + torch.linalg.matrix_norm(gram).clamp_min(tiny).log()
    return (log / 2 ** (SQUARINGS + 1)).exp() * unit


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
