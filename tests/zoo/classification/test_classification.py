"""Objectives of classifiers: Skip DEQs, and solvers that are aware of the loss."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from toy import FULL, MODEL, PLAIN, Interrupt, Interrupted, read_config, timeless
from toy import command_line as main

import equipoise as eq
from equipoise import zoo
from equipoise.files import DataError
from equipoise.nn import jacobian_penalty
from equipoise.train import Objective, Pretraining, StepInfo, TrainConfig, evaluate, fit
from equipoise.train.run_folder import config_yaml, read_lines
from equipoise.train.task import COMMON
from equipoise.zoo import (
    Classify,
    DenseClassifier,
    DenseConfig,
    JacobianPenalty,
    MDEQClassifier,
    SkipPenalty,
)

AWARE = eq.AdjointBroyden(max_steps=6, memory=8, rtol=0, outer_every=2)
LABELS = torch.tensor([0, 2, 1, 1, 0])


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)), LABELS


def model(**fields: Any) -> MDEQClassifier:
    torch.manual_seed(0)
    return MDEQClassifier(dataclasses.replace(MODEL, **fields), solver=AWARE, gradient=eq.Shine(fallback_ratio=1.8))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_outer_loss(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, Tensor, Tensor]] = []
    gradient = eq.Point.loss_gradient

    def noted(self: eq.Point, loss: Any) -> Tensor:
        rows = torch.tensor([3, 0])
        z = tuple(level[rows] for level in self.map.unpack(self.z))
        told.append((z, rows, loss(z, rows)))
        return gradient(self, loss)

    monkeypatch.setattr(eq.Point, "loss_gradient", noted)
    classifier = model()
    for norm in classifier.head.modules():  # statistics that a first step would change
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.5
    loss, _ = Objective(classifier, Classify(label_smoothing=smoothing))(*batch(), StepInfo(0, 0, 0))
    loss.backward()
    assert len(told) == 2  # after two and four steps of the five
    assert classifier.training
    batches = {int(v) for k, v in classifier.head.state_dict().items() if "num_batches" in k}
    assert batches == {1}, "the head's own pass, and no other, is learned from"
    fresh = model().eval()
    for z, rows, value in told:
        expected = nn.functional.cross_entropy(fresh.head(z), LABELS[rows], label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(value, expected)


def test_inverse() -> None:
    """The direction of the last outer-aware update of the solve of a model, against the Jacobian."""
    classifier = model(dropout=0.0).double()
    for norm in classifier.head.modules():  # the head's own pass, which follows, must not change what is compared
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    objective = Objective(classifier, Classify())
    captured: list[eq.Solution[Any]] = []
    classify = classifier.classify
    classifier.classify = lambda images: (captured.append((found := classify(images))[1]), found)[1]  # type: ignore
    for outer_every in (1, None):
        classifier.deq.solver = eq.AdjointBroyden(max_steps=60, memory=120, rtol=1e-9, outer_every=outer_every)
        objective(*batch(), StepInfo(0, 0, 0))
    errors = []
    for solution in captured:
        solution.raise_for_status()
        assert solution.inverse is not None
        f = solution.map
        z = f.pack(solution.value).detach().requires_grad_()
        with eq.nn.frozen(classifier.head):
            value = nn.functional.cross_entropy(classifier.head(f.unpack(z)), LABELS, reduction="sum")
        (g,) = torch.autograd.grad(value, z)
        w = solution.inverse.rmv(g)
        (product,) = torch.autograd.grad(f.call(z), z, w)
        errors.append(float(((product + g - w).norm(dim=1) / g.norm(dim=1)).max()))
    assert errors[0] < 1e-3 < errors[1]


def test_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in evaluation nor in fixed-depth steps nor without `outer_every`."""
    gradient = mock.Mock(side_effect=eq.Point.loss_gradient)
    monkeypatch.setattr(eq.Point, "loss_gradient", lambda *given: gradient(*given))
    objective = Objective(model(), Classify(pretraining=Pretraining(steps=1, depth=2)))
    objective(*batch(), StepInfo(0, 0, 0))
    with torch.no_grad():
        objective.eval()(*batch())
    objective.train().model.deq.solver = dataclasses.replace(AWARE, outer_every=None)
    objective(*batch(), StepInfo(1, 0, 0))
    assert gradient.call_count == 0
    objective.model.deq.solver = AWARE
    objective(*batch(), StepInfo(1, 0, 0))
    assert (gradient.call_count, objective.model.deq.solver) == (2, AWARE)


