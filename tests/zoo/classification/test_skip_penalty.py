"""The objective of Skip DEQs: its formula, its gradients, its weight over the epochs, in fixed-depth steps, too."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import MODEL

import equipoise as eq
from equipoise import zoo
from equipoise.files import DataError
from equipoise.nn import jacobian_penalty
from equipoise.train import Objective, Pretraining, StepInfo, TrainConfig
from equipoise.train.task import COMMON
from equipoise.zoo import (
    Classify,
    DenseClassifier,
    DenseConfig,
    JacobianPenalty,
    MDEQClassifier,
    SkipPenalty,
)

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


def batch() -> tuple[Tensor, Tensor]:
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
    model, (images, labels) = dense(changes), batch()
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
    model, (images, labels) = dense(changes), batch()
    objective = Objective(model, Classify(skip=SkipPenalty(weight=3.0, detach_target=detach_target)))
    start, z, entropy = by_hand(model, images, labels)
    expected = gradients(entropy + 3 * ((z.detach() if detach_target else z) - start).abs().mean(), model)
    actual = gradients(objective(images, labels, FIRST)[0], model)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@variants
def test_fixed_depth(changes: dict[str, Any]) -> None:
    model, (images, labels) = dense(changes), batch()
    objective = Objective(model, Classify(skip=SkipPenalty(weight=3.0), pretraining=Pretraining(steps=2, depth=4)))
    start, z, entropy = by_hand(model, images, labels, depth=4)
    loss, sums = objective(images, labels, StepInfo(1, 0, 0))
    torch.testing.assert_close(loss, entropy + 3 * (z - start).abs().mean())
    torch.testing.assert_close(gradients(loss, model), gradients(entropy + 3 * (z - start).abs().mean(), model))
    assert told(sums)["steps"] == ROWS * (4 + model.config.explicit_steps)
    after = told(objective(images, labels, StepInfo(2, 0, 0))[1])
    assert after["steps"] > ROWS * 5, "the steps after are solves"


def test_both_penalties() -> None:
    model, (images, labels) = dense({"explicit_steps": 1}), batch()
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipPenalty(weight=-1.0), r"skip\.weight=-1\.0: must be >= 0"),
        (lambda: SkipPenalty(weight=float("nan")), r"skip\.weight=nan: must be >= 0"),
        (lambda: SkipPenalty(decay=0.0), r"skip\.decay=0\.0: must be > 0 and <= 1; 1 keeps the weight"),
        (lambda: SkipPenalty(decay=1.1), r"skip\.decay=1\.1: must be > 0 and <= 1"),
        (
            lambda: dataclasses.replace(zoo.continuous_mnist(), task=Classify(skip=SkipPenalty(weight=0.1))),
            r"skip\.weight=0\.1 would draw the equilibrium to zeros.*set model\.predictor=true",
        ),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


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
