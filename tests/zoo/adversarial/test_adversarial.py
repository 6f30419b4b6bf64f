"""Attacks on classifiers, against projected gradient ascent, and training against them."""

import copy
import dataclasses
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq
from equipoise import zoo
from equipoise.constraints import L2Ball, LInfBall
from equipoise.inputs import Joint
from equipoise.solvers import Picard
from equipoise.train import StepInfo, fit
from equipoise.zoo import (
    ATTACK,
    Adversarial,
    Classify,
    DenseClassifier,
    DenseConfig,
    EquilibriumClassifier,
    MDEQClassifier,
    MDEQConfig,
    attack,
)

LONG = eq.Picard(max_steps=300, rtol=1e-9)


def dense(seed: int = 0) -> DenseClassifier:
    torch.manual_seed(seed)
    model = DenseClassifier(DenseConfig(image_size=4, image_channels=1, num_classes=5, width=24, cap=0.7), solver=LONG)
    with torch.no_grad():  # steep enough for an attack to matter
        model.head.weight.mul_(4)
    return model.eval()


def batch(rows: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(rows, 1, 4, 4), torch.arange(rows) % 5


def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(x), labels, reduction="none")


def ascent(model: EquilibriumClassifier, x: Tensor, labels: Tensor, radius: float) -> Tensor:
    """Normalized projected gradient ascent by backpropagation through 40 applications of the map, step by step."""
    best = loss(model, x, labels)
    changed = x
    for step in range(40):
        changed = changed.detach().requires_grad_()
        u = model.stem(changed)
        z = torch.zeros_like(u)
        for _ in range(40):
            z = model.deq.cell(z, u)
        (slope,) = torch.autograd.grad(F.cross_entropy(model.head(z), labels, reduction="sum"), changed)
        unit = slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
        move = changed.detach() + 0.3 * 0.92**step * unit - x
        move = move * (radius / move.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None]
        changed = (x + move).clamp(0, 1)
        best = torch.maximum(best, loss(model, changed, labels))
    return best


def test_gradient_ascent() -> None:
    model, (x, labels) = dense(), batch()
    solution = attack(
        model,
        x,
        labels,
        constraint=L2Ball(radius=0.8, center=x, lower=0.0, upper=1.0),
        optimizer=replace(ATTACK, solver=LONG),
    )
    changed = solution.value[2]
    assert (changed - x).flatten(1).norm(dim=1).max() <= 0.8 * (1 + 1e-6)
    torch.testing.assert_close(changed, changed.clamp(0, 1), rtol=0, atol=0)
    found, clean = loss(model, changed, labels), loss(model, x, labels)
    assert solution.cost is not None
    torch.testing.assert_close(F.softplus(-solution.cost), found, rtol=1e-3, atol=1e-4)
    reference = ascent(model, x, labels, 0.8)
    assert (found > clean + 0.1).all()
    assert (found > reference - 0.05 * reference.abs()).float().mean() > 0.8  # local maxima differ for some
    assert found.mean() > reference.mean() * 0.98


def test_steep_classifier() -> None:
    model, (x, _) = dense(), batch()
    with torch.no_grad():
        model.head.weight.mul_(300)
        labels = model(x).argmax(1)
        assert loss(model, x, labels).median() < 1e-12, "the slope of the cross-entropy is next to nothing"
    ball = L2Ball(radius=1.5, center=x, lower=0.0, upper=1.0)
    changed = attack(model, x, labels, constraint=ball).value[2]
    with torch.no_grad():
        assert (model(changed).argmax(1) != labels).double().mean() > 0.8


def test_largest_change() -> None:
    model, (x, labels) = dense(), batch()
    ball = LInfBall(radius=0.1, center=x, lower=0.0, upper=1.0)
    changed = attack(model, x, labels, constraint=ball, optimizer=replace(ATTACK, scheme=Joint())).value[2]
    assert (changed - x).abs().max() <= 0.1 + 1e-12
    assert (loss(model, changed, labels) > loss(model, x, labels)).all()


def test_normalization() -> None:
    model, (x, labels) = dense(), batch()
    folded = copy.deepcopy(model)
    with torch.no_grad():  # W (x - 0.3) / 0.5 + b
        folded.stem[1].bias.sub_(0.3 / 0.5 * folded.stem[1].weight.sum(1))
        folded.stem[1].weight.div_(0.5)
    ball = L2Ball(radius=0.5, center=x, lower=0.0, upper=1.0)
    one = attack(model, x, labels, constraint=ball, mean=(0.3,), std=(0.5,)).value[2]
    torch.testing.assert_close(one, attack(folded, x, labels, constraint=ball).value[2])


def test_batch_independence() -> None:
    model, (x, labels) = dense(), batch(6)
    whole = attack(model, x, labels, constraint=L2Ball(radius=0.5, center=x)).value[2]
    for row in range(0, 6, 2):
        part = slice(row, row + 1)
        one = attack(model, x[part], labels[part], constraint=L2Ball(radius=0.5, center=x[part])).value[2]
        torch.testing.assert_close(one, whole[part])


