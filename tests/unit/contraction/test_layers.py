"""Layers with known constants: formulas, and constants against dense Jacobians."""

import math
from collections.abc import Callable

import pytest
import torch
from problems import conv_matrix
from torch import Tensor, nn

from equipoise.contraction import (
    IsometricUpsample,
    LevelWeights,
    MaxMin,
    MeanOnlyGroupNorm,
    NearestUpsample,
    ScaledReLU,
    SLLBlock,
    UnknownConstant,
    lipschitz_bound,
)
from equipoise.nn import VariationalDropout


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Dense `(outputs, inputs)`."""
    return torch.autograd.functional.jacobian(lambda v: f(v.view_as(x)).flatten(), x.flatten())


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


# --- norms and activations -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_formula(groups: int, affine: bool) -> None:
    layer, x = MeanOnlyGroupNorm(groups, 4, affine=affine), torch.randn(3, 4, 2, 5)
    expected = (x.reshape(3, groups, -1) - x.reshape(3, groups, -1).mean(2, keepdim=True)).view_as(x)
    if affine:
        gamma, delta = torch.tensor([0.9, -0.5, 0.0, 0.3]), torch.randn(4)
        layer.weight = gamma
        layer.bias.copy_(delta)
        expected = expected * gamma[:, None, None] + delta[:, None, None]
    torch.testing.assert_close(layer(x), expected)
    shift = torch.randn(groups).repeat_interleave(4 // groups)[:, None, None]
    torch.testing.assert_close(layer(x + shift), layer(x))
    if groups < 4:
        assert not torch.allclose(layer(x + torch.tensor([5.0, 0.0, 0.0, 0.0])[:, None, None]), layer(x))


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_constant(affine: bool) -> None:
    layer, expected = MeanOnlyGroupNorm(2, 4, max_gamma=2.0, affine=affine), 1.7 if affine else 1.0
    if affine:
        layer.weight = torch.tensor([0.3, -1.7, 0.2, 1.1])
    assert norm(jacobian(layer, torch.randn(1, 4, 3, 2))) == pytest.approx(expected)
    assert lipschitz_bound(layer) == pytest.approx(expected)


@torch.no_grad()
@pytest.mark.parametrize("max_gamma", [0.5, 1.0, 3.0])
def test_scales_are_clipped(max_gamma: float) -> None:
    layer = MeanOnlyGroupNorm(1, 3, max_gamma=max_gamma)
    assert layer.weight.tolist() == [min(1.0, max_gamma)] * 3
    layer.parametrizations.weight.original.copy_(torch.tensor([7.0, -7.0, 0.1]))
    assert layer.weight.tolist() == [max_gamma, -max_gamma, 0.1]
    assert lipschitz_bound(layer) == max_gamma


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_of_clipped_scales(sign: float) -> None:
    layer = MeanOnlyGroupNorm(1, 3)
    raw = layer.parametrizations.weight.original
    raw.data = sign * torch.tensor([2.0, 1.0, 0.5])
    for slope, passed in ((1.0, sign > 0), (-1.0, sign < 0)):  # a descent step goes against the slope
        (gradient,) = torch.autograd.grad(layer.weight.sum() * slope, raw)
        assert gradient.tolist() == [slope * passed, slope * passed, slope]


def test_clipped_scales_return() -> None:
    """Momentum carries the raw scales beyond their bound; the gradients lead them back."""
    layer, farthest = MeanOnlyGroupNorm(1, 2), 0.0
    layer.weight = torch.tensor([0.6, -0.6])
    raw = layer.parametrizations.weight.original
    adam = torch.optim.Adam([raw], lr=0.1)
    for step in range(150):
        target = torch.tensor([1.0, -1.0]) * (5.0 if step < 20 else 0.2)
        adam.zero_grad()
        (layer.weight - target).square().sum().backward()
        adam.step()
        farthest = max(farthest, float(raw.detach().abs().max()))
        assert float(layer.weight.detach().abs().max()) <= 1.0
    assert farthest > 1.05
    torch.testing.assert_close(layer.weight.detach(), target, rtol=0.0, atol=0.1)


@pytest.mark.parametrize("slope", [0.1, 0.4, 1.0])
def test_scaled_relu(slope: float) -> None:
    x = torch.tensor([[-2.0, 0.5, 3.0]])
    before, layer = x.clone(), ScaledReLU(slope)
    torch.testing.assert_close(layer(x), slope * torch.tensor([[0.0, 0.5, 3.0]]))
    assert torch.equal(x, before)
    assert norm(jacobian(layer, x)) == pytest.approx(slope)
    assert lipschitz_bound(layer) == slope


def test_maxmin() -> None:
    layer, x = MaxMin(), torch.randn(2, 6, 3, 2)
    y, pairs = layer(x), x.unflatten(1, (3, 2))
    torch.testing.assert_close(y, torch.sort(pairs, dim=2, descending=True).values.flatten(1, 2))
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    matrix = jacobian(layer, x[:1])
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(36))
    with pytest.raises(ValueError, match="even number of channels, got 3"):
        layer(torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_resampling(factor: int) -> None:
    x = torch.randn(2, 3, 4, 4)
    copies, sizes = x.repeat_interleave(factor, 2).repeat_interleave(factor, 3), x.flatten(1).norm(dim=1)
    nearest, isometric = NearestUpsample(factor), IsometricUpsample(factor)
    torch.testing.assert_close(nearest(x), copies)
    torch.testing.assert_close(isometric(x), copies / factor)
    for layer, constant in ((nearest, factor), (isometric, 1), (nn.PixelUnshuffle(factor), 1)):
        torch.testing.assert_close(layer(x).flatten(1).norm(dim=1), constant * sizes)
        assert lipschitz_bound(layer) == constant


# --- constants of other layers and chains ----------------------------------------------------------------------------


def test_chain() -> None:
    linear = nn.Linear(4, 3)
    chain = nn.Sequential(linear, ScaledReLU(0.5), VariationalDropout(0.2), nn.Tanh(), nn.LeakyReLU(3.0))
    expected = norm(linear.weight.detach()) * 0.5 * 3
    assert lipschitz_bound(chain) == pytest.approx(expected)
    assert lipschitz_bound(chain, training=True) == pytest.approx(expected / 0.8)


def residual(kind: type[nn.Module], *args: object, **methods: object) -> nn.Module:
    """A layer of a subclass that adds the input to the output of its base class."""
    methods["forward"] = lambda self, x: x + kind.forward(self, x)
    return type(f"Residual{kind.__name__}", (kind,), methods)(*args)


def test_own_bound_of_a_subclass() -> None:
    assert lipschitz_bound(residual(ScaledReLU, 0.5, lipschitz_bound=lambda self, training: 1 + self.slope)) == 1.5


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(4), "BatchNorm2d: batch statistics make a sample depend on its batch; use MeanOnlyGroupNorm"),
        (nn.GroupNorm(2, 4), "GroupNorm: a division by the standard deviation .* use MeanOnlyGroupNorm"),
        (nn.LayerNorm(4), "LayerNorm: a division by the standard deviation"),
        (nn.Conv2d(2, 2, 3), "Conv2d: its norm is not bounded, and depends on the size of the image; use CappedConv2d"),
        (nn.Sequential(nn.ReLU(), nn.SiLU()), "SiLU: no Lipschitz constant is known"),
        (residual(nn.Sequential, ScaledReLU(0.5)), "ResidualSequential: no Lipschitz constant is known"),
        (residual(nn.ReLU), "ResidualReLU: no Lipschitz constant is known"),
        (residual(VariationalDropout, 0.5), "ResidualVariationalDropout: no Lipschitz constant is known"),
        (residual(ScaledReLU, 0.5), "ResidualScaledReLU: it overrides forward and inherits lipschitz_bound; define li"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unknown_constants(layer: nn.Module, message: str) -> None:
    with pytest.raises(UnknownConstant, match=message) as caught:
        lipschitz_bound(layer)
    assert caught.value.module is (layer[1] if type(layer) is nn.Sequential else layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanOnlyGroupNorm(3, 4), "num_channels=4 must be a multiple of num_groups=3"),
        (lambda: MeanOnlyGroupNorm(2, 4, max_gamma=0.0), r"max_gamma=0.0\): must be > 0"),
        (lambda: MeanOnlyGroupNorm(2, 4, max_gamma=math.nan), r"max_gamma=nan\): must be > 0"),
        (lambda: ScaledReLU(0.0), r"slope=0.0\): must be > 0 and <= 1"),
        (lambda: ScaledReLU(1.5), r"slope=1.5\): must be"),
        (lambda: IsometricUpsample(0), r"factor=0\): must be >= 1"),
        (lambda: SLLBlock(2, 4, 2), "kernel_size=2: must be odd"),
        (lambda: LevelWeights(2, "mean"), "mode='mean': must be softmax, uniform or learned"),
        (lambda: LevelWeights(2, "softmax", exchange=1.5), r"exchange=1.5\): must be >= 0 and <= 1"),
    ],
)
def test_messages(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- residual blocks and level weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (3, 5))])
def test_sll_constant(k: int) -> None:
    block, largest = SLLBlock(2, 4, k), 0.0
    for _ in range(60 if k == 3 else 20):
        with torch.no_grad():
            kernel, log_scale = block.parametrizations.weight.original0, block.parametrizations.weight.original1
            kernel.copy_(torch.randn_like(kernel) * 10 ** torch.empty(1).uniform_(-3, 3))
            log_scale.normal_(std=2)
            block.bias.normal_()
        z, u = torch.randn(1, 2, 4, 5), torch.randn(1, 4, 4, 5)
        largest = max(largest, norm(jacobian(lambda z, u=u: block(z, u), z)))
        weight = conv_matrix(block.weight.detach(), (4, 5), 1, k // 2)
        assert norm(weight) <= 1 + 1e-12
        h = (weight @ z.flatten() + (u + block.bias[:, None, None]).flatten()).clamp_min(0)
        torch.testing.assert_close(block(z, u).flatten(), z.flatten() - 2 * weight.T @ h)
    assert 0.9 < largest <= 1 + 1e-12
    assert lipschitz_bound(block) == 1.0


@torch.no_grad()
def test_sll_scales() -> None:
    """Rows are divided by the roots of the weighted row sums of the Gram matrix."""
    block = SLLBlock(2, 3, 3)
    kernel, log_scale = block.parametrizations.weight.original0, block.parametrizations.weight.original1.normal_()
    matrix, q = conv_matrix(kernel, (9, 9), 1, 1), log_scale.exp()
    gram = (matrix @ matrix.T).view(3, 81, 3, 81)[:, 40].abs().sum(2)  # of the middle pixel, far from the border
    torch.testing.assert_close(block.weight, kernel / (gram @ q / q).sqrt()[:, None, None, None])


def test_sll_gradients() -> None:
    block, z = SLLBlock(2, 3), torch.randn(2, 2, 3, 3, requires_grad=True)
    weights = {name: p.detach().requires_grad_() for name, p in block.named_parameters()}

    def f(z: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(weights, values, strict=True)), (z,))

    assert torch.autograd.gradcheck(f, (z, *weights.values()))


def test_fixed_level_weights() -> None:
    table = torch.tensor(  # printed by the released code
        [
            [0.0, 0.665, 0.245, 0.090],
            [0.665, 0.0, 0.245, 0.090],
            [0.422, 0.422, 0.0, 0.155],
            [1 / 3, 1 / 3, 1 / 3, 0.0],
        ]
    )
    layer = LevelWeights(4, "softmax", exchange=0.3)
    assert not list(layer.parameters())
    assert not layer.state_dict()
    torch.testing.assert_close(layer(), 0.7 * torch.eye(4) + 0.3 * table, rtol=0, atol=0.3 * 6e-4)
    torch.testing.assert_close(layer().sum(1), torch.ones(4))
    torch.testing.assert_close(LevelWeights(4, "uniform", exchange=0.3)(), 0.6 * torch.eye(4) + 0.1)
    torch.testing.assert_close(LevelWeights(2, "softmax", exchange=0.0)(), torch.eye(2))
    assert all(LevelWeights(1, mode)().tolist() == [[1.0]] for mode in ("softmax", "uniform", "learned"))


def test_learned_level_weights() -> None:
    layer, softmax = LevelWeights(3, "learned", exchange=0.4), LevelWeights(3, "softmax", exchange=0.4)()
    torch.testing.assert_close(layer().detach(), softmax / norm(softmax))
    adam = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(20):
        adam.zero_grad()
        (layer() * torch.randn(3, 3)).sum().backward()
        adam.step()
        assert bool((layer() >= 0).all())
        assert norm(layer().detach()) == pytest.approx(1.0)
    assert float((layer().detach() - softmax / norm(softmax)).abs().max()) > 0.05
