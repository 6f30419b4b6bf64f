"""The decoder of latent vectors: formula, constants, shapes, and a latent found again from its image."""

import dataclasses
import re

import pytest
import torch

import equipoise as eq
from equipoise.zoo import DecoderConfig, LatentDecoder

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


def test_refusals() -> None:
    model = LatentDecoder(SMALL)
    with pytest.raises(ValueError, match=re.escape("images of 6x6, not of 8x6")):
        model.latents(1, 8, 6)
    for field, value in (("latent_size", 0), ("width", 0), ("contraction", 1.0), ("image_size", 0)):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(SMALL, **{field: value})  # type: ignore[arg-type]
