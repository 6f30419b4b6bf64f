"""Layers inside a fixed point: weights computed once per solve, noise that is fixed during one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import equipoise as eq
from equipoise.core.function_map import FunctionMap

D = 5
TIGHT = eq.Anderson(max_steps=200, rtol=1e-12)
EXACT = eq.Implicit(solver=TIGHT)


class Cell(nn.Module):
    """tanh(W z / 2 + U x), the weight W normalised."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module], d: int = D) -> None:
        super().__init__()
        self.w = norm(nn.Linear(d, d, bias=False))
        self.u = nn.Linear(d, d)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.w(z) / 2 + self.u(x))


NORMS = {"weight": eq.nn.weight_norm, "spectral": eq.nn.spectral_norm}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def normed(norm: Callable[[nn.Module], nn.Module], d: int = D) -> eq.nn.DEQ:
    return eq.nn.DEQ(Cell(norm, d), solver=TIGHT, gradient=EXACT)


def power_vectors(layer: eq.nn.DEQ) -> list[list[float]]:
    """State of the power iteration of a spectral norm."""
    part = layer.cell.w.parametrizations.weight[0]
    return [part._u.tolist(), part._v.tolist()]


def unsettled() -> eq.nn.DEQ:
    """A spectral norm in training whose power iteration has not converged, so that every use of it shows."""
    layer = normed(eq.nn.spectral_norm)
    part = layer.cell.w.parametrizations.weight[0]
    part._u.copy_(nn.functional.normalize(torch.randn(D), dim=0))
    part._v.copy_(nn.functional.normalize(torch.randn(D), dim=0))
    return layer


# --- normalised weights ----------------------------------------------------------------------------------------------


@norms
def test_weights_are_computed_once_per_solve_and_once_in_backward(norm: Callable[[nn.Module], nn.Module]) -> None:
    layer = normed(norm)
    uses = 0

    def count(*_: Any) -> None:
        nonlocal uses
        uses += 1

    layer.cell.w.parametrizations.weight[0].register_forward_hook(count)
    solution = layer.solve(torch.randn(7, D))
    assert solution.num_evals > 5
    assert uses == 1
    solution.value.sum().backward()
    assert uses == 2
    with torch.no_grad():
        layer(torch.randn(7, D))
    assert uses == 3
    assert not parametrize._cache


def test_normalised_weights_are_those_of_their_definitions() -> None:
    for module, shape in ((nn.Linear(D, 3), (3, 1)), (nn.Conv2d(2, 4, 3), (4, 1, 1, 1))):
        weight = module.weight.detach().clone()
        assert eq.nn.weight_norm(module) is module
        torch.testing.assert_close(module.weight, weight)  # normalising changes the layer's parameters, not the layer
        original = module.parametrizations.weight
        assert original.original0.shape == shape
        torch.testing.assert_close(original.original0.flatten(), weight.flatten(1).norm(dim=1))
        with torch.no_grad():
            original.original0.mul_(3.0)  # g
            original.original1.mul_(7.0)  # v, whose length does not matter
        torch.testing.assert_close(module.weight, 3 * weight)
    other = eq.nn.weight_norm(nn.Linear(D, 3), dim=1)
    assert other.parametrizations.weight.original0.shape == (1, D)

    spectral = eq.nn.spectral_norm(nn.Linear(D, 3), n_power_iterations=100)
    expected = spectral.parametrizations.weight.original
    torch.testing.assert_close(spectral.weight, expected / torch.linalg.matrix_norm(expected, 2))


@norms
@pytest.mark.parametrize("training", [True, False])
def test_gradients_through_normalised_weights_equal_finite_differences(
    norm: Callable[[nn.Module], nn.Module], training: bool
) -> None:
    layer = normed(norm, d=3)
    if norm is eq.nn.spectral_norm:
        for _ in range(2000):  # in training the power iteration moves on, unless it has converged
            _ = layer.cell.w.weight
    layer.train(training)
    x = torch.randn(2, 3, requires_grad=True)
    # The layer's own parameters are perturbed in place.
    torch.autograd.gradcheck(lambda *_: layer(x), (x, *layer.parameters()), atol=1e-6, fast_mode=True)


