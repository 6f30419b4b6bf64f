"""Designs, losses and penalties against dense formulas, finite differences and scikit-learn's losses."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
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
def test_scores(kind: str, outputs: int, moved: bool, intercept: bool) -> None:
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


def test_strides() -> None:
    x = features()
    frozen = x.copy()
    frozen.flags.writeable = False
    z = state(D)
    for data in (frozen, np.asfortranarray(x), x[::-1]):
        torch.testing.assert_close(Design(data).scores(z)[:, 0], z @ torch.tensor(data.copy()).T)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("number", range(5))
def test_derivatives(kind: str, number: int) -> None:
    weights = torch.rand(2, N, generator=torch.Generator().manual_seed(1))
    loss = losses(kind, weights)[number]
    z = state(loss.design.size).requires_grad_()
    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)


@pytest.mark.parametrize("number", range(5))
def test_third_derivatives(number: int) -> None:
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
def test_losses(kind: str) -> None:
    weights = torch.rand(N, generator=torch.Generator().manual_seed(2))
    average = functools.partial(np.average, weights=weights.numpy())
    entropy = functools.partial(log_loss, sample_weight=weights.numpy())
    logistic, sigmoid, squared, _, multinomial = losses(kind, weights)
    z, many = state(logistic.design.size), state(multinomial.design.size)
    for row in range(2):
        scores = logistic.design.scores(z)[row, 0].numpy()
        chances = multinomial.design.scores(many)[row].softmax(0).T.numpy()
        sigmoids = 1 / (1 + np.exp(-scores))
        expected = [
            entropy(logistic.target, sigmoids),
            average((sigmoid.target.numpy() - sigmoids) ** 2 / 2),
            average((squared.target[0].numpy() - scores) ** 2 / 2),
            entropy(multinomial.target, chances, labels=range(K)),
        ]
        found = [loss(z)[row].item() for loss in (logistic, sigmoid, squared)]
        assert [*found, multinomial(many)[row].item()] == pytest.approx(expected)


def test_sum_and_mean() -> None:
    weights = torch.rand(N)
    for number in range(5):
        total, mean = (dataclasses.replace(losses("dense", weights)[number], weights=weights, mean=m) for m in (0, 1))
        z = state(total.design.size)
        torch.testing.assert_close(total(z), mean(z) * weights.sum())
        plain = dataclasses.replace(total, weights=None)
        torch.testing.assert_close(plain(z) / N, dataclasses.replace(plain, mean=True)(z))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_folds(kind: str) -> None:
    x = features() if kind == "dense" else scipy.sparse.csr_array(features())
    masks = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    for number, whole in enumerate(losses(kind)):
        folds = dataclasses.replace(whole, weights=masks, mean=True)
        z = state(whole.design.size)
        for fold, mask in enumerate(masks.bool()):
            target = whole.target[..., mask]
            part = dataclasses.replace(whole, design=whole.design.on(x[mask.numpy()]), target=target, mean=True)
            torch.testing.assert_close(folds(z)[fold], part(z)[fold], msg=f"loss {number}, fold {fold}")


def test_large_margins() -> None:
    x = torch.tensor([[1e6], [-1e6], [1.0]])
    logistic = LogisticLoss(design=Design(x), target=torch.tensor([1, 1, -1]))
    multinomial = MultinomialLoss(design=Design(x, outputs=2), target=torch.tensor([0, 0, 1]))
    for loss, z, values in (
        (logistic, [[1.0], [-1.0]], [1e6 + np.log1p(np.e), 1e6 + np.log1p(np.exp(-1))]),
        (multinomial, [[1.0, -1.0]], [2e6 + np.log1p(np.exp(-2)) + 2]),
    ):
        leaf = torch.tensor(z).requires_grad_()
        value = loss(leaf)
        torch.testing.assert_close(value, torch.tensor(values))
        gradient = torch.autograd.grad(value.sum(), leaf, create_graph=True)[0]
        if loss is logistic:
            slopes = torch.tensor([[1e6 + 1 / (1 + np.exp(-1))], [-1e6 + 1 / (1 + np.e)]])
            torch.testing.assert_close(gradient.detach(), slopes)
        assert torch.autograd.grad(gradient.square().sum(), leaf)[0].isfinite().all()
    # Small losses keep their digits.
    right = LogisticLoss(design=Design(x[2:]), target=torch.tensor([1]))
    assert right(torch.tensor([[30.0]])).item() == pytest.approx(np.exp(-30), rel=1e-12)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_penalties(kind: str) -> None:
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


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("model", [LogisticLoss, MultinomialLoss, SquaredLoss])
def test_minima(model: Any, kind: str) -> None:
    """The penalty applies to the coefficients of the original columns, and not to the intercept."""
    alpha, rng = 0.3, np.random.default_rng(0)
    x = features(1, rows=40) + (kind == "dense")
    y = (x @ rng.standard_normal(D) + rng.standard_normal(40) > 0).astype(int)
    reference: Any = LogisticRegression(C=1 / alpha, tol=1e-10, max_iter=1000)
    if model is MultinomialLoss:
        y = y + (x[:, 0] > 0.5)
    elif model is SquaredLoss:
        y, reference = x @ rng.standard_normal(D) + 3, Ridge(alpha=alpha)
    reference.fit(x, y)
    operator = Design(
        scipy.sparse.csr_array(x) if kind == "sparse" else x,
        outputs=K if model is MultinomialLoss else 1,
        intercept=True,
        offset=torch.linspace(0, 1, D),
        scale=torch.linspace(1, 2, D),
    )
    loss = model(design=operator, target=torch.tensor(2 * y - 1 if model is LogisticLoss else y))
    penalty, log_alpha = GroupPenalty(design=operator), torch.tensor([np.log(alpha)])
    z0 = torch.zeros(1, operator.size)
    f = DescentMap(lambda z: loss(z) + penalty(z, log_alpha), z0, params=())
    solver = eq.LBFGS(max_steps=500, memory=30, rtol=0, atol=1e-9)
    z = solve_map(f, z0, solver=solver, gradient=eq.Implicit()).value
    weights, intercept = (part[0].numpy() for part in operator.coefficients(z))
    np.testing.assert_allclose(weights, np.atleast_2d(reference.coef_), atol=1e-6)
    shift = reference.intercept_.mean() if model is MultinomialLoss else 0
    np.testing.assert_allclose(intercept, np.atleast_1d(reference.intercept_ - shift), atol=1e-6)


def test_single_precision() -> None:
    for data in (features().astype(np.float32), scipy.sparse.csr_array(features().astype(np.float32))):
        operator = Design(data)
        loss = LogisticLoss(design=operator, target=torch.ones(N))
        z = torch.zeros(1, D, dtype=torch.float32, requires_grad=True)
        value = loss(z)
        assert value.dtype == torch.float32
        assert torch.autograd.grad(value.sum(), z)[0].dtype == torch.float32
        with pytest.raises(ValueError, match="float32"):
            operator.scores(z.double())


def square(target: Tensor, **options: Any) -> SquaredLoss:
    return SquaredLoss(design=Design(features()), target=target, **options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda x: Design([[1.0]]), TypeError, "features must be a NumPy array"),
        (lambda x: Design(np.ones(3)), ValueError, "features must be a matrix"),
        (lambda x: x.on(np.ones((2, D + 1))), ValueError, rf"features must be a matrix \(n, {D}\)"),
        (lambda x: Design(features(), outputs=0), ValueError, "outputs"),
        (lambda x: Design(features(), dtype=torch.bfloat16), TypeError, "dtype"),
        (lambda x: Design(features(), scale=torch.zeros(D)), ValueError, "scale"),
        (lambda x: Design(features(), offset=torch.zeros(D + 1)), ValueError, "offset"),
        (lambda x: x.scores(torch.zeros(1, D + 1)), ValueError, "state"),
        (lambda x: LogisticLoss(design=x, target=torch.zeros(N)), ValueError, r"2 \* y - 1"),
        (lambda x: LogisticLoss(design=x, target=torch.ones(N + 1)), ValueError, "one entry per row"),
        (lambda x: square(torch.ones(N), weights=torch.zeros(N)), ValueError, "not all zero"),
        (lambda x: square(torch.ones(N), weights=-torch.ones(N)), ValueError, ">= 0"),
        (lambda x: square(torch.ones(N), weights=torch.ones(N + 1)), ValueError, "weights must be"),
        (lambda x: square(torch.ones(N), weights=torch.ones(2, N))(torch.zeros(1, D)), ValueError, "batch of 2"),
        (lambda x: MultinomialLoss(design=x, target=torch.zeros(N)), TypeError, "int64"),
        (lambda x: MultinomialLoss(design=x, target=torch.ones(N, dtype=torch.int64)), ValueError, r"0 \.\. 0"),
        (lambda x: SigmoidLoss(design=Design(features(), outputs=2), target=torch.zeros(N)), ValueError, "one score"),
        (lambda x: SquaredLoss(design=Design(features(), outputs=2), target=torch.zeros(N)), ValueError, "target must"),
        (lambda x: GroupPenalty(design=x, groups=torch.zeros(D + 1)), ValueError, "groups"),
        (lambda x: GroupPenalty(design=x, groups=-torch.ones(D)), ValueError, "groups"),
        # These would broadcast, and be added up.
        (
            lambda x: GroupPenalty(design=x)(torch.zeros(2, D), torch.zeros(3)),
            ValueError,
            r"must be \(1,\) or \(B, 1\)",
        ),
        (lambda x: GroupPenalty(design=x)(torch.zeros(2, D), torch.zeros(2, 3)), ValueError, "log_alpha must be"),
    ],
)
def test_errors(make: Callable[[Design], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(Design(features()))
