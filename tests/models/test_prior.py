"""The convolutional decoder: sizes, its contraction, its atoms and its penalty."""

from __future__ import annotations

import pytest
import torch

from equipoise import Anderson
from equipoise.models import EquilibriumPrior, PriorConfig
from equipoise.train import load, save

CONFIG = PriorConfig(image_size=8, fine=6, coarse=5, num_corruptions=2)


def drawn(seed: int = 0) -> EquilibriumPrior:
    """A model whose convolutions are far above their caps."""
    torch.manual_seed(seed)
    model = EquilibriumPrior(CONFIG, solver=Anderson(max_steps=60, rtol=1e-10)).double()
    for name, parameter in model.deq.cell.named_parameters():
        if "weight" in name:
            torch.nn.init.normal_(parameter)
    return model


def noise(model: EquilibriumPrior, size: tuple[int, int] = (8, 8), seed: int = 0) -> tuple[torch.Tensor, ...]:
    source = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=source) for t in model.latents(2, *size))


def test_the_map_is_a_contraction_at_any_size() -> None:
    model = drawn()
    for size in ((8, 8), (40, 24)):
        x, a, b = (noise(model, size, seed) for seed in range(3))
        # Power iteration on a difference: the norm of the Jacobian, which the caps bound by 2 cap.
        for _ in range(8):
            images = model.deq.cell(a, x), model.deq.cell(b, x)
            apart = sum(float((p - q).square().sum().detach()) for p, q in zip(*images, strict=True)) ** 0.5
            before = sum(float((p - q).square().sum()) for p, q in zip(a, b, strict=True)) ** 0.5
            assert apart <= 2 * CONFIG.cap * before * (1 + 1e-9)
            a, b = images[0], images[1]
            a, b = (tuple(t.detach() for t in part) for part in (a, b))


def test_norms_of_the_four_convolutions_are_below_their_caps() -> None:
    cell = drawn().deq.cell
    for conv, cap in ((cell.within[0], 0.4), (cell.within[1], 0.4), (cell.down, 0.2), (cell.up, 0.8)):
        kernel = conv.weight.detach()
        angles = torch.arange(64) * (2 * torch.pi / 64)
        waves = torch.exp(-1j * angles[:, None] * torch.arange(3))
        symbols = torch.einsum("ocuv,au,bv->aboc", kernel.to(waves.dtype), waves, waves)
        norm = float(torch.linalg.matrix_norm(symbols, ord=2).max())
        assert 0.9 * cap < norm <= cap * (1 + 1e-9)


def test_images_are_of_any_size_and_shift_with_their_latents() -> None:
    torch.manual_seed(0)
    model = EquilibriumPrior(CONFIG, solver=Anderson(max_steps=60, rtol=1e-10)).double()
    x = noise(model, (40, 40))
    x = tuple(torch.nn.functional.pad(t[..., 3:-3, 3:-3], (3,) * 4) for t in x)
    moved = (x[0].roll((2, 4), (2, 3)), x[1].roll((1, 2), (2, 3)))
    inside = (..., slice(12, 28), slice(16, 28))
    image, shifted = model(x).detach(), model(moved).detach()
    assert image.shape == (2, 1, 40, 40)
    assert torch.allclose(image.roll((4, 8), (2, 3))[inside], shifted[inside], atol=1e-4)


def test_cosines_are_a_frame_that_begins_orthonormal() -> None:
    model = EquilibriumPrior(PriorConfig(image_size=16))
    atoms = model.atoms[0].weight.detach()[:, 0, 1:5, 1:5].flatten(1)
    assert torch.allclose(atoms @ atoms.T, 0.25 * torch.eye(16), atol=0.05)


def test_the_penalty_is_an_absolute_value_far_out_and_a_parabola_near_zero() -> None:
    model = drawn()
    x = model.latents(1, 8, 8)
    x[0][0, 2, 1, 1] = 50.0
    weight = (5.0 * model.log_penalties[0][2]).exp().item()
    assert model.penalty(x).item() == pytest.approx(weight * (50.0 - CONFIG.smoothing), rel=1e-4)
    x[0][0, 2, 1, 1] = 1e-4
    assert model.penalty(x).item() == pytest.approx(weight * 1e-8 / (2 * CONFIG.smoothing), rel=1e-3)


def test_a_saved_model_is_the_same(tmp_path: object) -> None:
    model = drawn().eval()
    save(model, f"{tmp_path}/model.safetensors")
    again = load(f"{tmp_path}/model.safetensors")
    x = noise(model)
    assert torch.equal(model(x), again(x))
    assert torch.equal(model.weights(), again.weights())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of 4, got 30"):
        PriorConfig(image_size=30)
    with pytest.raises(ValueError, match=r"cap must lie in \(0, 0.5\), got 0.5"):
        PriorConfig(image_size=8, cap=0.5)
    with pytest.raises(ValueError, match="color channels one by one"):
        PriorConfig(image_size=8, image_channels=3)
    with pytest.raises(ValueError, match="images of 10x8"):
        drawn().latents(1, 10, 8)
