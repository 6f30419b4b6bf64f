"""Reasoning: puzzles against their definition, the training step by hand, resume, and what training must reach."""

import dataclasses
import pathlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import equipoise as eq
from equipoise import zoo
from equipoise.data.base import generator
from equipoise.train import StepInfo, fit
from equipoise.zoo import PrefixSums, Reason, Reasoner, ReasonerConfig

SMALL = dataclasses.replace(
    zoo.prefix_sums(),
    data=PrefixSums(length=9, test_length=20, num_train=120, num_validation=20, num_test=10),
    model=ReasonerConfig(length=9, channels=6, blocks=1),
    batch_size=20,
    log_every=1,
    tensorboard=False,
)


def test_puzzles() -> None:
    data = PrefixSums(length=9, test_length=40, num_train=400, num_validation=100, num_test=30)
    splits, again = data.load(), data.load()
    assert splits.validation is not None
    seen = set()
    for split, other, length in (
        (splits.train, again.train, 9), (splits.validation, again.validation, 9), (splits.test, again.test, 40),
    ):  # fmt: skip
        bits, answers = next(split.batches(1000))
        assert torch.equal(bits, next(other.batches(1000))[0])
        assert bits.shape == (len(split), 1, length)
        for row, answer in zip(bits[:, 0].tolist(), answers.tolist(), strict=True):
            assert answer == [sum(row[: i + 1]) % 2 for i in range(length)]
            seen.add(tuple(row))
        assert 0.4 < float(bits.double().mean()) < 0.6
    assert len(seen) == 530
    assert data.prepare(bits).unique().tolist() == [-1.0, 1.0]
    long = next(PrefixSums(num_train=3000).load().train.batches(3000))[0]
    assert len(long.unique(dim=0)) == 3000


def test_training_step() -> None:
    """The loss is that of free steps and unrolled ones by hand, and both counts are drawn from all that are allowed."""
    torch.manual_seed(0)
    model, task = Reasoner(SMALL.model), Reason(free=3, unrolled=2, random_starts=0.3, settling=0.2)
    objective = dataclasses.replace(SMALL, task=task).objective(model)
    x, y = torch.randn(5, 1, 9), torch.randint(2, (5, 9))
    drawn = set()
    for step in range(40):
        source = generator(7, step, 5)
        free, unrolled = int(torch.randint(0, 4, (), generator=source)), int(torch.randint(1, 3, (), generator=source))
        drawn.add((free, unrolled))
        found = task.loss(objective, x, y, StepInfo(step, 0, 7))
        assert found.solution.num_evals == unrolled
        z, noise = (torch.rand(5, 1, 1, generator=source) < 0.3), torch.randn(5, 6, 9, generator=source)
        z = torch.where(z, noise, 0.0)
        with torch.no_grad():
            for _ in range(free):
                z = model.deq.cell(z, x)
        for _ in range(unrolled):
            z = model.deq.cell(z, x)
        expected = F.cross_entropy(model.head(z), y)
        torch.testing.assert_close(found.loss, expected)
        torch.testing.assert_close(found.penalty, 0.2 * (model.deq.cell(z, x) - z).square().mean())
        weight = model.deq.cell.recall.weight
        torch.testing.assert_close(torch.autograd.grad(found.loss, weight)[0], torch.autograd.grad(expected, weight)[0])
    assert drawn == {(free, unrolled) for free in range(4) for unrolled in (1, 2)}


def test_evaluation_solves() -> None:
    torch.manual_seed(0)
    model = Reasoner(SMALL.model)
    config = dataclasses.replace(SMALL, solver=eq.Picard(max_steps=300, rtol=1e-9))
    objective = config.objective(model)
    x, y = torch.randn(5, 1, 30), torch.randint(2, (5, 30))
    with torch.no_grad():
        found = config.task.loss(objective, x, y, None)
        z = found.solution.value
        right = model.head(z).argmax(1) == y
        torch.testing.assert_close((model.deq.cell(z, x) - z).flatten(1).norm(dim=1), found.solution.residual)
    assert bool((found.solution.num_steps > 20).any())
    assert int(found.scores["exact"]) == int(right.all(1).sum())
    assert float(found.scores["accuracy"]) == pytest.approx(float(right.double().mean(1).sum()))


def test_resume(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(SMALL, epochs=1, checkpoint_every=2)
    whole = fit(config, run_dir=tmp_path / "whole")
    folder = tmp_path / "parts"
    fit(config, run_dir=folder)
    for file in sorted((folder / "checkpoints").iterdir())[1:]:
        file.unlink()
    for file in (folder / "result.json", folder / "model.safetensors"):
        file.unlink(missing_ok=True)
    resumed = fit(config, run_dir=folder, resume=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.test["test_exact"] == resumed.test["test_exact"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrefixSums(length=3, num_train=8, num_validation=1), "more than the 2.3 strings"),
        (lambda: PrefixSums(num_test=0), r"data.num_test=0\): must be >= 1|num_test=0"),
        (lambda: ReasonerConfig(blocks=0), "blocks"),
        (lambda: Reason(unrolled=0), "unrolled"),
        (lambda: dataclasses.replace(SMALL, model=ReasonerConfig(length=8)), "set model.length to data.length"),
        (lambda: dataclasses.replace(SMALL, model=zoo.MDEQConfig.digits()), "needs a model of kind ReasonerConfig"),
        (lambda: Reasoner(SMALL.model)(torch.ones(2, 9)), r"must have shape \(B, 1, n\), got \(2, 9\)"),
    ],
)
def test_bad_use(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_recipe(tmp_path: pathlib.Path) -> None:
    """Trained on 32 bits, strings of 512 bits are exact, at an equilibrium that does not depend on its start."""
    result = fit(dataclasses.replace(zoo.prefix_sums(), tensorboard=False), run_dir=tmp_path)
    assert result.test["test_exact"] >= 0.99
    assert result.test["converged"] >= 0.95
    x, y = next(zoo.prefix_sums().data.load().test.batches(50))
    with torch.no_grad():
        logits, solution = result.model.answer(x.float() * 2 - 1, z0=torch.randn(50, 40, 512))
    assert float((logits.argmax(1) == y).all(1).double().mean()) >= 0.98
    assert float(solution.converged.double().mean()) >= 0.95
