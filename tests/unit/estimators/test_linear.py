"""Designs, losses and penalties against dense formulas, finite differences and scikit-learn's losses."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from torch import Tensor

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.estimators.linear import Design, GroupPenalty, LogisticLoss, MultinomialLoss, SigmoidLoss, SquaredLoss
from equipoise.fixed_point import solve_map

N, D, K = 7, 4, 3


def features(seed: int = 0, rows: int = N, columns: int = D) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, columns)) * (generator.random((rows, columns)) < 0.6)


def design(kind: str, *, outputs: int = 1, intercept: bool = True, moved: bool = True) -> Design:
    x = features()
    offset, scale = torch.linspace(-1, 2, D), torch.linspace(0.5, 3, D)
    return Design(
        {"dense": x, "tensor": torch.tensor(x), "sparse": scipy.sparse.csr_array(x)}[kind],
        outputs=outputs,
        intercept=intercept,
        offset=offset if moved and intercept else None,
        scale=scale if moved else None,
    )


def losses(kind: str, weights: Tensor | None = None) -> list:
    generator = torch.Generator().manual_seed(3)
    binary = torch.randint(2, (N,), generator=generator)
    common = {"weights": weights, "mean": weights is not None}
    one, several = design(kind), design(kind, outputs=K)
    return [
        LogisticLoss(design=one, target=2 * binary - 1, **common),
        SigmoidLoss(design=one, target=binary, **common),
        SquaredLoss(design=one, target=torch.randn(N, generator=generator), **common),
        SquaredLoss(design=several, target=torch.randn(K, N, generator=generator), **common),
        MultinomialLoss(design=several, target=torch.randint(K, (N,), generator=generator), **common),
    ]


def state(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["dense", "tensor", "sparse"])
@pytest.mark.parametrize("outputs", [1, K])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_scores_are_those_of_the_standardized_matrix(kind: str, outputs: int, moved: bool, intercept: bool) -> None:
    operator = design(kind, outputs=outputs, moved=moved, intercept=intercept)
    z = state(operator.size)
    x = torch.tensor(features())
    if operator.offset is not None:
        x = x - operator.offset
    if operator.scale is not None:
        x = x / operator.scale
    weights = z[:, : outputs * D].reshape(2, outputs, D)
    expected = torch.einsum("nd,bkd->bkn", x, weights)
    if intercept:
        expected = expected + z[:, outputs * D :, None]
    torch.testing.assert_close(operator.scores(z), expected)
    coefficients, intercepts = operator.coefficients(z)
    raw = torch.einsum("nd,bkd->bkn", torch.tensor(features()), coefficients) + intercepts[:, :, None]
    torch.testing.assert_close(raw, expected)
    other, factor = operator.rescaled(torch.linspace(3, 4, D))
    torch.testing.assert_close(other.scores(z * factor), expected)


def test_read_only_and_reversed_arrays() -> None:
    x = features()
    frozen = x.copy()
    frozen.flags.writeable = False
    z = state(D)
    for data in (frozen, np.asfortranarray(x), x[::-1]):
        torch.testing.assert_close(Design(data).scores(z)[:, 0], z @ torch.tensor(data.copy()).T)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("number", range(5))
def test_derivatives_of_first_and_second_order(kind: str, number: int) -> None:
    weights = torch.rand(2, N, generator=torch.Generator().manual_seed(1))
    loss = losses(kind, weights)[number]
    z = state(loss.design.size).requires_grad_()
    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)


@pytest.mark.parametrize("number", range(5))
def test_third_derivatives_of_a_sparse_design_are_those_of_the_dense_one(number: int) -> None:
    def third(loss) -> Tensor:
        z = state(loss.design.size, batch=1).requires_grad_()
        v = torch.linspace(-1, 1, z.numel()).reshape(z.shape)
        value = loss(z).sum()
        for _ in range(2):
            value = (torch.autograd.grad(value, z, create_graph=True)[0] * v).sum()
        # The third derivative of a quadratic is zero: let the second one count, too.
        return torch.autograd.grad(value * (1 + z.sum()), z)[0]

    torch.testing.assert_close(third(losses("sparse")[number]), third(losses("dense")[number]))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_losses_are_those_of_scikit_learn(kind: str) -> None:
    weights = torch.rand(N, generator=torch.Generator().manual_seed(2))
    counts = weights.numpy()
    logistic, sigmoid, squared, _, multinomial = losses(kind, weights)
    z = state(logistic.design.size)
    for loss in (logistic, sigmoid, squared):
        scores = loss.design.scores(z)[:, 0].numpy()
        for row, value in zip(scores, loss(z).tolist(), strict=True):
            chance = 1 / (1 + np.exp(-row))
            expected = {
                LogisticLoss: lambda p: log_loss(logistic.target, p, sample_weight=counts),
                SigmoidLoss: lambda p: np.average((sigmoid.target.numpy() - p) ** 2 / 2, weights=counts),
                SquaredLoss: lambda p, s=row: np.average((squared.target[0].numpy() - s) ** 2 / 2, weights=counts),
            }[type(loss)](chance)
            assert value == pytest.approx(expected)
    z = state(multinomial.design.size)
    for row, value in zip(multinomial.design.scores(z), multinomial(z).tolist(), strict=True):
        chances = row.softmax(0).T.numpy()
        assert value == pytest.approx(log_loss(multinomial.target, chances, sample_weight=counts, labels=range(K)))


def test_sum_and_mean_differ_by_the_sum_of_the_weights() -> None:
    weights = torch.rand(N)
    for number in range(5):
        total, mean = (dataclasses.replace(losses("dense", weights)[number], weights=weights, mean=m) for m in (0, 1))
        z = state(total.design.size)
        torch.testing.assert_close(total(z), mean(z) * weights.sum())
        plain = dataclasses.replace(total, weights=None)
        torch.testing.assert_close(plain(z) / N, dataclasses.replace(plain, mean=True)(z))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_rows_of_weights_are_folds(kind: str) -> None:
    x = features() if kind == "dense" else scipy.sparse.csr_array(features())
    masks = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    for number, whole in enumerate(losses(kind)):
        folds = dataclasses.replace(whole, weights=masks, mean=True)
        z = state(whole.design.size)
        for fold, mask in enumerate(masks.bool()):
            target = whole.target[..., mask]
            part = dataclasses.replace(whole, design=whole.design.on(x[mask.numpy()]), target=target, mean=True)
            torch.testing.assert_close(folds(z)[fold], part(z)[fold], msg=f"loss {number}, fold {fold}")
        with pytest.raises(ValueError, match="batch of 2"):
            folds(z[:1])


def test_margins_of_a_million() -> None:
    x = torch.tensor([[1e6], [-1e6], [1.0]])
    logistic = LogisticLoss(design=Design(x), target=torch.tensor([1, 1, -1]))
    z = torch.tensor([[1.0], [-1.0]]).requires_grad_()
    value = logistic(z)
    torch.testing.assert_close(value, torch.tensor([1e6 + np.log1p(np.e), 1e6 + np.log1p(np.exp(-1))]))
    gradient = torch.autograd.grad(value.sum(), z, create_graph=True)[0]
    torch.testing.assert_close(gradient.detach(), torch.tensor([[1e6 + 1 / (1 + np.exp(-1))], [-1e6 + 1 / (1 + np.e)]]))
    assert torch.autograd.grad(gradient.sum(), z)[0].isfinite().all()
    # Small losses keep their digits.
    right = LogisticLoss(design=Design(x[2:]), target=torch.tensor([1]))
    assert right(torch.tensor([[30.0]])).item() == pytest.approx(np.exp(-30), rel=1e-12)
    multinomial = MultinomialLoss(design=Design(x, outputs=2), target=torch.tensor([0, 0, 1]))
    z = torch.tensor([[1.0, -1.0]]).requires_grad_()
    value = multinomial(z)
    assert value.item() == pytest.approx(2e6 + np.log1p(np.exp(-2)) + 2)
    gradient = torch.autograd.grad(value.sum(), z, create_graph=True)[0]
    assert torch.autograd.grad(gradient.square().sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_penalties_by_hand(kind: str) -> None:
    operator = design(kind, outputs=K)
    z = state(operator.size)
    w = operator.coefficients(z)[0]
    log_alpha = torch.tensor([-1.0, 0.5, 2.0])
    shared = GroupPenalty(design=operator)
    torch.testing.assert_close(shared(z, log_alpha[:1]), 0.5 * np.exp(-1) * w.square().sum((1, 2)))
    torch.testing.assert_close(shared(z, log_alpha[0]), 0.5 * np.exp(-1) * w.square().sum((1, 2)))
    each = GroupPenalty.per_class(operator)
    torch.testing.assert_close(each(z, log_alpha), 0.5 * (w.square().sum(2) * log_alpha.exp()).sum(1))
    groups = torch.tensor([2, 0, 1, 0])
    features = GroupPenalty(design=operator, groups=groups)
    expected = 0.5 * (w.square().sum(1) * log_alpha.exp()[groups]).sum(1)
    torch.testing.assert_close(features(z, log_alpha), expected)
    torch.testing.assert_close(features(z, torch.stack([log_alpha, log_alpha])), expected)
    for penalty in (each, features):
        leaves = (z.clone().requires_grad_(), log_alpha.clone().requires_grad_())
        assert torch.autograd.gradcheck(penalty, leaves)
        assert torch.autograd.gradgradcheck(penalty, leaves)


def minimum(objective, size: int) -> Tensor:
    z0 = torch.zeros(1, size)
    solver = eq.LBFGS(max_steps=500, memory=30, rtol=0, atol=1e-9)
    return solve_map(DescentMap(objective, z0, params=()), z0, solver=solver, gradient=eq.Implicit()).value


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_minima_are_scikit_learns(kind: str) -> None:
    """The penalty applies to the coefficients on the columns as they are, and the intercept goes free."""
    alpha = 0.3
    rng = np.random.default_rng(0)
    x = features(1, rows=40) + (kind == "dense")
    data = scipy.sparse.csr_array(x) if kind == "sparse" else x
    y = (x @ rng.standard_normal(D) + rng.standard_normal(40) > 0).astype(int)
    make = functools.partial(
        Design, data, intercept=True, offset=torch.linspace(0, 1, D), scale=torch.linspace(1, 2, D)
    )

    def fitted(loss) -> list[np.ndarray]:
        penalty = GroupPenalty(design=loss.design)
        log_alpha = torch.tensor([np.log(alpha)])
        z = minimum(lambda z: loss(z) + penalty(z, log_alpha), loss.design.size)
        return [part[0].numpy() for part in loss.design.coefficients(z)]

    reference = LogisticRegression(C=1 / alpha, tol=1e-10, max_iter=1000)
    weights, intercept = fitted(LogisticLoss(design=make(), target=torch.tensor(2 * y - 1)))
    reference.fit(x, y)
    np.testing.assert_allclose(weights, reference.coef_, atol=1e-6)
    np.testing.assert_allclose(intercept, reference.intercept_, atol=1e-6)

    classes = y + (x[:, 0] > 0.5)
    weights, intercept = fitted(MultinomialLoss(design=make(outputs=K), target=torch.tensor(classes)))
    reference.fit(x, classes)
    np.testing.assert_allclose(weights, reference.coef_, atol=1e-6)
    np.testing.assert_allclose(intercept, reference.intercept_ - reference.intercept_.mean(), atol=1e-6)

    target = x @ rng.standard_normal(D) + 3
    weights, intercept = fitted(SquaredLoss(design=make(), target=torch.tensor(target)))
    ridge = Ridge(alpha=alpha).fit(x, target)
    np.testing.assert_allclose(weights[0], ridge.coef_, atol=1e-7)
    np.testing.assert_allclose(intercept[0], ridge.intercept_, atol=1e-7)


def test_nonlinear_least_squares_against_scipy() -> None:
    x, alpha = features(1, rows=40), 0.3
    y = (np.random.default_rng(0).random(40) < 0.5).astype(float)
    loss = SigmoidLoss(design=Design(x), target=torch.tensor(y))
    penalty = GroupPenalty(design=loss.design)
    z = minimum(lambda z: loss(z) + penalty(z, torch.tensor([np.log(alpha)])), D)

    def residuals(w: np.ndarray) -> np.ndarray:
        return np.concatenate([y - 1 / (1 + np.exp(-x @ w)), np.sqrt(alpha) * w])

    tight = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14)
    np.testing.assert_allclose(z[0], scipy.optimize.least_squares(residuals, np.zeros(D), **tight).x, atol=1e-6)


def test_single_precision_stays_single() -> None:
    for data in (features().astype(np.float32), scipy.sparse.csr_array(features().astype(np.float32))):
        operator = Design(data)
        loss = LogisticLoss(design=operator, target=torch.ones(N))
        z = torch.zeros(1, D, dtype=torch.float32, requires_grad=True)
        value = loss(z)
        assert value.dtype == torch.float32
        assert torch.autograd.grad(value.sum(), z)[0].dtype == torch.float32
        with pytest.raises(ValueError, match="float32"):
            operator.scores(z.double())


def test_errors_name_the_argument() -> None:
    operator = Design(features())
    with pytest.raises(TypeError, match="features"):
        Design([[1.0]])
    with pytest.raises(ValueError, match="features"):
        Design(np.ones(3))
    with pytest.raises(ValueError, match="outputs"):
        Design(features(), outputs=0)
    with pytest.raises(TypeError, match="dtype"):
        Design(features(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="scale"):
        Design(features(), scale=torch.zeros(D))
    with pytest.raises(ValueError, match="offset"):
        Design(features(), offset=torch.zeros(D + 1))
    with pytest.raises(ValueError, match="state"):
        operator.scores(torch.zeros(1, D + 1))
    with pytest.raises(ValueError, match="2 \\* y - 1"):
        LogisticLoss(design=operator, target=torch.zeros(N))
    with pytest.raises(ValueError, match="one entry per row"):
        LogisticLoss(design=operator, target=torch.ones(N + 1))
    with pytest.raises(ValueError, match="not all zero"):
        SquaredLoss(design=operator, target=torch.ones(N), weights=torch.zeros(N))
    with pytest.raises(ValueError, match="weights must be"):
        SquaredLoss(design=operator, target=torch.ones(N), weights=torch.ones(N + 1))
    with pytest.raises(TypeError, match="int64"):
        MultinomialLoss(design=operator, target=torch.zeros(N))
    with pytest.raises(ValueError, match="0 \\.\\. 0"):
        MultinomialLoss(design=operator, target=torch.ones(N, dtype=torch.int64))
    with pytest.raises(ValueError, match="one score"):
        SigmoidLoss(design=Design(features(), outputs=2), target=torch.zeros(N))
    with pytest.raises(ValueError, match="target must be"):
        SquaredLoss(design=Design(features(), outputs=2), target=torch.zeros(N))
    with pytest.raises(ValueError, match="groups"):
        GroupPenalty(design=operator, groups=torch.zeros(D + 1))
    for wrong in (torch.zeros(3), torch.zeros(2, 3)):  # would broadcast, and be added up
        with pytest.raises(ValueError, match=r"log_alpha must be \(1,\) or \(B, 1\)"):
            GroupPenalty(design=operator)(torch.zeros(2, operator.size, dtype=operator.dtype), wrong)
