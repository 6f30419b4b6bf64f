"""Inverse problems with learned data weights and a learned penalty of the latents."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch

import equipoise as eq
from equipoise.models import EquilibriumPrior, PriorConfig
from equipoise.train import Adam, Blur, Digits, Hole, Noise, Photographs, Reconstruct, TrainConfig, fit
from equipoise.train.tasks import Moment
from equipoise.train.tasks.reconstruct import LatentPenalty, ObservationCost, explain

CONFIG = TrainConfig(
    data=Digits(mean=(0.0,), std=(1.0,)),
    model=PriorConfig(image_size=8, fine=4, coarse=4, num_corruptions=2, smoothing=1.0, cap=0.25),  # well conditioned
    task=Reconstruct(corruptions=(Noise(std=0.2), Hole(size=3))),
    solver=eq.Anderson(memory=30, max_steps=600, rtol=1e-9),
    gradient=eq.Implicit(solver=eq.GMRES(max_steps=200, rtol=0.0, atol=1e-7)),
    tensorboard=False,
    accelerator="cpu",
)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_cost_of_each_row_has_its_own_data_weight() -> None:
    model = EquilibriumPrior(CONFIG.model).double()
    with torch.no_grad():
        model.log_weights.copy_(torch.tensor([0.5, 0.2]))
    source = torch.Generator().manual_seed(2)
    z = tuple(torch.randn(t.shape, generator=source) for t in model.latents(3, 8, 8))
    mask = torch.ones(3, 1, 8, 8)
    mask[:, :, 2:4] = 0
    kinds = torch.tensor([0, 1, 0])
    found = ObservationCost(model)(z, None, images(3), mask, kinds)
    wanted = (mask * (model.decode(z) - images(3)).square()).sum((1, 2, 3)) * (
        5.0 * torch.tensor([0.5, 0.2, 0.5])
    ).exp()
    assert torch.allclose(found, wanted)


def test_the_answer_is_a_minimum_of_misfit_and_penalty() -> None:
    torch.manual_seed(0)
    model = EquilibriumPrior(CONFIG.model, solver=eq.Anderson(max_steps=80, rtol=1e-12)).double()
    observed, mask, kinds = images(2), torch.ones(2, 1, 8, 8), torch.tensor([0, 1])
    answer = explain(model, observed, mask, size=(8, 8), kinds=kinds, solver=CONFIG.solver).value[2]
    cost, penalty = ObservationCost(model), LatentPenalty(model)

    def total(x: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return (cost(model.deq(x), x, observed, mask, kinds) + penalty(x)).detach()

    best = total(answer)
    source = torch.Generator().manual_seed(3)
    for _ in range(4):
        step = tuple(1e-3 * torch.randn(t.shape, generator=source) for t in answer)
        for sign in (1, -1):
            assert bool((total(tuple(a + sign * s for a, s in zip(answer, step, strict=True))) > best).all())


@pytest.mark.slow
def test_gradients_are_differences_of_the_solved_loss() -> None:
    torch.manual_seed(0)
    model = CONFIG.task.build(CONFIG).double()
    objective = CONFIG.task.objective(model, CONFIG)
    moment, labels = Moment(0, 0, 0), torch.zeros(2)
    objective(images(2), labels, moment)[0].backward()
    for weight in (model.log_weights, model.atoms[1].parametrizations.weight.original, model.log_penalties[0]):
        direction, h = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)), 1e-4
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * h * direction
                values.append(float(objective(images(2), labels, moment)[0]))
                weight -= sign * h * direction
        slope = (values[0] - values[1]) / (2 * h)
        assert float((weight.grad * direction).sum()) == pytest.approx(slope, rel=0.02)


@pytest.mark.slow
def test_training_helps(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(
        CONFIG,
        model=PriorConfig(image_size=8, fine=8, coarse=8, num_corruptions=2),
        solver=eq.Anderson(memory=12, max_steps=12, rtol=1e-4, ridge=1e-6),
        gradient=eq.Implicit(solver=eq.GMRES(max_steps=15, rtol=0.0, atol=1e-3)),
        optimizer=Adam(lr=1e-2),
        stop_after=15,
        batch_size=16,
        eval_batch_size=360,
    )
    trained = fit(config, run_dir=tmp_path / "run").test["test_psnr"]
    untrained = fit(dataclasses.replace(config, stop_after=1, optimizer=Adam(lr=1e-9)), run_dir=tmp_path / "none").test[
        "test_psnr"
    ]
    assert trained > untrained + 0.5


def test_photographs_of_training_and_test_are_apart() -> None:
    data = Photographs(validation_fraction=0.1)
    splits = data.load()
    batch, labels = next(splits.test.batches(16))
    assert batch.shape == (16, 1, 32, 32)
    assert batch.dtype == torch.uint8
    assert set(data.train_names).isdisjoint(data.test_names)
    assert len(splits.classes) == len(data.train_names) + len(data.test_names)
    assert min(labels.tolist()) >= len(data.train_names)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"num_corruptions=2 must be the number of task.corruptions, 1"):
        dataclasses.replace(CONFIG, task=Reconstruct(corruptions=(Noise(),)))
    with pytest.raises(ValueError, match="train Blur or Downsample alone"):
        dataclasses.replace(CONFIG, task=Reconstruct(corruptions=(Noise(), Blur())))