@norms
def test_second_derivatives_through_normalised_weights_equal_finite_differences(
    norm: Callable[[nn.Module], nn.Module],
) -> None:
    layer = normed(norm, d=3).eval()
    x = torch.randn(1, 3, requires_grad=True)
    torch.autograd.gradgradcheck(lambda *_: layer(x), (x, *layer.cell.w.parameters()), atol=1e-6, fast_mode=True)


@norms
def test_a_cache_of_the_caller_serves_no_other_grad_mode(norm: Callable[[nn.Module], nn.Module]) -> None:
    layer = normed(norm).eval()
    x = torch.randn(3, D)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    with parametrize.cached():
        with torch.no_grad():
            _ = layer.cell.w.weight  # cached without a graph
            layer(x)
        grads = torch.autograd.grad(layer(x).square().sum(), parameters)
    for actual, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@norms
def test_weights_follow_their_parameters_from_one_solve_to_the_next(norm: Callable[[nn.Module], nn.Module]) -> None:
    layer = normed(norm).eval()
    x = torch.randn(3, D)
    layer(x).sum().backward()
    with torch.no_grad():
        for p in layer.cell.w.parameters():
            p.copy_(torch.randn_like(p))
    z = layer(x)
    weight = layer.cell.w.weight
    torch.testing.assert_close(z, torch.tanh(z @ weight.T / 2 + layer.cell.u(x)))


@norms
def test_normalised_layers_are_copied_cast_saved_and_loaded(norm: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = normed(norm), torch.randn(3, D)
    layer(x).sum().backward()  # whatever a solve leaves behind must not be copied along
    layer.eval()
    z = layer(x)

    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), z)
    with torch.no_grad():
        twin.cell.u.bias.add_(1.0)
        for p in twin.cell.w.parameters():
            p.mul_(torch.rand_like(p))
    assert not torch.allclose(twin(x), z)
    assert torch.equal(layer(x), z)

    loose = eq.Anderson(max_steps=100, rtol=1e-5)
    for cast in (copy.deepcopy(layer).float(), copy.deepcopy(layer).to(torch.float32)):
        with cast.using(solver=loose, gradient=eq.Implicit(solver=loose)):
            out = cast(x.float())
        out.sum().backward()
        assert out.dtype == torch.float32
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in cast.parameters())
        torch.testing.assert_close(out.double(), z, rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    with half.using(solver=eq.Anderson(rtol=1e-2)):
        torch.testing.assert_close(half(x.bfloat16()).double(), z, rtol=0.05, atol=0.05)

    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = normed(norm).eval()
    assert not torch.allclose(fresh(x), z)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), z)


def test_a_solve_makes_one_power_iteration_and_nothing_after_it_makes_another() -> None:
    layer, x = unsettled(), torch.randn(3, D, requires_grad=True)
    part = layer.cell.w.parametrizations.weight
    w, v = part.original.detach(), part[0]._v.clone()
    solution = layer.solve(x)
    # One iteration, written down; the vectors are v <- W^T u / |W^T u| after u <- W v / |W v|.
    u = nn.functional.normalize(w @ v, dim=0)
    torch.testing.assert_close(part[0]._u, u)
    torch.testing.assert_close(part[0]._v, nn.functional.normalize(w.T @ u, dim=0))
    after = power_vectors(layer)
    eq.nn.jacobian_penalty(solution)
    assert power_vectors(layer) == after, "penalty"
    eq.nn.spectral_radius(solution)
    assert power_vectors(layer) == after, "spectral radius"
    (g,) = torch.autograd.grad(solution.value.sum(), x, create_graph=True)
    assert power_vectors(layer) == after, "backward"
    torch.autograd.grad(g.square().sum(), x)
    assert power_vectors(layer) == after, "second backward"
    layer(x)
    assert power_vectors(layer) != after


