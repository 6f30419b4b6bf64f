"""The fully connected classifier, predictors of Skip DEQs, and the evaluations that their penalty saves."""

import dataclasses
import functools
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.data import Digits
from equipoise.train import Adam, LRSchedule, TrainConfig, fit
from equipoise.zoo import Classify, DenseClassifier, DenseConfig, MDEQClassifier, MDEQConfig, MDEQPredictor, SkipPenalty

MNIST = DenseConfig(image_size=28, image_channels=1, num_classes=10)
DIGITS = MDEQConfig.digits()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, 134_538), ({"explicit_steps": 1}, 134_538), ({"predictor": True}, 151_050)]
)
def test_published_counts(fields: dict[str, Any], expected: int) -> None:
    assert count(DenseClassifier(dataclasses.replace(MNIST, **fields))) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [(MDEQConfig.cifar10_tiny(), 36_672), (MDEQConfig.cifar10_large(), 554_816)],
    ids=["tiny", "large"],
)
def test_published_predictors(config: MDEQConfig, expected: int) -> None:
    """With a length for each weight-normalized filter, which the published count leaves out."""
    assert count(MDEQPredictor(config)) == expected


@pytest.mark.parametrize("channels", [(8,), (8, 8), (8, 12, 16), (4, 8, 16, 32)])
def test_predictor(channels: tuple[int, ...]) -> None:
    config = dataclasses.replace(
        DIGITS, image_size=16, channels=channels, head_channels=channels, predictor=True, dropout=0.2
    )
    model = MDEQClassifier(config).eval()
    guess = model.deq.init(model.stem(torch.randn(3, 1, 16, 16)))
    assert [tuple(level.shape[1:]) for level in guess] == list(config.level_shapes)
    first = next(iter(model.deq.init.parameters()))
    model(torch.randn(3, 1, 16, 16)).sum().backward()
    assert first.grad is None, "the equilibrium does not depend on where the solve began"


