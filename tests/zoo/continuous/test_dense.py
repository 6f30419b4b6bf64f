"""The fully connected classifier, and the predictors of Skip DEQs: counts, shapes, formulas, constants."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.zoo import DenseClassifier, DenseConfig, MDEQClassifier, MDEQConfig, MDEQPredictor, ScaledLayers

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


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (MNIST, {"width": 0}, "width=0: must be >= 1"),
        (MNIST, {"cap": -0.5}, r"cap=-0\.5: must be > 0, or None for no cap"),
        (MNIST, {"explicit_steps": -1}, "explicit_steps=-1: must be >= 0"),
        (
            DIGITS,
            {"predictor": True, "contraction": ScaledLayers()},
            r"predictor=true has no use with model\.contraction",
        ),
    ],
)
def test_refusals(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **fields)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1, 28, 28\)"):
        DenseClassifier(MNIST)(torch.zeros(2, 3, 28, 28))
