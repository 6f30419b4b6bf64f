"""The task of decoders: gradients against differences of the re-solved cost, evaluation, training, refusals."""

import dataclasses
import math
import pathlib

import pytest
import torch
from toy import difference, directions

import equipoise as eq
from equipoise.data import Digits
from equipoise.inputs import Envelope
from equipoise.train import Adam, StepInfo, TrainConfig, fit
from equipoise.zoo import DecoderConfig, Hole, MDEQConfig, Noise, Reconstruct, psnr
from equipoise.zoo.files import load

CONFIG = TrainConfig(
    data=Digits(mean=(0.0,), std=(1.0,)),
    model=DecoderConfig(image_size=8, image_channels=1, latent_size=4, width=24),
    task=Reconstruct(step_size=0.1),
    solver=eq.Anderson(memory=8, max_steps=15, rtol=1e-4, ridge=1e-3),
    gradient=Envelope(),
    optimizer=Adam(lr=5e-3),
    batch_size=64,
    epochs=1,
    tensorboard=False,
    accelerator="cpu",
)


@pytest.mark.slow
@pytest.mark.parametrize("corruptions", [(), (Noise(std=0.1), Hole(size=3))], ids=["generative", "inverse"])
def test_gradients(corruptions: tuple[Noise | Hole, ...]) -> None:
    torch.manual_seed(0)
    gradient = eq.Implicit(solver=eq.GMRES(max_steps=200, rtol=0.0, atol=1e-10)) if corruptions else Envelope()
    task = dataclasses.replace(
        CONFIG.task,
        corruptions=corruptions,
        step_size=0.05,
        equilibrium_solver=eq.Anderson(max_steps=80, rtol=1e-12),
    )
    solver = eq.Anderson(memory=10, max_steps=600, rtol=1e-10)
    config = dataclasses.replace(CONFIG, task=task, gradient=gradient, solver=solver)
    model = config.build().double().eval()  # no power iterations: the weights stay what they are
    objective, images = config.objective(model), torch.rand(3, 1, 8, 8) * 0.2 + 0.4

    def loss() -> torch.Tensor:
        return objective(images, torch.zeros(3), StepInfo(0, 0, 0))[0]

    weights = [model.head[0].bias, model.deq.cell.injection.weight]
    slopes = torch.autograd.grad(loss(), weights)
    for weight, slope, direction in zip(weights, slopes, directions(weights), strict=True):
        expected = difference(loss, [weight], [direction], 1e-4)
        assert float((slope * direction).sum()) == pytest.approx(expected, rel=1e-4)


def test_evaluation() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, solver=eq.Anderson(max_steps=3))  # far from converged
    model, images = config.build().float().eval(), torch.rand(5, 1, 8, 8, dtype=torch.float32)
    objective = config.objective(model)
    with torch.no_grad():
        _, sums = objective(images, torch.zeros(5))
        named = dict(zip(objective.names, sums.tolist(), strict=True))
        z0 = model.latents(5, 8, 8)
        solution = eq.optimize_inputs(
            model.deq.cell,
            z0=model.start(z0),
            x0=z0,
            cost=lambda z, x: (model.decode(z) - images).square().sum((1, 2, 3)),
            optimizer=eq.inputs.InputOptimizer(
                solver=config.solver, scheme=config.task.scheme, step_size=0.1, verify_solver=None
            ),
        )
        with model.deq.using(solver=eq.Anderson(max_steps=60, rtol=1e-7)):
            honest = model(solution.value[2])
    error = (honest - images).square().flatten(1).mean(1)
    expected = {"loss": error.sum().item(), "psnr": (-10 * error.log10()).sum().item(), "count": 5}
    assert {name: named[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_training(tmp_path: pathlib.Path) -> None:
    model = dataclasses.replace(CONFIG.model, latent_size=8, width=48)
    config = dataclasses.replace(CONFIG, model=model, optimizer=Adam(lr=2e-2), epochs=3)
    result = fit(config, run_dir=tmp_path / "run")
    data = config.data.load()
    pixels = config.data.prepare(data.test.images)
    mean = config.data.prepare(data.train.images).mean(0)
    assert result.test["test_loss"] < 0.7 * float((pixels - mean).square().mean())
    assert result.test["test_psnr"] > 10
    again = load(tmp_path / "run" / "model.safetensors")
    x = torch.randn(2, 8, dtype=torch.float32)
    torch.testing.assert_close(again(x), result.model.eval()(x))


def test_psnr() -> None:
    truth = torch.zeros(2, 1, 2, 2)
    found = torch.tensor([0.1, 0.5]).view(2, 1, 1, 1).expand(2, 1, 2, 2) - torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    assert psnr(found, truth)[0] == pytest.approx(20.0)
    assert psnr(found, truth)[1] > 1000  # -0.5 is 0 once it is clipped
    assert psnr(truth + 2, truth)[0] == pytest.approx(0.0, abs=1e-9)
    assert math.isfinite(float(psnr(truth, truth)[0]))


def test_refusals() -> None:
    for changes, message in (
        ({"model": MDEQConfig.digits()}, "needs a decoder"),
        ({"task": Reconstruct(corruptions=(Noise(),))}, r"set gradient=Implicit\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match="step_size=0"):
        Reconstruct(step_size=0.0)