def test_formula() -> None:
    model = DenseClassifier(
        dataclasses.replace(MNIST, width=6, image_size=3), solver=eq.Picard(max_steps=200, rtol=1e-14)
    )
    with torch.no_grad():
        model.deq.cell.state.weight.mul_(0.4)
    x = torch.randn(4, 1, 3, 3)
    logits, solution = model.classify(x)
    u = torch.relu(x.flatten(1) @ model.stem[1].weight.T + model.stem[1].bias)
    z = torch.zeros(4, 6)
    for _ in range(300):
        z = torch.relu(z @ model.deq.cell.state.weight.T) + torch.relu(u @ model.deq.cell.injection.weight.T)
    expected = (z, z @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close((solution.value, logits), expected)


def test_certificate() -> None:
    model = DenseClassifier(dataclasses.replace(MNIST, width=8)).eval()
    weight = model.deq.cell.state.weight
    for norm in (0.7, 1.5):
        with torch.no_grad():
            weight.mul_(norm / torch.linalg.matrix_norm(weight, 2))
        certificate = eq.certify(model)
        assert (certificate.norm, certificate.contracts) == (pytest.approx(norm), norm < 1)


def test_cap() -> None:
    config = dataclasses.replace(MNIST, width=8, cap=0.6)
    assert config.lipschitz_limit(training=True) == 0.6
    model = DenseClassifier(config).eval()
    assert count(model) == count(DenseClassifier(dataclasses.replace(config, cap=None)))
    stored = model.deq.cell.state.parametrizations.weight.original
    for norm, expected in ((0.4, 0.4), (1.5, 0.6)):
        with torch.no_grad():
            stored.mul_(norm / torch.linalg.svdvals(stored)[0])
        torch.testing.assert_close(model.deq.cell.state.weight, stored * (expected / norm))
        assert eq.certify(model).norm == pytest.approx(expected)
    x = torch.randn(4, 8)
    weight = stored.detach().clone().requires_grad_()
    model.deq.cell.state(x).square().sum().backward()
    (0.6 * torch.nn.functional.linear(x, weight) / torch.linalg.svdvals(weight)[0]).square().sum().backward()
    torch.testing.assert_close(stored.grad, weight.grad)


def test_starts() -> None:
    x = torch.randn(2, 1, 8, 8)
    for fields in ({"explicit_steps": 1}, {"predictor": True}):
        model = MDEQClassifier(dataclasses.replace(DIGITS, **fields)).eval()
        u, cell = model.stem(x), model.deq.cell
        expected = model.deq.init(u) if "predictor" in fields else cell(cell.zeros(u), u)
        torch.testing.assert_close(tuple(model.deq.solve(u).start), tuple(expected))


# Relative residual of the forward solve, and that of the adjoint: the published ones of the dense MNIST model.
TOLERANCE = 5e-3


def config(name: str, **fields: bool | int | float) -> TrainConfig:
    """The 8x8 digits by a dense model of 128 numbers: Picard iteration, 6 epochs in batches of 32, Adam at 1e-3."""
    weight = fields.pop("weight", 0.0)
    return TrainConfig(
        name=name,
        data=Digits(),
        model=DenseConfig(image_size=8, image_channels=1, num_classes=10, **fields),  # type: ignore[arg-type]
        solver=eq.Picard(max_steps=50, rtol=TOLERANCE),
        gradient=eq.Implicit(solver=eq.GMRES(max_steps=17, rtol=0.0, atol=TOLERANCE)),
        optimizer=Adam(lr=1e-3),
        schedule=LRSchedule(final_lr=1e-3),
        epochs=6,
        batch_size=32,
        task=Classify(skip=SkipPenalty(weight=weight)),
        tensorboard=False,
    )


CONFIGS = {
    "vanilla": config("vanilla"),
    "skip 0.01": config("skip", predictor=True, weight=0.01),
    "skip reg 0.01": config("skip-reg", explicit_steps=1, weight=0.01),
    "skip 5": config("skip", predictor=True, weight=5.0),
    "skip reg 5": config("skip-reg", explicit_steps=1, weight=5.0),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    accuracy: float
    evaluations: float  # mean of a test image, those of the start too
    products: float  # mean of a test image, in the adjoint of its cross-entropy


@functools.cache
def outcome(name: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        result = fit(CONFIGS[name], run_dir=folder)
    data, model, reports = Digits(), result.model, list[eq.Solution[Tensor]]()
    images, labels = next(iter(data.load().test.batches(1000)))
    adjoint = eq.GMRES(max_steps=40, rtol=0.0, atol=TOLERANCE)
    with model.deq.using(gradient=eq.Implicit(solver=adjoint, observe=reports.append)):
        logits, solution = model.classify(data.prepare(images))
        nn.functional.cross_entropy(logits, labels).backward()
    assert bool(solution.converged.all())
    # The network of a Skip DEQ is counted as one evaluation; explicit steps of the map are counted already.
    evaluations = solution.num_steps.double().mean() + model.config.predictor
    return Outcome(result.test_accuracy, float(evaluations), float(reports[0].num_steps.double().mean()))


# The scratch figures of the specification count one more application, that of the released layer, and no start: 17
# evaluations without penalty, 11 and 14 at weight 0.01, 4 and 3 at weight 5, after 12 epochs; then measured here: 13.1;
# 11.5, 12.6; 3.7, 2.0, at accuracies of 0.981; 0.981, 0.978; 0.981, 0.978. Half the epochs show it, too.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("vanilla", 11, 17),
        pytest.param("skip 0.01", 10, 14, marks=pytest.mark.extended),
        pytest.param("skip reg 0.01", 10, 14.5, marks=pytest.mark.extended),
        ("skip 5", 3, 4.5),
        ("skip reg 5", 2, 3),
    ],
)
def test_evaluations(name: str, least: float, most: float) -> None:
    found = outcome(name)
    assert least <= found.evaluations <= most, found
    assert found.accuracy > max(0.96, outcome("vanilla").accuracy - 0.02), found


@pytest.mark.slow
def test_products() -> None:
    """The tolerance is relative, so products fall since J is small: to 5.0 and 1.0 from 9.7 after 12 epochs."""
    vanilla, skip, skip_reg = (outcome(name).products for name in ("vanilla", "skip 5", "skip reg 5"))
    assert vanilla > 7
    assert skip < 0.7 * vanilla
    assert skip_reg < 2
