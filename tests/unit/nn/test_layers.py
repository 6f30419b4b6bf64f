"""Layers inside a fixed point: weights computed once per solve, noise that is fixed during one."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import equipoise as eq

D = 5
TIGHT = eq.Anderson(max_steps=200, rtol=1e-12)
EXACT = eq.Implicit(solver=TIGHT)
Norm = Callable[[nn.Module], nn.Module]


class Cell(nn.Module):
    """tanh(W z / 2 + U x), the weight W normalized."""

    def __init__(self, norm: Norm, d: int = D) -> None:
        super().__init__()
        self.w = norm(nn.Linear(d, d, bias=False))
        self.u = nn.Linear(d, d)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.w(z) / 2 + self.u(x))


norms = pytest.mark.parametrize("norm", [eq.nn.weight_norm, eq.nn.spectral_norm], ids=["weight", "spectral"])


def normed(norm: Norm, d: int = D) -> eq.nn.DEQ:
    return eq.nn.DEQ(Cell(norm, d), solver=TIGHT, gradient=EXACT)


def weights(layer: eq.nn.DEQ) -> nn.Module:
    return layer.cell.w.parametrizations.weight


def power_vectors(layer: eq.nn.DEQ) -> list[list[float]]:
    """State of the power iteration of a spectral norm."""
    return [weights(layer)[0]._u.tolist(), weights(layer)[0]._v.tolist()]


def unsettled() -> eq.nn.DEQ:
    """A spectral norm in training whose power iteration has not converged, so that every use of it shows."""
    layer = normed(eq.nn.spectral_norm)
    for vector in (weights(layer)[0]._u, weights(layer)[0]._v):
        vector.copy_(nn.functional.normalize(torch.randn(D), dim=0))
    return layer


# --- normalized weights ----------------------------------------------------------------------------------------------


@norms
def test_computed_once(norm: Norm) -> None:
    """Once per solve and once in backward."""
    layer, uses, x = normed(norm), [], torch.randn(7, D)
    weights(layer)[0].register_forward_hook(lambda *_: uses.append(1))
    solution = layer.solve(x)
    assert solution.num_evals > 5
    assert len(uses) == 1
    solution.value.sum().backward()
    assert len(uses) == 2
    with torch.no_grad():
        layer(x)
    assert len(uses) == 3
    assert not parametrize._cache


def test_definitions() -> None:
    for module, shape in ((nn.Linear(D, 3), (3, 1)), (nn.Conv2d(2, 4, 3), (4, 1, 1, 1))):
        weight = module.weight.detach().clone()
        assert eq.nn.weight_norm(module) is module
        torch.testing.assert_close(module.weight, weight)  # normalizing changes the layer's parameters, not the layer
        original = module.parametrizations.weight
        assert original.original0.shape == shape
        torch.testing.assert_close(original.original0.flatten(), weight.flatten(1).norm(dim=1))
        with torch.no_grad():
            original.original0.mul_(3.0)  # g
            original.original1.mul_(7.0)  # v, whose length does not matter
        torch.testing.assert_close(module.weight, 3 * weight)
    assert eq.nn.weight_norm(nn.Linear(D, 3), dim=1).parametrizations.weight.original0.shape == (1, D)
    with pytest.raises(
        ValueError, match=r"^weight_norm\(Linear\): its weight is parametrized already.*use one of them"
    ):
        eq.nn.weight_norm(eq.nn.weight_norm(nn.Linear(D, 3)))
    spectral = eq.nn.spectral_norm(nn.Linear(D, 3), n_power_iterations=100)
    expected = spectral.parametrizations.weight.original
    torch.testing.assert_close(spectral.weight, expected / torch.linalg.matrix_norm(expected, 2))


@norms
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.slow
def test_finite_differences(norm: Norm, training: bool) -> None:
    """Of first and, in evaluation mode, second derivatives; the layer's own parameters are perturbed in place."""
    layer, x = normed(norm, d=3), torch.randn(2, 3, requires_grad=True)
    if norm is eq.nn.spectral_norm:
        for _ in range(300):  # in training the power iteration moves on, unless it has converged
            _ = layer.cell.w.weight
    layer.train(training)
    torch.autograd.gradcheck(lambda *_: layer(x), (x, *layer.parameters()), atol=1e-6, fast_mode=True)
    if not training:
        inputs = (x, *layer.cell.w.parameters())
        torch.autograd.gradgradcheck(lambda *_: layer(x), inputs, atol=1e-6, fast_mode=True)