def test_gradient_at_the_worst_image() -> None:
    model, (x, labels) = dense(), batch()
    parameters = list(model.parameters())
    ball = L2Ball(radius=0.05, center=x, lower=0.0, upper=1.0)
    solution = attack(model, x, labels, constraint=ball, optimizer=replace(ATTACK, solver=LONG, verify_solver=None))
    assert solution.converged.all()
    z, _, changed = solution.value
    torch.testing.assert_close(model.deq(model.stem(changed)), z, rtol=1e-7, atol=1e-8)
    found = torch.autograd.grad(F.cross_entropy(model.head(z), labels), parameters)
    implicit = eq.Implicit(solver=eq.GMRES(max_steps=60, rtol=0.0, atol=1e-10))
    with model.deq.using(gradient=implicit):  # Danskin: the image counts as a constant
        expected = torch.autograd.grad(F.cross_entropy(model(changed.detach()), labels), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_statistics_and_modes() -> None:
    torch.manual_seed(0)
    model = MDEQClassifier(MDEQConfig.digits()).train()
    model.head.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]
    x, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
    ball = L2Ball(radius=0.5, center=x, lower=0.0, upper=1.0)
    solution = attack(
        model, x, labels, constraint=ball, optimizer=replace(ATTACK, solver=eq.Picard(max_steps=3), verify_solver=None)
    )
    assert solution.value[2].shape == x.shape
    assert [part.training for part in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_wrong_shape() -> None:
    model, (x, labels) = dense(), batch()
    with pytest.raises(ValueError, match="does not broadcast to x0's"):
        attack(model, x, labels, constraint=L2Ball(radius=1.0, center=torch.rand(3, 1, 4, 4)))


RECIPE = zoo.jiio_adversarial()


def parts(**changes: Any) -> tuple[DenseClassifier, Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    config = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, width=16), **changes)
    model = config.build()
    return model, config.objective(model), torch.rand(10, 1, 8, 8), torch.arange(10)


def test_training_loss() -> None:
    model, objective, x, labels = parts()
    objective.train()
    loss, sums = objective(x, labels, StepInfo(0, 0, 0))
    found = dict(zip(objective.names, sums.tolist(), strict=True))
    optimizer = RECIPE.task.input_optimizer(RECIPE.solver)
    z, _, changed = attack(model, x, labels, constraint=RECIPE.task.constraint(x), optimizer=optimizer).value
    torch.testing.assert_close(loss, F.cross_entropy(model.head(z), labels))
    assert (changed - x).flatten(1).norm(dim=1).max() <= 1 + 1e-6
    assert objective.names[-1] == "robust_accuracy"
    assert (found["count"], found["robust_accuracy"]) == (10, int((model.head(z).argmax(1) == labels).sum()))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_scores() -> None:
    model, objective, x, labels = parts(eval_solver=Picard(max_steps=5), task=Adversarial(radius=0.3, norm="linf"))
    objective.eval()
    with torch.no_grad():
        loss, sums = objective(x, labels)
        found = dict(zip(objective.names, sums.tolist(), strict=True))
        ball = LInfBall(radius=0.3, center=x, lower=0.0, upper=1.0)
        changed = attack(
            model,
            x,
            labels,
            constraint=ball,
            optimizer=dataclasses.replace(ATTACK, solver=Picard(max_steps=5), verify_solver=None),
        ).value[2]
        with model.deq.using(solver=Picard(max_steps=200, rtol=1e-8)):
            logits, clean = model(changed), model(x)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels), rtol=1e-3, atol=1e-4)
    for name, scores in {"robust_accuracy": logits, "accuracy": clean}.items():
        assert found[name] == int((scores.argmax(1) == labels).sum())
    assert objective.names[-2:] == Adversarial.scores


@pytest.mark.slow
def test_robustness(tmp_path: pathlib.Path) -> None:
    """Digits are more robust than those of a classifier that was trained without attacks."""
    torch.set_default_dtype(torch.float32)
    config = dataclasses.replace(RECIPE, epochs=5, tensorboard=False)
    robust = fit(config, run_dir=tmp_path / "robust").test
    plain = dataclasses.replace(
        config,
        task=Classify(),
        solver=config.forward_solver,
        gradient=zoo.mdeq_cifar10_tiny().gradient,
        eval_solver=None,
    )
    objective = config.objective(fit(plain, run_dir=tmp_path / "plain").model).eval()
    test = config.data.load().test
    with torch.no_grad():
        sums = objective(config.data.prepare(test.images), test.labels)[1]
    found = dict(zip(objective.names, (sums / len(test)).tolist(), strict=True))
    assert (found["accuracy"] > 0.9, robust["test_accuracy"] > 0.7) == (True, True), (found, robust)
    assert robust["test_robust_accuracy"] > found["robust_accuracy"] + 0.2, (found, robust)
