"""Operator norms of convolutions on zero-padded images: upper bounds, and lower bounds by power iteration.

The norm of the reshaped kernel is not the norm of the convolution: for a 3x3 kernel it can be three times too small.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# With four squarings the bound is at most r^(1/64) times the norm for a Gram matrix of r rows, often a percent above.
SQUARINGS = 4


def conv_norm_bound(
    kernel: Tensor, size: tuple[int, int], *, stride: int = 1, padding: int = 0, exact: bool = False
) -> Tensor:
    r"""Bound the norm of a zero-padded convolution from above, for all images up to a size.

    The convolution is a restriction of a circular one on a torus of side $N \ge n + p$. The norm of that is the maximum
    of $\|\hat K(\omega)\|_2$ over the frequencies $\omega$; with a stride $q$, $\hat K(\omega)$ is the $q^2$ aliased
    matrices side by side, divided by $q$. Gram iteration bounds the norm of each matrix,
    $\|A\|_2 \le \|(A^* A)^{2^t}\|_F^{1 / 2^{t+1}}$ for every $t$.

    Args:
        kernel: `(C_out, C_in, k, k)`.
        size: largest height and width of the input images.
        stride: $q$.
        padding: $p$, zeros on each side.
        exact: compute singular values instead of the Gram iteration; slower, about a percent tighter.

    Returns:
        Differentiable scalar in the dtype of the kernel, at least float32.

    Example:
        >>> import torch
        >>> from equipoise.contraction import conv_norm_bound
        >>> box = torch.ones(1, 1, 3, 3) / 9  # a mean of nine pixels
        >>> round(float(conv_norm_bound(box, (16, 16), padding=1, exact=True)), 6)
        1.0

    Source: the documentation derives the torus and the strided form; Gram iteration is from B. Delattre et al.,
    "Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration", ICML 2023.
    """
    with torch.autocast(kernel.device.type, enabled=False):
        kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
        matrices = _symbols(kernel, size, stride, padding)
        return torch.linalg.matrix_norm(matrices, ord=2).amax() if exact else _gram_bound(matrices)


def _symbols(kernel: Tensor, size: tuple[int, int], stride: int, padding: int) -> Tensor:
    r"""Return $\hat K(\omega)$ for one of each pair of conjugate frequencies, `(F, C_out, q^2 C_in)`."""
    outs, ins, *taps = kernel.shape
    if taps == [1, 1] and padding == 0:
        return kernel.flatten(1)[None]  # the same at every pixel; a stride only skips pixels
    sides = [-(-max(n + padding, k) // stride) * stride for n, k in zip(size, taps, strict=True)]
    low = sides[0] // stride, sides[1] // stride // 2 + 1
    angles = []
    for side, count, k in zip(sides, low, taps, strict=True):
        # (count, q, k): the q frequencies that a stride aliases are neighbors
        shifts = torch.arange(0, side, side // stride, device=kernel.device)
        frequencies = torch.arange(count, device=kernel.device)[:, None] + shifts
        turns = frequencies[..., None] * torch.arange(k, device=kernel.device) % side
        angles.append(turns.to(kernel.dtype) * (-2 * math.pi / side))
    angle = (angles[0][:, None, :, None, :, None] + angles[1][:, None, :, None, :]).reshape(-1, math.prod(taps))
    # For so few taps a matrix product is as fast as an FFT, and returns the matrices in the right order.
    pixels = kernel.flatten(2).permute(2, 0, 1).flatten(1)
    waves = torch.complex(angle.cos() @ pixels, angle.sin() @ pixels)
    if stride == 1:
        return waves.unflatten(1, (outs, ins))
    return waves.view(-1, stride**2, outs, ins).transpose(1, 2).flatten(2) / stride


def _gram_bound(matrices: Tensor) -> Tensor:
    """Bound the largest spectral norm of `(F, m, n)` by repeated squaring of the smaller Gram matrices."""
    m, n = matrices.shape[-2:]
    # This scale prevents overflow and underflow of the squares.
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
    """Return Frobenius norms, `(F,)`, positive."""
    return torch.linalg.vector_norm(_parts(matrices).flatten(1), dim=1).clamp_min(torch.finfo(matrices.dtype).tiny)


def _parts(matrices: Tensor) -> Tensor:
    """Return real and imaginary parts, whose norms and products with real factors are several times faster."""
    return torch.view_as_real(matrices) if matrices.is_complex() else matrices


def _scaled(matrices: Tensor, factors: Tensor) -> Tensor:
    if not matrices.is_complex():
        return matrices * factors[:, None, None]
    return torch.view_as_complex(torch.view_as_real(matrices) * factors[:, None, None, None])


def conv_power_iteration(
    kernel: Tensor, image: Tensor, *, stride: int = 1, padding: int = 0, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    r"""Bound the norm of a convolution from below, by power iteration `image <- K^T K image`.

    Args:
        kernel: `(C_out, C_in, k, k)`.
        image: `(1, C_in, H, W)` start, not zero.
        stride: stride of the convolution.
        padding: zeros on each side.
        iterations: number of iterations.

    Returns:
        The bound, a scalar, and the image of unit norm that attains it.
    """
    for _ in range(iterations):
        out = F.conv2d(image, kernel, stride=stride, padding=padding)
        back = conv_transpose(out, kernel, image.shape[-2:], stride=stride, padding=padding)
        size = torch.linalg.vector_norm(back)
        # A kernel of zeros leaves the image unchanged, as a start for the next kernel.
        image = torch.where(size > 0, back / size.clamp_min(torch.finfo(back.dtype).tiny), image)
    return torch.linalg.vector_norm(F.conv2d(image, kernel, stride=stride, padding=padding)), image


def conv_transpose(out: Tensor, kernel: Tensor, size: torch.Size, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Apply the transpose of a convolution of images of a size `(height, width)`."""
    rest = [
        n + 2 * padding - (m - 1) * stride - k for n, m, k in zip(size, out.shape[-2:], kernel.shape[-2:], strict=True)
    ]
    return F.conv_transpose2d(out, kernel, stride=stride, padding=padding, output_padding=rest)