@norms
def test_cache_of_the_caller(norm: Norm) -> None:
    """It serves no other grad mode."""
    layer, x = normed(norm).eval(), torch.randn(3, D)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    with parametrize.cached():
        with torch.no_grad():
            _ = layer.cell.w.weight  # cached without a graph
            layer(x)
        grads = torch.autograd.grad(layer(x).square().sum(), parameters)
    torch.testing.assert_close(grads, expected)


@norms
def test_parameters_change(norm: Norm) -> None:
    """Weights follow them from one solve to the next."""
    layer, x = normed(norm).eval(), torch.randn(3, D)
    layer(x).sum().backward()
    with torch.no_grad():
        for p in layer.cell.w.parameters():
            p.copy_(torch.randn_like(p))
    z = layer(x)
    torch.testing.assert_close(z, torch.tanh(z @ layer.cell.w.weight.T / 2 + layer.cell.u(x)))


@norms
def test_copied_cast_saved(norm: Norm) -> None:
    layer, x = normed(norm), torch.randn(3, D)
    layer(x).sum().backward()  # whatever a solve leaves behind must not be copied along
    z, twin = layer.eval()(x), copy.deepcopy(layer)
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
        assert {out.dtype, *(p.grad.dtype for p in cast.parameters())} == {torch.float32}
        torch.testing.assert_close(out.double(), z, rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    with half.using(solver=eq.Anderson(rtol=1e-2)):
        torch.testing.assert_close(half(x.bfloat16()).double(), z, rtol=0.05, atol=0.05)

    buffer, fresh = io.BytesIO(), normed(norm).eval()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert not torch.allclose(fresh(x), z)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), z)


def test_power_iteration() -> None:
    """A solve makes one, v <- W^T u / |W^T u| after u <- W v / |W v|, and nothing after it makes another."""
    layer, x = unsettled(), torch.randn(3, D, requires_grad=True)
    w, v = weights(layer).original.detach(), weights(layer)[0]._v.clone()
    solution = layer.solve(x)
    u = nn.functional.normalize(w @ v, dim=0)
    torch.testing.assert_close(weights(layer)[0]._u, u)
    torch.testing.assert_close(weights(layer)[0]._v, nn.functional.normalize(w.T @ u, dim=0))
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
def test_mode_changed_before_backward(forward_training: bool, backward_training: bool) -> None:
    """It keeps the map and the mode."""
    layer, x = unsettled().train(forward_training), torch.randn(3, D, requires_grad=True)
    out = layer(x)
    expected = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    before = power_vectors(layer)
    layer.train(backward_training)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)
    assert power_vectors(layer) == before
    assert {m.training for m in layer.modules()} == {backward_training}


# --- dropout ---------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """tanh(drop(W z) + x); notes the mask that every sample, known by its number, meets at every evaluation."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.w = nn.Linear(d, d, bias=False)
        with torch.no_grad():
            self.w.weight.mul_(0.8 / torch.linalg.matrix_norm(self.w.weight, 2))
        self.drop = eq.nn.VariationalDropout(0.4)
        self.seen: list[dict[int, tuple[float, ...]]] = []

    def forward(self, z: Tensor, x: Tensor, number: Tensor) -> Tensor:
        mask = self.drop(torch.ones_like(z)).tolist()
        self.seen.append({n: tuple(row) for n, row in zip(number.tolist(), mask, strict=True)})
        return torch.tanh(self.drop(self.w(z)) + x)


def staggered() -> tuple[Tensor, Tensor]:
    """Inputs whose samples need different numbers of steps, and their numbers."""
    return (torch.randn(8, 8) * torch.logspace(-2, 1, 8)[:, None]).requires_grad_(), torch.arange(8)


def test_one_mask() -> None:
    """Every evaluation of a solve and of its backward sees it; samples have their own, and the next solve others."""
    cell, (x, numbers) = Watched(), staggered()
    layer = eq.nn.DEQ(cell, solver=eq.Picard(max_steps=200, rtol=1e-10), gradient=EXACT)
    out = layer(x, numbers)
    forward = len(cell.seen)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)
    assert len(cell.seen) > forward
    assert min(map(len, cell.seen)) < max(map(len, cell.seen)), "samples must leave for this test to tell something"
    masks = [{evaluation[n] for evaluation in cell.seen if n in evaluation} for n in range(8)]
    assert [len(met) for met in masks] == [1] * 8
    assert len(set.union(*masks)) == 8
    cell.seen.clear()
    layer(x, numbers)
    assert all(cell.seen[0][n] not in masks[n] for n in range(8))


