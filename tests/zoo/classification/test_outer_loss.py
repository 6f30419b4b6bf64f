"""Training with a solver that is aware of the loss: what it is told, when, and that the head does not notice."""

import dataclasses
import pathlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from toy import FULL, MODEL, PLAIN, Interrupt, Interrupted, read_config, timeless
from toy import command_line as main

import equipoise as eq
from equipoise.train import Objective, Pretraining, StepInfo, evaluate, fit
from equipoise.train.run_folder import config_yaml, read_lines
from equipoise.train.serialize import from_plain, to_plain
from equipoise.zoo import Classify, MDEQClassifier

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


def test_plain_data() -> None:
    solver = dataclasses.replace(AWARE, outer_loss=lambda z, rows: z.sum(1))
    assert from_plain(eq.Solver, to_plain(solver), [eq.AdjointBroyden]) == AWARE


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
