"""Corruptions, the decoder of latent vectors, and the task of decoders, against formulas and differences."""

import dataclasses
import math
import pathlib

import pytest
import scipy.ndimage
import torch
from toy import assert_slopes

import equipoise as eq
from equipoise.data import Digits
from equipoise.inputs import Envelope
from equipoise.train import Adam, StepInfo, TrainConfig, fit
from equipoise.zoo import Blur, Corruption, DecoderConfig, Downsample, Hole, LatentDecoder, Noise, Reconstruct, psnr
from equipoise.zoo.files import load


def images() -> torch.Tensor:
    return torch.rand(3, 2, 12, 20, generator=torch.Generator().manual_seed(0))


def test_blur() -> None:
    clean = images()
    # 4.5 standard deviations are rounded up to 5 pixels, and SciPy rounds to the nearest.
    sigma = (0, 0, 1.5, 1.5)
    expected = scipy.ndimage.gaussian_filter(clean.numpy(), sigma, radius=(0, 0, 5, 5), mode="nearest")
    torch.testing.assert_close(Blur(sigma=1.5).apply(clean), torch.from_numpy(expected))
    small = torch.rand(1, 1, 7, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(Blur(sigma=0.8).apply, small)


def test_downsampling() -> None:
    found = Downsample(factor=4).apply(images())
    torch.testing.assert_close(found, images().unflatten(2, (3, 4)).unflatten(4, (5, 4)).mean((3, 5)))
    with pytest.raises(ValueError, match="does not divide images of 12x20"):
        Downsample(factor=5).apply(images())


def test_noise() -> None:
    clean = torch.full((4, 1, 64, 64), 0.5)
    observed, mask = Noise(std=0.2).observe(clean, torch.Generator().manual_seed(1))
    again, _ = Noise(std=0.2).observe(clean, torch.Generator().manual_seed(1))
    assert torch.equal(observed, again)
    assert bool((clean == 0.5).all() & (mask == 1).all())  # not in place
    noise = observed - clean
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02)
    assert float((noise[..., 1:] * noise[..., :-1]).mean()) == pytest.approx(0.0, abs=2e-3)


def test_holes() -> None:
    clean = images() + 0.1
    observed, mask = Hole(size=5).observe(clean, torch.Generator().manual_seed(0))
    assert mask.shape == observed.shape == clean.shape
    torch.testing.assert_close(observed, clean * mask)
    corners = set()
    for picture in mask:
        assert torch.equal(picture[0], picture[1])
        places = (picture[0] == 0).nonzero()
        low, high = places.amin(0), places.amax(0)
        assert (len(places), (high - low).tolist()) == (25, [4, 4])
        corners.add(tuple(low.tolist()))
    assert len(corners) > 1
    with pytest.raises(ValueError, match="covers images"):
        Hole(size=12).observe(clean)


@pytest.mark.parametrize("corruption", [Blur(), Downsample(), Hole(size=4), Noise()], ids=repr)
def test_shape_and_type(corruption: Corruption) -> None:
    for dtype in (torch.float32, torch.float64):
        observed, mask = corruption.observe(images().to(dtype), torch.Generator().manual_seed(0))
        expected = (dtype, corruption.apply(images()).shape)
        assert (observed.dtype, observed.shape) == (mask.dtype, mask.shape) == expected


SMALL = DecoderConfig(image_size=6, image_channels=2, latent_size=3, width=24)


def test_formula() -> None:
    model = SMALL.build(solver=eq.Anderson(max_steps=60, rtol=1e-12)).eval()
    assert isinstance(model, LatentDecoder)
    x = torch.randn(5, 3)
    cell, dense = model.deq.cell, model.head[0]
    z = torch.zeros(5, 24)
    for _ in range(80):
        z = torch.tanh(0.5 * z @ cell.state.weight.T + x @ cell.injection.weight.T + cell.injection.bias)
    images = torch.sigmoid(z @ dense.weight.T + dense.bias).view(5, 2, 6, 6)
    torch.testing.assert_close((model(x), model.decode(model.deq(x))), (images, images))


def test_contraction() -> None:
    cell = LatentDecoder(SMALL).deq.cell.requires_grad_(False)
    for _ in range(200):  # power iterations, one at each use
        cell.state.weight  # noqa: B018
    cell.eval()
    assert float(torch.linalg.matrix_norm(cell.state.weight, 2)) == pytest.approx(1.0, abs=1e-6)
    z, other, x = torch.randn(100, 24), torch.randn(100, 24), torch.randn(100, 3)
    ratio = torch.linalg.vector_norm(cell(z, x) - cell(other, x), dim=1) / torch.linalg.vector_norm(z - other, dim=1)
    assert float(ratio.max()) <= 0.5


def test_latents() -> None:
    model = LatentDecoder(SMALL, solver=eq.Anderson(max_steps=60, rtol=1e-10)).eval()
    truth = torch.randn(4, 3)
    images = model(truth).detach()
    x0 = model.latents(4, 6, 6)
    assert not x0.any()
    solution = eq.optimize_inputs(
        model.deq.cell,
        z0=model.start(x0),
        x0=x0,
        cost=lambda z, x: (model.decode(z) - images).square().sum((1, 2, 3)),
        optimizer=eq.inputs.InputOptimizer(solver=eq.Anderson(memory=10, max_steps=400, rtol=1e-9)),
    )
    torch.testing.assert_close(solution.value[2], truth, atol=1e-5, rtol=0)


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

    assert_slopes(loss, [model.head[0].bias, model.deq.cell.injection.weight])


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
