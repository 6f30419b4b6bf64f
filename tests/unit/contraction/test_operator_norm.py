"""Norms of convolutions: against singular values of their dense matrices, zero-padded and circular."""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import conv_matrix
from torch import Tensor

from equipoise.contraction import conv_norm_bound
from equipoise.contraction.operator_norm import SQUARINGS, conv_power_iteration, conv_transpose

CASES = [  # C_out, C_in, kernel, image, stride, padding
    (3, 2, 3, (4, 4), 1, 1),
    (2, 3, 3, (5, 7), 1, 1),
    (4, 2, 3, (6, 6), 2, 1),
    (2, 3, 3, (7, 4), 2, 1),
    (3, 4, 1, (4, 3), 1, 0),
    (3, 2, 1, (5, 5), 2, 0),
    (2, 2, 5, (6, 6), 1, 2),
    (2, 2, 5, (8, 7), 3, 2),
    (2, 3, 3, (1, 1), 1, 1),
    (3, 2, 3, (2, 1), 2, 1),
    (2, 1, 3, (6, 6), 1, 0),
    (1, 2, 1, (3, 3), 1, 2),  # more padding than the kernel reaches
    (2, 2, 3, (4, 5), 2, 2),
    (2, 2, 2, (5, 5), 1, 1),
]
cases = pytest.mark.parametrize(("outs", "ins", "k", "size", "stride", "padding"), CASES)
Size = tuple[int, int]


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


def bound(kernel: Tensor, size: Size, stride: int = 1, padding: int = 1, *, exact: bool = False) -> float:
    return float(conv_norm_bound(kernel, size, stride=stride, padding=padding, exact=exact))


@cases
def test_bounds(outs: int, ins: int, k: int, size: Size, stride: int, padding: int) -> None:
    for seed in range(5):
        kernel = torch.randn(outs, ins, k, k, generator=torch.Generator().manual_seed(seed))
        found = norm(conv_matrix(kernel, size, stride, padding))
        exact = bound(kernel, size, stride, padding, exact=True)
        # |A^(2^t)|_F <= sqrt(rank) |A^(2^t)|_2.
        most = exact * min(outs, stride**2 * ins) ** (0.5**SQUARINGS / 4) * (1 + 1e-12)
        assert found * (1 - 1e-12) <= exact <= bound(kernel, size, stride, padding) * (1 + 1e-12) <= most * (1 + 1e-12)
        if k == 1 and padding == 0:
            assert found == pytest.approx(exact, rel=1e-12)


@cases
def test_smaller_images(outs: int, ins: int, k: int, size: Size, stride: int, padding: int) -> None:
    kernel = torch.randn(outs, ins, k, k)
    exact = bound(kernel, size, stride, padding, exact=True)
    for height in range(1, size[0] + 1):
        for width in range(1, size[1] + 1):
            if min(height, width) + 2 * padding >= k:
                assert norm(conv_matrix(kernel, (height, width), stride, padding)) <= exact * (1 + 1e-12)


@pytest.mark.parametrize(("k", "side", "stride"), [(3, 6, 1), (3, 6, 2), (5, 9, 3), (3, 8, 4), (1, 4, 2)])
def test_circular_convolution(k: int, side: int, stride: int) -> None:
    kernel, p = torch.randn(3, 2, k, k), k // 2
    images = torch.eye(2 * side**2).view(-1, 2, side, side)
    circular = F.conv2d(F.pad(images, (p, p, p, p), mode="circular"), kernel, stride=stride).flatten(1).T
    exact = bound(kernel, (side - p, side - p), stride, p, exact=True)
    assert exact == pytest.approx(norm(circular), rel=1e-10)


