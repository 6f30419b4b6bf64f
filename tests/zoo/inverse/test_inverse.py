"""The equilibrium that restores images, and inverse problems with learned data weights."""

import dataclasses
import pathlib
from unittest import mock

import pytest
import torch
from toy import assert_slopes

import equipoise as eq
from equipoise.data import Digits, Photographs
from equipoise.inputs import Joint
from equipoise.train import Adam, Pretraining, StepInfo, TrainConfig, fit, save
from equipoise.zoo import (
    EXPLAIN,
    EquilibriumPrior,
    Hole,
    Noise,
    ObservationCost,
    PriorConfig,
    Reconstruct,
    explain,
    psnr,
)
from equipoise.zoo.files import load
from equipoise.zoo.generative.task import LatentPenalty

CONFIG = TrainConfig(
    data=Digits(mean=(0.0,), std=(1.0,)),
    model=PriorConfig(image_size=8, channels=(6, 8), latent_channels=2, num_corruptions=2),
    task=Reconstruct(corruptions=(Noise(std=0.2), Hole(size=3)), step_size=0.3, scheme=Joint()),
    solver=eq.Anderson(memory=20, max_steps=400, rtol=1e-10),
    gradient=eq.Implicit(solver=eq.GMRES(max_steps=100, rtol=0.0, atol=1e-9)),
    tensorboard=False,
    accelerator="cpu",
)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def drawn(config: PriorConfig = CONFIG.model) -> EquilibriumPrior:
    """A model whose latents move its images."""
    torch.manual_seed(0)
    model = EquilibriumPrior(config, solver=eq.Anderson(max_steps=200, rtol=1e-12)).double().eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def test_cost() -> None:
    model = drawn()
    with torch.no_grad():
        model.log_weights.copy_(torch.tensor([0.5, 0.2]))
    source = torch.Generator().manual_seed(2)
    z = tuple(torch.randn(t.shape, generator=source) for t in model.start(model.latents(3, 8, 8)))
    mask = torch.ones(3, 1, 8, 8)
    mask[:, :, 2:4] = 0
    kinds = torch.tensor([0, 1, 0])
    found = ObservationCost(model)(z, None, images(3), mask, kinds)
    wanted = (mask * (model.decode(z) - images(3)).square()).sum((1, 2, 3)) * torch.tensor([0.5, 0.2, 0.5]).exp()
    assert torch.allclose(found, wanted)


@pytest.mark.slow
def test_minimum() -> None:
    model = drawn()
    observed, mask, kinds = images(2), torch.ones(2, 1, 8, 8), torch.tensor([0, 1])
    mask[:, :, 3:6, 2:5] = 0
    context = model.context(observed, mask)
    answer = explain(
        model,
        observed,
        mask,
        size=(8, 8),
        kinds=kinds,
        optimizer=dataclasses.replace(EXPLAIN, solver=CONFIG.solver, step_size=0.3, scheme=Joint()),
    ).raise_for_status()
    cost, penalty = ObservationCost(model), LatentPenalty(model)
    x = answer.value[2].detach()

    def total(x: torch.Tensor) -> torch.Tensor:
        return (cost(model.deq(x, *context), x, observed, mask, kinds) + penalty(x)).detach()

    assert bool((x.square().sum((1, 2, 3)) > 1e-6).all())
    source = torch.Generator().manual_seed(3)
    for _ in range(4):
        step = 1e-2 * torch.randn(x.shape, generator=source)
        assert bool((torch.minimum(total(x + step), total(x - step)) > total(x)).all())


@pytest.mark.slow
def test_gradients() -> None:
    model = drawn()
    objective = CONFIG.objective(model)
    weights = [model.log_weights, model.deq.cell.injection.parametrizations.weight.original, model.first.weight]

    def loss() -> torch.Tensor:
        return objective(images(2), torch.zeros(2), StepInfo(0, 0, 0))[0]

    assert_slopes(loss, weights, seed=2)


def test_pretraining() -> None:
    model = drawn()
    config = dataclasses.replace(
        CONFIG, task=dataclasses.replace(CONFIG.task, pretraining=Pretraining(steps=1, depth=3))
    )
    objective = config.objective(model)
    early, late = (float(objective(images(2), torch.zeros(2), StepInfo(step, 0, 0))[0].detach()) for step in (0, 1))
    observed, mask = config.task.observe(images(2), StepInfo(0, 0, 0))
    x = model.latents(2, 8, 8)
    context = model.context(observed, mask)
    z = model.start(x)
    for _ in range(3):
        z = model.deq.cell(z, x, *context)
    found = model.decode(z).detach()
    found[1::2] = torch.where(mask[1::2] > 0, observed[1::2], found[1::2])
    error = (found - images(2)).square().mean((1, 2, 3))
    assert early == pytest.approx(float((error + 1e-4).log().mean()), rel=1e-12)
    assert late != early