def test_batch_independence() -> None:
    cell, solver, (x, numbers) = Watched(), eq.Anderson(max_steps=200, rtol=1e-10), staggered()
    f = eq.FunctionMap(cell, torch.zeros_like(x), (x.detach(), numbers))
    together = solver.solve(f, torch.zeros_like(x))
    assert together.num_steps.unique().numel() > 3
    alone = [solver.solve(f.select(torch.tensor([n])), torch.zeros(1, 8)) for n in range(8)]
    torch.testing.assert_close(torch.cat([s.value for s in alone]), together.value, rtol=1e-9, atol=1e-12)
    assert [int(s.num_steps) for s in alone] == together.num_steps.tolist()


def test_gradients_with_a_mask() -> None:
    """They equal finite differences of the map with it."""
    layer, x = eq.nn.DEQ(Watched(d=3), solver=TIGHT, gradient=EXACT), torch.randn(2, 3, requires_grad=True)

    def solve(x: Tensor, w: Tensor) -> Tensor:
        torch.manual_seed(5)  # the seeds of the samples
        return layer(x, torch.arange(2))

    torch.autograd.gradcheck(solve, (x, layer.cell.w.weight), fast_mode=True)
    torch.autograd.gradgradcheck(solve, (x, layer.cell.w.weight), atol=1e-6, fast_mode=True)


def test_evaluation_mode() -> None:
    """Backward keeps the mask when the mode changed meanwhile; a solve has none, and draws no seeds."""
    (x, numbers), layer = staggered(), eq.nn.DEQ(Watched(), solver=TIGHT, gradient=EXACT)
    out = layer(x, numbers)
    (expected,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    layer.eval()
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)
    state = torch.get_rng_state()
    z = layer(x, numbers)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(z, torch.tanh(layer.cell.w(z) + x))
    assert torch.equal(layer.cell.drop(x), x)
    assert torch.equal(eq.nn.VariationalDropout(0.0).train()(x), x)


class Masks(nn.Module):
    """Shows the masks of several layers, `(B, layers * C)`."""

    def __init__(self, layers: int, channels: int, p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(eq.nn.VariationalDropout(p) for _ in range(layers))
        self.channels = channels

    def forward(self, z: Tensor) -> Tensor:
        ones = z.new_ones(z.shape[0], self.channels, *z.shape[2:])
        return torch.cat([layer(ones) for layer in self.layers], dim=1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_probability(p: float) -> None:
    """Channels are kept with the right one, independently: any two, of one layer or of two, agree by chance alone."""
    samples, layers, channels = 4000, 3, 12
    z0 = torch.zeros(samples, layers * channels)
    masks = eq.fixed_point(Masks(layers, channels, p), z0, solver=eq.Picard(max_steps=2)).value
    kept = masks != 0
    torch.testing.assert_close(masks[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    deviation = (p * (1 - p) / samples) ** 0.5
    assert float((kept.double().mean(0) - (1 - p)).abs().max()) < 4.5 * deviation
    correlation = torch.corrcoef(kept.double().T) - torch.eye(layers * channels)
    assert float(correlation.abs().max()) < 5 / samples**0.5


def test_whole_channels() -> None:
    z = eq.fixed_point(Masks(1, 6, 0.5), torch.zeros(4, 6, 3, 2), solver=eq.Picard(max_steps=2)).value
    assert torch.equal(z, z[:, :, :1, :1].expand_as(z))
    assert z[:, :, 0, 0].unique().tolist() == [0.0, 2.0]


def test_published_masks() -> None:
    """Runs are repeated from their seeds, so the numbers behind the masks must never change."""
    low = 0xFFFFFFFF

    def uniform(seed: int, channel: int) -> float:
        x = (seed + channel * 0x9E3779B1) & low
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) & low
        return (x ^ (x >> 16)) / 2.0**32

    layer = eq.nn.VariationalDropout(0.3)
    layer.seeds = torch.tensor([0, 7, 2**31 + 5, 2**33 + 1])
    expected = [[uniform(seed, channel) >= 0.3 for channel in range(300)] for seed in layer.seeds.tolist()]
    assert (layer(torch.ones(4, 300)) != 0).tolist() == expected


def test_dropout_misuse() -> None:
    for p in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^VariationalDropout\(p=.*must be >= 0 and < 1"):
            eq.nn.VariationalDropout(p)
    drop = eq.nn.VariationalDropout()
    assert repr(drop) == "VariationalDropout(p=0.5)"
    for use in (lambda: drop(torch.ones(2, 3)), lambda: eq.fixed_point(lambda z: drop(z), torch.ones(2, 3))):
        with pytest.raises(RuntimeError, match=r"give the module itself to .* or call .eval"):
            use()