@pytest.mark.slow
def test_runs(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(FULL, solver=AWARE, gradient=eq.Shine(fallback_ratio=1.8))
    whole = fit(config, run_dir=tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(config, run_dir=tmp_path / "parts", observer=Interrupt(3))
    resumed = fit(config, run_dir=tmp_path / "parts", resume=True)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert timeless(read_lines(resumed.run_dir)) == timeless(read_lines(whole.run_dir))
    assert evaluate(whole.model, config.data.load().test, config)["accuracy"] == whole.test["test_accuracy"]
    solver = dataclasses.replace(AWARE, outer_every=None)
    plain = fit(dataclasses.replace(config, solver=solver), run_dir=tmp_path / "no")
    assert plain.history[-1]["loss"] != whole.history[-1]["loss"], "the updates must have changed something"


def test_command_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.yaml").write_text(config_yaml(PLAIN))
    words = ["--solver", "AdjointBroyden", "--solver.outer_every", "2", "--gradient", "Shine", "--print-config"]
    assert main(["train", "--config", str(tmp_path / "toy.yaml"), *words]) == 0
    (tmp_path / "toy.yaml").write_text(capsys.readouterr().out)
    solver = read_config(tmp_path / "toy.yaml").solver
    assert isinstance(solver, eq.AdjointBroyden)
    assert (solver.outer_every, solver.outer_loss) == (2, None)


ROWS = 5
DENSE = DenseConfig(image_size=3, image_channels=1, num_classes=3, width=6)
TIGHT = eq.Anderson(max_steps=300, rtol=1e-13)
EXACT = eq.Implicit(solver=eq.GMRES(max_steps=60, rtol=0.0, atol=1e-13))
FIRST = StepInfo(0, 0, 0)

variants = pytest.mark.parametrize("changes", [{"predictor": True}, {"explicit_steps": 1}], ids=["skip", "skip-reg"])


def dense(changes: dict[str, Any]) -> DenseClassifier:
    model = DenseClassifier(dataclasses.replace(DENSE, **changes), solver=TIGHT, gradient=EXACT)
    weight = model.deq.cell.state.weight
    with torch.no_grad():
        weight.abs_()  # no entry of z equals its start, where the sign of their difference would be that of rounding
        weight.mul_(0.7 / torch.linalg.matrix_norm(weight, 2))
    return model


def dense_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 1, 3, 3), torch.tensor([0, 1, 2, 2, 0])


def by_hand(model: DenseClassifier, images: Tensor, labels: Tensor, depth: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Start, state after so many applications of the cell to it, cross-entropy; all by plain backpropagation."""
    u, cell = model.stem(images), model.deq.cell
    if model.config.predictor:
        start = torch.relu(u @ model.deq.init[0].weight.T + model.deq.init[0].bias)
    else:
        start = torch.relu(u @ cell.injection.weight.T)  # the cell at zeros
    z = start
    for _ in range(depth):
        z = cell(z, u)
    return start, z, nn.functional.cross_entropy(model.head(z), labels)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


def told(sums: Tensor) -> dict[str, float]:
    return dict(zip((*COMMON, "accuracy"), sums.tolist(), strict=True))


@variants
def test_loss(changes: dict[str, Any]) -> None:
    model, (images, labels) = dense(changes), dense_batch()
    objective = Objective(model, Classify(skip=SkipPenalty(weight=0.8, decay=0.92)))
    start, z, entropy = by_hand(model, images, labels)
    for epoch in (0, 1, 7):
        loss, sums = objective(images, labels, StepInfo(100 * epoch, epoch, 0))
        penalty = 0.8 * 0.92**epoch * (z - start).abs().mean()
        torch.testing.assert_close(loss, entropy + penalty)
        shown = {"penalty": ROWS * float(penalty.detach()), "loss": ROWS * float(entropy.detach())}
        assert {name: told(sums)[name] for name in shown} == pytest.approx(shown), "the log shows the task's loss"
    loss, sums = objective(images, labels)
    torch.testing.assert_close(loss, entropy)
    assert told(sums)["penalty"] == 0, "evaluation has no penalty"


@pytest.mark.slow
@variants
@pytest.mark.parametrize("detach_target", [False, True])
def test_gradients(changes: dict[str, Any], detach_target: bool) -> None:
    model, (images, labels) = dense(changes), dense_batch()
    objective = Objective(model, Classify(skip=SkipPenalty(weight=3.0, detach_target=detach_target)))
    start, z, entropy = by_hand(model, images, labels)
    expected = gradients(entropy + 3 * ((z.detach() if detach_target else z) - start).abs().mean(), model)
    actual = gradients(objective(images, labels, FIRST)[0], model)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@variants
def test_fixed_depth(changes: dict[str, Any]) -> None:
    model, (images, labels) = dense(changes), dense_batch()
    objective = Objective(model, Classify(skip=SkipPenalty(weight=3.0), pretraining=Pretraining(steps=2, depth=4)))
    start, z, entropy = by_hand(model, images, labels, depth=4)
    loss, sums = objective(images, labels, StepInfo(1, 0, 0))
    torch.testing.assert_close(loss, entropy + 3 * (z - start).abs().mean())
    torch.testing.assert_close(gradients(loss, model), gradients(entropy + 3 * (z - start).abs().mean(), model))
    assert told(sums)["steps"] == ROWS * (4 + model.config.explicit_steps)
    after = told(objective(images, labels, StepInfo(2, 0, 0))[1])
    assert after["steps"] > ROWS * 5, "the steps after are solves"


def test_both_penalties() -> None:
    model, (images, labels) = dense({"explicit_steps": 1}), dense_batch()
    both = Objective(model, Classify(penalty=JacobianPenalty(weight=0.5), skip=SkipPenalty(weight=2.0)))
    start, z, entropy = by_hand(model, images, labels)
    torch.manual_seed(3)
    loss = both(images, labels, FIRST)[0]
    torch.manual_seed(3)
    jacobian = jacobian_penalty(model.classify(images)[1], 1)
    torch.testing.assert_close(loss, entropy + 2 * (z - start).abs().mean() + 0.5 * jacobian)


def test_levels() -> None:
    config = dataclasses.replace(MODEL, explicit_steps=1, dropout=0.0)
    model = MDEQClassifier(config, solver=eq.Picard(max_steps=3, rtol=0.0)).eval()
    images, labels = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    logits, solution = model.classify(images)
    gaps = [(a - b).abs() for a, b in zip(solution.value, solution.start, strict=True)]
    means = torch.stack([gap.mean() for gap in gaps])
    assert gaps[0].numel() == 4 * gaps[1].numel()
    entropy = nn.functional.cross_entropy(logits, labels)
    for per_scale, apart in ((True, means.sum()), (False, (4 * means[0] + means[1]) / 5)):
        objective = Objective(model, Classify(skip=SkipPenalty(weight=2.0, per_scale=per_scale)))
        torch.testing.assert_close(objective(images, labels, FIRST)[0], entropy + 2 * apart)


def test_decay() -> None:
    """The schedule of an earlier version of the source: 0.92 to the number of the epoch."""
    assert SkipPenalty(weight=1.0, decay=0.92).at(50) == pytest.approx(0.01546, rel=1e-3)
    assert {SkipPenalty(weight=0.01).at(epoch) for epoch in range(51)} == {0.01}
    assert SkipPenalty().at(0) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [zoo.continuous_mnist, zoo.skip_mnist, zoo.skip_reg_mnist, zoo.skip_reg_fashion_mnist],
    ids=lambda recipe: recipe.__name__,
)
def test_recipes(recipe: Callable[[], TrainConfig]) -> None:
    torch.set_default_dtype(torch.float32)
    config = recipe()
    try:
        images, labels = next(config.data.load().train.batches(16))
    except DataError as error:
        pytest.skip(str(error))
    model = config.build()
    objective = Objective(model, config.task)
    optimizer = config.optimizer.build(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for step in {0, config.task.pretraining.steps}:  # a step of fixed depth, if there are such, and one by the flow
        loss, sums = objective(config.data.prepare(images), labels, StepInfo(step, 0, 0))
        assert bool(sums.isfinite().all())
        assert (told(sums)["penalty"] > 0) == bool(config.task.skip.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(bool((p != old).any()) for p, old in zip(model.parameters(), before, strict=True))