@pytest.mark.slow
@pytest.mark.parametrize("corruption", [Noise(std=0.2), Hole(size=3)], ids=str)
def test_observations(corruption: Noise | Hole, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PriorConfig(image_size=8, channels=(6, 8), latent_channels=2, num_corruptions=1)
    task = dataclasses.replace(CONFIG.task, corruptions=(corruption,))
    config = dataclasses.replace(
        CONFIG, model=model, task=task, solver=eq.Anderson(max_steps=1), eval_solver=eq.Anderson(max_steps=1)
    )
    objective = config.objective(drawn(model)).eval()
    context = mock.Mock(side_effect=objective.model.context)
    monkeypatch.setattr(objective.model, "context", context)
    whole, seen = images(4), []
    for rows in (whole, whole[1:3]):
        context.reset_mock()
        with torch.no_grad():
            objective(rows, torch.zeros(len(rows)))
        seen.append(context.call_args_list[0].args[0])
    first, second = seen
    assert torch.equal(first[1:3], second)
    changes = (first - whole).flatten(1)
    assert not any(torch.equal(changes[0], other) for other in changes[1:])


@pytest.mark.slow
def test_training(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, num_corruptions=1),
        task=dataclasses.replace(
            CONFIG.task, corruptions=(Noise(std=0.4),), step_size=0.1, pretraining=Pretraining(steps=80, depth=5)
        ),
        solver=eq.Anderson(memory=8, max_steps=12, rtol=1e-3, ridge=1e-3),
        gradient=eq.Implicit(solver=eq.GMRES(max_steps=15, rtol=0.0, atol=2e-2)),
        optimizer=Adam(lr=1e-2),
        epochs=10,
        stop_after=89,
        batch_size=16,
        eval_batch_size=360,
    )
    result = fit(config, run_dir=tmp_path / "run")
    clean = config.data.load().test.images.float() / 255
    observed, _ = config.task.observe(clean, None)
    assert result.test["test_psnr"] > float(psnr(observed, clean).mean()) + 1
    assert torch.equal(load(tmp_path / "run" / "model.safetensors").weights(), result.model.weights())


def test_photographs() -> None:
    data = Photographs(validation_fraction=0.1)
    splits = data.load()
    batch, labels = next(splits.test.batches(16))
    assert batch.shape == (16, 1, 32, 32)
    assert batch.dtype == torch.uint8
    assert set(data.train_names).isdisjoint(data.test_names)
    assert len(splits.classes) == len(data.train_names) + len(data.test_names)
    assert min(labels.tolist()) >= len(data.train_names)


THREE_LEVELS = PriorConfig(image_size=8, channels=(6, 8, 10), num_corruptions=2)


def fresh(seed: int = 0) -> EquilibriumPrior:
    torch.manual_seed(seed)
    return EquilibriumPrior(THREE_LEVELS, solver=eq.Anderson(max_steps=100, rtol=1e-10)).double().eval()


@pytest.mark.parametrize("size", [(8, 8), (40, 24)])
def test_equilibrium(size: tuple[int, int]) -> None:
    model = fresh()
    observed, mask = torch.rand(2, 1, *size), torch.ones(2, 1, *size)
    x, context = torch.randn(2, 4, *size), model.context(observed, mask)
    solution = model.deq.solve(x, *context).raise_for_status()
    torch.testing.assert_close(solution.value, model.deq.cell(solution.value, x, *context), rtol=0, atol=1e-8)
    torch.testing.assert_close(solution.value[-1], observed)
    assert model(x, observed, mask).shape == observed.shape
    assert (float(eq.jacobian_norm(solution).max()) < 1.5, int(solution.num_steps.max()) < 60) == (True, True)


def test_rows_and_mask() -> None:
    model = fresh()
    assert sum(t.numel() for t in model.start(torch.zeros(1, 4, 8, 8))) == THREE_LEVELS.state_size
    observed, mask, x = torch.rand(3, 1, 8, 8), torch.ones(3, 1, 8, 8), torch.randn(3, 4, 8, 8)
    whole = model(x, observed, mask)
    assert torch.allclose(model(x[1:2], observed[1:2], mask[1:2]), whole[1:2], atol=1e-8)
    mask[:, :, 2:5, 2:5] = 0
    assert not torch.allclose(model(x, observed, mask), whole)


def test_file(tmp_path: pathlib.Path) -> None:
    model = fresh()
    save(model, tmp_path / "model.safetensors", about={})
    loaded = load(tmp_path / "model.safetensors").double()
    observed, mask, x = torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.randn(1, 4, 8, 8)
    assert torch.allclose(model(x, observed, mask), loaded(x, observed, mask), atol=1e-8)
