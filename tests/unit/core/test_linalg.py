"""Inverse estimates and batched products, against dense algebra."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equipoise.core.linalg import InverseEstimate, LowRank, dots, norms, row_dots, row_sums

BATCH, SIZE = 5, 7
Make = Callable[[], tuple[InverseEstimate, Tensor]]


def low_rank(batch: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[LowRank, Tensor]:
    """Random matrices gamma I + S^T K S, unsymmetric, and the same as dense float64 matrices."""
    gamma, basis = torch.randn(batch, dtype=dtype), torch.randn(batch, columns, SIZE, dtype=dtype)
    core = torch.randn(batch, columns, columns, dtype=torch.float64)
    wide = basis.double()
    dense = gamma.double()[:, None, None] * torch.eye(SIZE) + torch.einsum("bid,bij,bje->bde", wide, core, wide)
    return LowRank(gamma, basis, core), dense


def scattered() -> tuple[InverseEstimate, Tensor]:
    """An estimate in three parts of different ranks, their rows out of order, and its dense matrices."""
    rows = [torch.tensor([3, 0]), torch.tensor([4]), torch.tensor([2, 1])]
    dense = torch.empty(BATCH, SIZE, SIZE)
    parts = []
    for owned, columns in zip(rows, (3, 0, 6), strict=True):
        part, dense[owned] = low_rank(len(owned), columns)
        parts.append((owned, part))
    return InverseEstimate(tuple(parts), BATCH), dense


def whole() -> tuple[InverseEstimate, Tensor]:
    part, dense = low_rank(BATCH, 4)
    return InverseEstimate.of(part.gamma, part.basis, part.core), dense


estimates = pytest.mark.parametrize("make", [whole, scattered])


@pytest.mark.parametrize("columns", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_row_products(columns: int, dtype: torch.dtype) -> None:
    x, rows, weights = torch.randn(3, 6), torch.randn(3, columns, 6), torch.randn(3, columns)
    near = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False} if dtype == torch.float32 else {}
    dots = row_dots(x.to(dtype), rows.to(dtype))
    sums = row_sums(weights, rows.to(dtype))  # float64 weights, as small matrices give them, with any history
    assert dots.dtype == sums.dtype == dtype
    torch.testing.assert_close(dots, torch.einsum("bd,bmd->bm", x, rows), **near)
    torch.testing.assert_close(sums, torch.einsum("bm,bmd->bd", weights, rows), **near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dots_and_norms(dtype: torch.dtype) -> None:
    """Row by row, in float64."""
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=dtype), torch.tensor([[1.0, 2.0], [5.0, 6.0]], dtype=dtype)
    for found, expected in ((dots(x, y), [11.0, 5.0]), (norms(x), [5.0, 1.0])):
        assert (found.dtype, found.tolist()) == (torch.float64, expected)


def test_views_of_histories() -> None:
    x, history, weights = torch.randn(3, 6), torch.randn(3, 9, 6), torch.randn(3, 9)
    torch.testing.assert_close(row_dots(x, history[:, 2:5]), torch.einsum("bd,bmd->bm", x, history[:, 2:5]))
    expected = torch.einsum("bm,bmd->bd", weights[:, 2:5], history[:, 2:5])
    torch.testing.assert_close(row_sums(weights[:, 2:5], history[:, 2:5]), expected)


@pytest.mark.parametrize("columns", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_low_rank(columns: int, dtype: torch.dtype) -> None:
    part, dense = low_rank(BATCH, columns, dtype)
    x = torch.randn(BATCH, SIZE)
    near = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False} if dtype == torch.float32 else {}
    product = part.mv(x.to(dtype))
    assert product.dtype == dtype
    torch.testing.assert_close(product, torch.einsum("bde,be->bd", dense, x), **near)
    torch.testing.assert_close(part.mT.mv(x.to(dtype)), torch.einsum("bed,be->bd", dense, x), **near)
    index = torch.tensor([4, 0, 0])
    torch.testing.assert_close(
        part.select(index).mv(x[index].to(dtype)), torch.einsum("bde,be->bd", dense[index], x[index]), **near
    )


@estimates
def test_estimates(make: Make) -> None:
    estimate, dense = make()
    x = torch.randn(BATCH, SIZE)
    before = x.clone()
    torch.testing.assert_close(estimate.dense(), dense)
    torch.testing.assert_close(estimate.mv(x), torch.einsum("bde,be->bd", dense, x))
    torch.testing.assert_close(estimate.rmv(x), torch.einsum("bed,be->bd", dense, x))
    torch.testing.assert_close(estimate.mT.dense(), dense.mT)
    torch.testing.assert_close(estimate.mT.rmv(x), estimate.mv(x))
    assert torch.equal(x, before)


@estimates
@pytest.mark.parametrize("index", [[2], [4, 3, 0], [1, 1, 4, 2, 0, 3]])
def test_select(make: Make, index: list[int]) -> None:
    estimate, dense = make()
    rows = torch.tensor(index)
    chosen = estimate.select(rows)
    assert chosen.batch == len(index)
    torch.testing.assert_close(chosen.dense(), dense[rows])
    again = torch.arange(len(index)).flip(0)
    torch.testing.assert_close(chosen.select(again).dense(), dense[rows][again])


@estimates
def test_reset(make: Make) -> None:
    estimate, dense = make()
    mask = torch.tensor([True, False, False, True, True])
    expected = torch.where(mask[:, None, None], torch.eye(SIZE), dense)
    torch.testing.assert_close(estimate.reset(mask).dense(), expected)
    assert estimate.reset(mask).rank[mask].tolist() == [0, 0, 0]
    torch.testing.assert_close(estimate.dense(), dense)  # the original is untouched


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3, 4], [4, 0, 4, 0, 2]])
def test_rank(ranks: list[int]) -> None:
    part, _ = low_rank(BATCH, 4)
    # Row i of the core is what update i added; updates not made are zero rows.
    made = torch.arange(4) < torch.tensor(ranks)[:, None]
    core = torch.where(made[..., None], part.core, 0.0)
    estimate = InverseEstimate.of(part.gamma, part.basis, core)
    assert estimate.rank.tolist() == ranks
    added = estimate.dense() - part.gamma[:, None, None] * torch.eye(SIZE)
    assert [int(r) for r in torch.linalg.matrix_rank(added, rtol=1e-10)] == ranks


def test_scattered_rank() -> None:
    assert scattered()[0].rank.tolist() == [3, 6, 6, 3, 0]
