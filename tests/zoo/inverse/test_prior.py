"""The equilibrium that restores images: sizes, its contraction, what it refuses, its file."""

from __future__ import annotations

import pathlib

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
def test_the_equilibrium_is_found_at_any_size(size: tuple[int, int]) -> None:
    model = drawn()
    observed, mask = torch.rand(2, 1, *size), torch.ones(2, 1, *size)
    x, context = torch.randn(2, 4, *size), model.context(observed, mask)
    solution = model.deq.solve(x, *context).raise_for_status()
    again = model.deq.cell(solution.value, x, *context)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(solution.value, again, strict=True))
    assert torch.allclose(solution.value[-1], observed)
    assert model(x, observed, mask).shape == observed.shape
    jacobian_norm = eq.jacobian_norm(solution)
    assert float(jacobian_norm.max()) < 1.5
    assert int(solution.num_steps.max()) < 60


def test_rows_do_not_see_each_other_and_the_mask_is_seen() -> None:
    model = drawn()
    observed, mask, x = torch.rand(3, 1, 8, 8), torch.ones(3, 1, 8, 8), torch.randn(3, 4, 8, 8)
    whole = model(x, observed, mask)
    assert torch.allclose(model(x[1:2], observed[1:2], mask[1:2]), whole[1:2], atol=1e-8)
    mask[:, :, 2:5, 2:5] = 0
    assert not torch.allclose(model(x, observed, mask), whole)


def test_the_state_has_the_size_that_is_told() -> None:
    state = drawn().start(torch.zeros(1, 4, 8, 8))
    assert sum(t.numel() for t in state) == CONFIG.state_size


def test_a_file_keeps_it(tmp_path: pathlib.Path) -> None:
    model = drawn()
    save(model, tmp_path / "model.safetensors", about={})
    loaded = load(tmp_path / "model.safetensors").double()
    observed, mask, x = torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.randn(1, 4, 8, 8)
    assert torch.allclose(model(x, observed, mask), loaded(x, observed, mask), atol=1e-8)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of 4, got 10"):
        PriorConfig(image_size=10)
    with pytest.raises(ValueError, match="at least one level"):
        PriorConfig(image_size=8, channels=())
    with pytest.raises(ValueError, match=r"gain=0\.0: must be > 0"):
        PriorConfig(image_size=8, gain=0.0)
    with pytest.raises(ValueError, match="multiples of 4, got 10x8"):
        drawn().context(torch.zeros(1, 1, 10, 8), torch.ones(1, 1, 10, 8))
