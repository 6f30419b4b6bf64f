"""The equilibrium that restores images: sizes, its contraction, what it refuses, its file."""

import pathlib
from typing import Any

import pytest
import torch

import equipoise as eq
from equipoise.train import save
from equipoise.zoo import EquilibriumPrior, PriorConfig
from equipoise.zoo.files import load

CONFIG = PriorConfig(image_size=8, channels=(6, 8, 10), num_corruptions=2)


def drawn(seed: int = 0) -> EquilibriumPrior:
    torch.manual_seed(seed)
    return EquilibriumPrior(CONFIG, solver=eq.Anderson(max_steps=100, rtol=1e-10)).double().eval()


@pytest.mark.parametrize("size", [(8, 8), (40, 24)])
def test_equilibrium(size: tuple[int, int]) -> None:
    model = drawn()
    observed, mask = torch.rand(2, 1, *size), torch.ones(2, 1, *size)
    x, context = torch.randn(2, 4, *size), model.context(observed, mask)
    solution = model.deq.solve(x, *context).raise_for_status()
    again = model.deq.cell(solution.value, x, *context)
    torch.testing.assert_close(solution.value, again, rtol=0, atol=1e-8)
    torch.testing.assert_close(solution.value[-1], observed)
    assert model(x, observed, mask).shape == observed.shape
    assert (float(eq.jacobian_norm(solution).max()) < 1.5, int(solution.num_steps.max()) < 60) == (True, True)


def test_rows_and_mask() -> None:
    model = drawn()
    assert sum(t.numel() for t in model.start(torch.zeros(1, 4, 8, 8))) == CONFIG.state_size
    observed, mask, x = torch.rand(3, 1, 8, 8), torch.ones(3, 1, 8, 8), torch.randn(3, 4, 8, 8)
    whole = model(x, observed, mask)
    assert torch.allclose(model(x[1:2], observed[1:2], mask[1:2]), whole[1:2], atol=1e-8)
    mask[:, :, 2:5, 2:5] = 0
    assert not torch.allclose(model(x, observed, mask), whole)


def test_file(tmp_path: pathlib.Path) -> None:
    model = drawn()
    save(model, tmp_path / "model.safetensors", about={})
    loaded = load(tmp_path / "model.safetensors").double()
    observed, mask, x = torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.randn(1, 4, 8, 8)
    assert torch.allclose(model(x, observed, mask), loaded(x, observed, mask), atol=1e-8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 10}, "image_size must be a multiple of 4, got 10"),
        ({"image_size": 8, "channels": ()}, "at least one level"),
        ({"image_size": 8, "gain": 0.0}, r"gain=0\.0: must be > 0"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorConfig(**fields)
    with pytest.raises(ValueError, match="multiples of 4, got 10x8"):
        drawn().context(torch.zeros(1, 1, 10, 8), torch.ones(1, 1, 10, 8))
