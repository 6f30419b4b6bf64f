"""Norms of convolutions: against singular values of their dense matrices, zero-padded and circular."""

from __future__ import annotations

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


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


@cases
def test_bounds_are_above_the_norm_of_the_dense_matrix_and_gram_iteration_above_the_singular_values(
    outs: int, ins: int, k: int, size: tuple[int, int], stride: int, padding: int
) -> None:
    for seed in range(5):
        kernel = torch.randn(outs, ins, k, k, generator=torch.Generator().manual_seed(seed))
        found = norm(conv_matrix(kernel, size, stride, padding))
        exact = float(conv_norm_bound(kernel, size, stride=stride, padding=padding, exact=True))
        gram = float(conv_norm_bound(kernel, size, stride=stride, padding=padding))
        assert found <= exact * (1 + 1e-12)
        assert exact <= gram * (1 + 1e-12)
        # |A^(2^t)|_F <= sqrt(rank) |A^(2^t)|_2.
        assert gram <= exact * min(outs, stride**2 * ins) ** (0.5**SQUARINGS / 4) * (1 + 1e-12)
        if k == 1 and padding == 0:
            assert found == pytest.approx(exact, rel=1e-12)


@cases
def test_a_bound_for_a_size_holds_for_smaller_images(
    outs: int, ins: int, k: int, size: tuple[int, int], stride: int, padding: int
) -> None:
    kernel = torch.randn(outs, ins, k, k)
    bound = float(conv_norm_bound(kernel, size, stride=stride, padding=padding, exact=True))
    for height in range(1, size[0] + 1):
        for width in range(1, size[1] + 1):
            if min(height, width) + 2 * padding >= k:
                assert norm(conv_matrix(kernel, (height, width), stride, padding)) <= bound * (1 + 1e-12)


@pytest.mark.parametrize(("k", "side", "stride"), [(3, 6, 1), (3, 6, 2), (5, 9, 3), (3, 8, 4), (1, 4, 2)])
def test_the_exact_bound_is_the_norm_of_the_circular_convolution(k: int, side: int, stride: int) -> None:
    kernel, p = torch.randn(3, 2, k, k), k // 2
    images = torch.eye(2 * side**2).view(-1, 2, side, side)
    circular = F.conv2d(F.pad(images, (p, p, p, p), mode="circular"), kernel, stride=stride).flatten(1).T
    bound = conv_norm_bound(kernel, (side - p, side - p), stride=stride, padding=p, exact=True)
    assert float(bound) == pytest.approx(norm(circular), rel=1e-10)