def test_known_symbols() -> None:
    laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).view(1, 1, 3, 3)
    assert bound(laplacian, (7, 7), exact=True) == pytest.approx(8.0)
    dirichlet = 4 + 4 * math.cos(math.pi / 8)  # its largest eigenvalue on 7 x 7 pixels with zeros around
    assert norm(conv_matrix(laplacian, (7, 7), 1, 1)) == pytest.approx(dirichlet)
    for exact in (True, False):
        assert bound(torch.ones(5, 1, 1, 1), (9, 9), padding=0, exact=exact) == pytest.approx(math.sqrt(5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outs", "ins", "n", "stride", "reshaped", "found", "gram"),
    [
        (32, 160, 32, 1, 0.649, 0.839, 0.843),
        (64, 32, 32, 2, 0.859, 1.058, 1.063),
        (256, 128, 8, 2, 0.845, 1.027, 1.061),
    ],
)
def test_initialization(outs: int, ins: int, n: int, stride: int, reshaped: float, found: float, gram: float) -> None:
    """Norms of random kernels, measured once; those of the reshaped kernels are too small."""
    kernel = torch.nn.Conv2d(ins, outs, 3, dtype=torch.float32).weight.detach()
    image = torch.randn(1, ins, n, n, dtype=torch.float32)
    true = float(conv_power_iteration(kernel, image, stride=stride, padding=1, iterations=30)[0])
    above, below = bound(kernel, (n, n), stride), norm(kernel.flatten(1))
    assert (below, true, above) == pytest.approx((reshaped, found, gram), rel=0.06)
    assert 1.1 * below < true <= above <= math.ceil(3 / stride) * below


def test_reshaped_kernel() -> None:
    kernel = torch.ones(1, 1, 3, 3)
    assert norm(conv_matrix(kernel, (16, 16), 1, 1)) > 2.9 * norm(kernel.flatten(1))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("n", [8, 16])
def test_tightness(k: int, stride: int, n: int) -> None:
    kernel, image = torch.randn(6, 4, k, k), torch.randn(1, 4, n, n)
    true = float(conv_power_iteration(kernel, image, stride=stride, padding=k // 2, iterations=200)[0])
    exact = bound(kernel, (n, n), stride, k // 2, exact=True)
    assert true * (1 - 1e-12) <= exact <= 1.1 * true
    assert bound(kernel, (n, n), stride, k // 2) <= 1.03 * exact


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_gradients(exact: bool, k: int, stride: int) -> None:
    kernel = torch.randn(2, 3, k, k, requires_grad=True)
    options = {"size": (5, 4), "stride": stride, "padding": k // 2, "exact": exact}
    assert torch.autograd.gradcheck(lambda w: conv_norm_bound(w, **options), (kernel,))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_scale_beyond_the_range_of_squares(scale: float) -> None:
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float32)
    assert bound(kernel * scale, (6, 6)) == pytest.approx(bound(kernel, (6, 6)) * scale, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision(dtype: torch.dtype) -> None:
    kernel = torch.randn(3, 2, 3, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = conv_norm_bound(kernel.to(dtype), (6, 6), padding=1)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(bound(kernel.double(), (6, 6)), rel=1e-6)


def test_kernel_of_zeros() -> None:
    kernel = torch.zeros(2, 2, 3, 3, requires_grad=True)
    found = conv_norm_bound(kernel, (4, 4), padding=1)
    found.backward()
    assert 0 <= float(found.detach()) < 1e-100
    assert bool(kernel.grad.isfinite().all())


@cases
def test_power_iteration(outs: int, ins: int, k: int, size: Size, stride: int, padding: int) -> None:
    kernel, image = torch.randn(outs, ins, k, k), torch.randn(1, ins, *size)
    matrix, dense = conv_matrix(kernel, size, stride, padding), image.flatten()
    out = F.conv2d(image, kernel, stride=stride, padding=padding)
    back = conv_transpose(out, kernel, image.shape[-2:], stride=stride, padding=padding)
    torch.testing.assert_close(back.flatten(), matrix.T @ (matrix @ dense))
    for _ in range(4):
        dense = matrix.T @ (matrix @ dense)
        dense = dense / dense.norm()
    found, v = conv_power_iteration(kernel, image, stride=stride, padding=padding, iterations=4)
    torch.testing.assert_close(v.flatten(), dense)
    assert float(found) == pytest.approx(float((matrix @ dense).norm()))
    assert float(found) <= norm(matrix) * (1 + 1e-12)


def test_power_iteration_rises_to_the_norm() -> None:
    kernel, image = torch.randn(3, 2, 3, 3), torch.randn(1, 2, 6, 6)
    rising = [float(conv_power_iteration(kernel, image, padding=1, iterations=i)[0]) for i in (1, 2, 4, 8, 400)]
    assert rising == sorted(rising)
    assert rising[-1] == pytest.approx(norm(conv_matrix(kernel, (6, 6), 1, 1)), rel=1e-6)


def test_power_iteration_on_zeros() -> None:
    image = torch.randn(1, 2, 4, 4)
    found, after = conv_power_iteration(torch.zeros(3, 2, 3, 3), image, padding=1, iterations=3)
    assert float(found) == 0
    assert torch.equal(after, image)
