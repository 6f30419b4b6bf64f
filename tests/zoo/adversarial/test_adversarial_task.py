"""Adversarial training: what its objective sums, what it refuses, and that it makes classifiers robust."""

import dataclasses
import pathlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from equipoise import zoo
from equipoise.constraints import LInfBall
from equipoise.data import Digits
from equipoise.inputs import Joint
from equipoise.solvers import Picard
from equipoise.train import StepInfo, TrainConfig, fit
from equipoise.train.serialize import from_plain, to_plain
from equipoise.zoo import ATTACK, CLASSES, Adversarial, Classify, DenseClassifier, attack

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
    robust = int((model.head(z).argmax(1) == labels).sum())
    assert (found["count"], found["robust_accuracy"]) == (10, robust)
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


def test_refusals() -> None:
    for changes, message in (
        ({"data": Digits()}, "would change the meaning of the radius; set them to zeros and ones"),
        ({"model": zoo.mdeq_digits().model}, "the BatchNorm of a MDEQConfig does not; take a DenseConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(RECIPE, **changes)
    with pytest.raises(ValueError, match=r"task.radius=0: must be > 0"):
        Adversarial(radius=0)


def test_plain_data() -> None:
    config = dataclasses.replace(RECIPE, task=Adversarial(radius=0.5, scheme=Joint(damping=0.5)))
    assert from_plain(TrainConfig, to_plain(config), CLASSES) == config


@pytest.mark.slow
def test_robustness(tmp_path: pathlib.Path) -> None:
    """Digits are more robust than those of a classifier that was trained without attacks."""
    torch.set_default_dtype(torch.float32)
    config = dataclasses.replace(RECIPE, epochs=8, tensorboard=False)
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