def test_bounds_of_kernels_whose_symbol_is_known() -> None:
    laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).view(1, 1, 3, 3)
    assert float(conv_norm_bound(laplacian, (7, 7), padding=1, exact=True)) == pytest.approx(8.0)
    dirichlet = 4 + 4 * math.cos(math.pi / 8)  # its largest eigenvalue on 7 x 7 pixels with zeros around
    assert norm(conv_matrix(laplacian, (7, 7), 1, 1)) == pytest.approx(dirichlet)
    copy = torch.ones(5, 1, 1, 1)
    assert float(conv_norm_bound(copy, (9, 9), exact=True)) == pytest.approx(math.sqrt(5))
    assert float(conv_norm_bound(copy, (9, 9))) == pytest.approx(math.sqrt(5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outs", "ins", "k", "n", "stride", "reshaped", "found", "bound"),
    [
        (32, 160, 3, 32, 1, 0.649, 0.839, 0.843),
        (64, 32, 3, 32, 2, 0.859, 1.058, 1.063),
        (256, 128, 3, 8, 2, 0.845, 1.027, 1.061),
    ],
)
def test_at_initialisation_the_norms_are_those_measured_and_not_those_of_the_reshaped_kernel(
    outs: int, ins: int, k: int, n: int, stride: int, reshaped: float, found: float, bound: float
) -> None:
    kernel = torch.nn.Conv2d(ins, outs, k, dtype=torch.float32).weight.detach()
    true, _ = conv_power_iteration(
        kernel, torch.randn(1, ins, n, n, dtype=torch.float32), stride=stride, padding=1, iterations=30
    )
    gram = conv_norm_bound(kernel, (n, n), stride=stride, padding=1)
    # Random kernels of this size differ by some percent.
    assert norm(kernel.flatten(1)) == pytest.approx(reshaped, rel=0.06)
    assert float(true) == pytest.approx(found, rel=0.06)
    assert float(gram) == pytest.approx(bound, rel=0.06)
    assert 1.1 * norm(kernel.flatten(1)) < float(true) <= float(gram)
    assert float(gram) <= math.ceil(k / stride) * norm(kernel.flatten(1))


def test_the_reshaped_kernel_can_be_three_times_too_small() -> None:
    kernel = torch.ones(1, 1, 3, 3)
    assert norm(conv_matrix(kernel, (16, 16), 1, 1)) > 2.9 * norm(kernel.flatten(1))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("n", [8, 16])
def test_the_bound_is_within_a_tenth_of_the_norm(k: int, stride: int, n: int) -> None:
    kernel = torch.randn(6, 4, k, k)
    true, _ = conv_power_iteration(kernel, torch.randn(1, 4, n, n), stride=stride, padding=k // 2, iterations=200)
    exact = float(conv_norm_bound(kernel, (n, n), stride=stride, padding=k // 2, exact=True))
    gram = float(conv_norm_bound(kernel, (n, n), stride=stride, padding=k // 2))
    assert float(true) * (1 - 1e-12) <= exact <= 1.1 * float(true)
    assert gram <= 1.03 * exact


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_bounds_are_differentiable(exact: bool, k: int, stride: int) -> None:
    kernel = torch.randn(2, 3, k, k, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: conv_norm_bound(w, (5, 4), stride=stride, padding=k // 2, exact=exact), (kernel,)
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_bounds_scale_with_the_kernel_far_beyond_where_its_square_overflows_or_vanishes(scale: float) -> None:
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float32)
    one, scaled = (conv_norm_bound(w, (6, 6), padding=1) for w in (kernel, kernel * scale))
    assert float(scaled) == pytest.approx(float(one) * scale, rel=1e-5)


def test_bounds_are_not_rounded_by_autocast_nor_in_half_precision() -> None:
    kernel = torch.randn(3, 2, 3, 3).bfloat16()
    expected = conv_norm_bound(kernel.double(), (6, 6), padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [conv_norm_bound(kernel.to(dtype), (6, 6), padding=1) for dtype in (torch.bfloat16, torch.float32)]
    for bound in found:
        assert bound.dtype == torch.float32
        assert float(bound) == pytest.approx(float(expected), rel=1e-6)


def test_a_kernel_of_zeros_has_a_bound_and_a_gradient() -> None:
    kernel = torch.zeros(2, 2, 3, 3, requires_grad=True)
    bound = conv_norm_bound(kernel, (4, 4), padding=1)
    bound.backward()
    assert 0 <= float(bound.detach()) < 1e-100
    assert kernel.grad is not None
    assert bool(kernel.grad.isfinite().all())


@cases
def test_the_transpose_and_power_iteration_are_those_of_the_dense_matrix(
    outs: int, ins: int, k: int, size: tuple[int, int], stride: int, padding: int
) -> None:
    kernel, image = torch.randn(outs, ins, k, k), torch.randn(1, ins, *size)
    matrix = conv_matrix(kernel, size, stride, padding)
    out = F.conv2d(image, kernel, stride=stride, padding=padding)
    back = conv_transpose(out, kernel, image.shape[-2:], stride=stride, padding=padding)
    torch.testing.assert_close(back.flatten(), matrix.T @ (matrix @ image.flatten()))
    found, v = conv_power_iteration(kernel, image, stride=stride, padding=padding, iterations=4)
    dense = image.flatten()
    for _ in range(4):
        dense = matrix.T @ (matrix @ dense)
        dense = dense / dense.norm()
    torch.testing.assert_close(v.flatten(), dense)
    assert float(found) == pytest.approx(float((matrix @ dense).norm()))
    assert float(found) <= norm(matrix) * (1 + 1e-12)


def test_power_iteration_rises_to_the_norm() -> None:
    kernel, image = torch.randn(3, 2, 3, 3), torch.randn(1, 2, 6, 6)
    rising = [float(conv_power_iteration(kernel, image, padding=1, iterations=i)[0]) for i in (1, 2, 4, 8, 400)]
    assert rising == sorted(rising)
    assert rising[-1] == pytest.approx(norm(conv_matrix(kernel, (6, 6), 1, 1)), rel=1e-6)


def test_power_iteration_learns_nothing_from_zeros() -> None:
    image = torch.randn(1, 2, 4, 4)
    found, after = conv_power_iteration(torch.zeros(3, 2, 3, 3), image, padding=1, iterations=3)
    assert float(found) == 0
    assert torch.equal(after, image)