@pytest.mark.parametrize("forward_training", [True, False])
@pytest.mark.parametrize("backward_training", [True, False])
def test_backward_keeps_map_and_mode_when_the_mode_changed_meanwhile(
    forward_training: bool, backward_training: bool
) -> None:
    layer, x = unsettled().train(forward_training), torch.randn(3, D, requires_grad=True)
    out = layer(x)
    expected = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    before = power_vectors(layer)
    layer.train(backward_training)
    (g,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(g, expected)
    assert power_vectors(layer) == before
    assert {m.training for m in layer.modules()} == {backward_training}


# --- dropout ---------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """tanh(drop(W z) + x); notes the mask that every sample, known by its number, meets at every evaluation."""

    def __init__(self, p: float = 0.4, d: int = 8) -> None:
        super().__init__()
        self.w = nn.Linear(d, d, bias=False)
        with torch.no_grad():
            self.w.weight.mul_(0.8 / torch.linalg.matrix_norm(self.w.weight, 2))
        self.drop = eq.nn.VariationalDropout(p)
        self.seen: list[dict[int, tuple[float, ...]]] = []

    def forward(self, z: Tensor, x: Tensor, number: Tensor) -> Tensor:
        mask = self.drop(torch.ones_like(z)).tolist()
        self.seen.append({n: tuple(row) for n, row in zip(number.tolist(), mask, strict=True)})
        return torch.tanh(self.drop(self.w(z)) + x)


def staggered(batch: int = 8, d: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs whose samples need different numbers of steps, and their numbers."""
    return torch.randn(batch, d) * torch.logspace(-2, 1, batch)[:, None], torch.arange(batch)


def test_every_evaluation_of_a_solve_and_of_its_backward_sees_the_same_mask() -> None:
    cell = Watched()
    layer = eq.nn.DEQ(cell, solver=eq.Picard(max_steps=200, rtol=1e-10), gradient=EXACT)
    x, numbers = staggered()
    out = layer(x.requires_grad_(), numbers)
    forward = len(cell.seen)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)
    assert len(cell.seen) > forward
    assert min(map(len, cell.seen)) < max(map(len, cell.seen)), "samples must leave for this test to tell something"
    masks: dict[int, set[tuple[float, ...]]] = {n: set() for n in range(8)}
    for evaluation in cell.seen:
        for n, mask in evaluation.items():
            masks[n].add(mask)
    assert all(len(met) == 1 for met in masks.values())
    assert len(set.union(*masks.values())) == 8, "samples have masks of their own"
    cell.seen.clear()
    layer(x, numbers)
    assert all(cell.seen[0][n] not in masks[n] for n in range(8)), "the next solve draws others"


def test_what_a_sample_gets_under_dropout_does_not_depend_on_its_batch_mates() -> None:
    cell, solver = Watched(), eq.Anderson(max_steps=200, rtol=1e-10)
    x, numbers = staggered()
    f = FunctionMap(cell, torch.zeros_like(x), (x, numbers))
    together = solver.solve(f, torch.zeros_like(x))
    assert together.num_steps.unique().numel() > 3
    for n in range(8):
        row = torch.tensor([n])
        alone = solver.solve(f.select(row), torch.zeros(1, 8))
        torch.testing.assert_close(alone.value[0], together.value[n], rtol=1e-9, atol=1e-12)
        assert int(alone.num_steps) == int(together.num_steps[n])


def test_gradients_under_dropout_equal_finite_differences_of_the_map_with_its_mask() -> None:
    layer = eq.nn.DEQ(Watched(d=3), solver=TIGHT, gradient=EXACT)
    numbers, x = torch.arange(2), torch.randn(2, 3, requires_grad=True)

    def solve(x: Tensor, w: Tensor) -> Tensor:
        torch.manual_seed(5)  # the seeds of the samples
        return layer(x, numbers)

    torch.autograd.gradcheck(solve, (x, layer.cell.w.weight))
    torch.autograd.gradgradcheck(solve, (x, layer.cell.w.weight), atol=1e-6, fast_mode=True)


def test_backward_keeps_the_mask_when_the_mode_changed_meanwhile() -> None:
    layer = eq.nn.DEQ(Watched(), solver=TIGHT, gradient=EXACT)
    x, numbers = staggered()
    out = layer(x.requires_grad_(), numbers)
    (expected,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    layer.eval()
    (g,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(g, expected)


def test_dropout_is_off_in_evaluation_mode() -> None:
    cell = Watched().eval()
    x, numbers = staggered()
    state = torch.get_rng_state()
    z = eq.nn.DEQ(cell, solver=TIGHT)(x, numbers)
    assert torch.equal(torch.get_rng_state(), state), "no seeds are drawn"
    torch.testing.assert_close(z, torch.tanh(cell.w(z) + x))
    assert torch.equal(cell.drop(x), x)
    assert torch.equal(eq.nn.VariationalDropout(0.0).train()(x), x)


class Masks(nn.Module):
    """Shows the masks of several layers, `(B, layers * C)`."""

    def __init__(self, layers: int, channels: int, p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(eq.nn.VariationalDropout(p) for _ in range(layers))
        self.channels = channels

    def forward(self, z: Tensor) -> Tensor:
        ones = z.new_ones(z.shape[0], self.channels)
        return torch.cat([layer(ones) for layer in self.layers], dim=1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_channels_are_kept_with_the_right_probability_independently(p: float) -> None:
    samples, layers, channels = 4000, 3, 12
    cell = Masks(layers, channels, p)
    z0 = torch.zeros(samples, layers * channels)
    masks = eq.fixed_point(cell, z0, solver=eq.Picard(max_steps=2)).value
    kept = masks != 0
    torch.testing.assert_close(masks[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    deviation = (p * (1 - p) / samples) ** 0.5
    assert float((kept.double().mean(0) - (1 - p)).abs().max()) < 4.5 * deviation
    # Any two channels, of one layer or of two, agree no more often than chance: correlations are of order n^{-1/2}.
    correlation = torch.corrcoef(kept.double().T) - torch.eye(layers * channels)
    assert float(correlation.abs().max()) < 5 / samples**0.5


def test_a_channel_is_dropped_as_a_whole() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = eq.nn.VariationalDropout(0.5)

        def forward(self, z: Tensor) -> Tensor:
            return self.drop(torch.ones_like(z))

    z = eq.fixed_point(Image(), torch.zeros(4, 6, 3, 2), solver=eq.Picard(max_steps=2)).value
    assert torch.equal(z, z[:, :, :1, :1].expand_as(z))
    assert z[:, :, 0, 0].unique().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_impossible_probabilities_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"VariationalDropout\(p=.*must lie in \[0, 1\)"):
        eq.nn.VariationalDropout(p)


def test_dropout_without_the_seeds_of_a_solve_says_how_to_get_them() -> None:
    drop = eq.nn.VariationalDropout(0.5)
    for use in (lambda: drop(torch.ones(2, 3)), lambda: eq.fixed_point(lambda z: drop(z), torch.ones(2, 3))):
        with pytest.raises(RuntimeError, match=r"give the module itself to .* or call .eval"):
            use()
    assert repr(drop) == "VariationalDropout(p=0.5)"


def test_masks_are_a_published_function_of_seed_and_channel() -> None:
    """Runs are repeated from their seeds, so the numbers behind the masks must never change."""
    low = 0xFFFFFFFF

    def uniform(seed: int, channel: int) -> float:
        x = (seed + channel * 0x9E3779B1) & low
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) & low
        return (x ^ (x >> 16)) / 2.0**32

    layer = eq.nn.VariationalDropout(0.3)
    layer.seeds = torch.tensor([0, 7, 2**31 + 5, 2**33 + 1])
    mask = layer(torch.ones(4, 300))
    for row, seed in enumerate(layer.seeds.tolist()):
        assert [bool(kept) for kept in mask[row]] == [uniform(seed, channel) >= 0.3 for channel in range(300)]
