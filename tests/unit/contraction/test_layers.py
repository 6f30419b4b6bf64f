"""Layers with known constants: Jacobians against the constants, caps against dense matrices, caches against changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from problems import conv_matrix
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

import equipoise as eq
from equipoise.contraction import (
    CappedConv2d,
    IsometricUpsample,
    LevelWeights,
    MaxMin,
    MeanOnlyGroupNorm,
    NearestUpsample,
    ScaledReLU,
    SLLBlock,
    UnknownConstant,
    conv_norm_bound,
    lipschitz_bound,
)
from equipoise.nn import VariationalDropout


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Dense `(outputs, inputs)`."""
    return torch.autograd.functional.jacobian(lambda v: f(v.view_as(x)).flatten(), x.flatten())


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


# --- norms and activations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
def test_mean_only_group_norm_is_its_formula(groups: int, affine: bool) -> None:
    layer, x = MeanOnlyGroupNorm(groups, 4, affine=affine), torch.randn(3, 4, 2, 5)
    expected = (x.reshape(3, groups, -1) - x.reshape(3, groups, -1).mean(2, keepdim=True)).view_as(x)
    if affine:
        gamma, delta = torch.tensor([0.9, -0.5, 0.0, 0.3]), torch.randn(4)
        layer.weight = gamma
        with torch.no_grad():
            layer.bias.copy_(delta)
        expected = expected * gamma[:, None, None] + delta[:, None, None]
    torch.testing.assert_close(layer(x), expected)


def test_the_jacobian_of_mean_only_group_norm_has_the_norm_of_the_largest_scale() -> None:
    layer, x = MeanOnlyGroupNorm(2, 4, max_gamma=2.0), torch.randn(1, 4, 3, 2)
    layer.weight = torch.tensor([0.3, -1.7, 0.2, 1.1])
    assert norm(jacobian(layer, x)) == pytest.approx(1.7)
    assert lipschitz_bound(layer) == pytest.approx(1.7)
    assert norm(jacobian(MeanOnlyGroupNorm(2, 4, affine=False), x)) == pytest.approx(1.0)
    assert lipschitz_bound(MeanOnlyGroupNorm(2, 4, affine=False)) == 1.0


def test_mean_only_group_norm_does_not_see_a_constant_in_a_group() -> None:
    layer, x = MeanOnlyGroupNorm(2, 4), torch.randn(2, 4, 3, 3)
    shift = torch.tensor([5.0, 5.0, -3.0, -3.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(layer(x + shift), layer(x))
    assert not torch.allclose(layer(x + torch.tensor([5.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1)), layer(x))


@pytest.mark.parametrize("max_gamma", [0.5, 1.0, 3.0])
def test_scales_start_within_their_bound_and_are_clipped(max_gamma: float) -> None:
    layer = MeanOnlyGroupNorm(1, 3, max_gamma=max_gamma)
    assert layer.weight.tolist() == [min(1.0, max_gamma)] * 3
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.tensor([7.0, -7.0, 0.1]))
    assert layer.weight.tolist() == [max_gamma, -max_gamma, 0.1]
    assert lipschitz_bound(layer) == max_gamma


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_of_scales_outside_may_only_lead_back(sign: float) -> None:
    layer = MeanOnlyGroupNorm(1, 3)
    raw = layer.parametrizations.weight.original
    with torch.no_grad():
        raw.copy_(sign * torch.tensor([2.0, 1.0, 0.5]))
    for slope, passed in ((1.0, sign > 0), (-1.0, sign < 0)):  # a descent step goes against the slope
        (gradient,) = torch.autograd.grad(layer.weight.sum() * slope, raw)
        assert gradient.tolist() == [slope * passed, slope * passed, slope]


def test_adam_may_leave_the_bound_and_comes_back() -> None:
    layer = MeanOnlyGroupNorm(1, 2)
    layer.weight = torch.tensor([0.6, -0.6])
    raw = layer.parametrizations.weight.original
    adam = torch.optim.Adam([raw], lr=0.1)
    farthest = []
    for step in range(150):
        target = 5.0 if step < 20 else 0.2
        loss = (layer.weight - target * torch.tensor([1.0, -1.0])).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        farthest.append(float(raw.detach().abs().max()))
        assert float(layer.weight.detach().abs().max()) <= 1.0
    assert max(farthest) > 1.05, "momentum must carry the weight beyond its bound for this test to say something"
    assert float((layer.weight.detach() - torch.tensor([0.2, -0.2])).abs().max()) < 0.1


@pytest.mark.parametrize("slope", [0.1, 0.4, 1.0])
def test_scaled_relu(slope: float) -> None:
    x = torch.tensor([[-2.0, 0.5, 3.0]])
    before, layer = x.clone(), ScaledReLU(slope)
    torch.testing.assert_close(layer(x), slope * torch.tensor([[0.0, 0.5, 3.0]]))
    assert torch.equal(x, before)
    assert norm(jacobian(layer, x)) == pytest.approx(slope)
    assert lipschitz_bound(layer) == slope


def test_maxmin_sorts_pairs_and_keeps_norms_and_gradient_norms() -> None:
    layer, x = MaxMin(), torch.randn(2, 6, 3, 2)
    y, pairs = layer(x), x.unflatten(1, (3, 2))
    torch.testing.assert_close(y, torch.sort(pairs, dim=2, descending=True).values.flatten(1, 2))
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    matrix = jacobian(layer, x[:1])
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(36))
    with pytest.raises(ValueError, match="even number of channels, got 3"):
        layer(torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_resampling_has_exactly_the_constants_it_says(factor: int) -> None:
    x = torch.randn(2, 3, 4, 4)
    expected = x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    torch.testing.assert_close(NearestUpsample(factor)(x), expected)
    torch.testing.assert_close(IsometricUpsample(factor)(x), expected / factor)
    sizes = x.flatten(1).norm(dim=1)
    for layer, constant in (
        (NearestUpsample(factor), factor),
        (IsometricUpsample(factor), 1),
        (nn.PixelUnshuffle(factor), 1),
    ):
        torch.testing.assert_close(layer(x).flatten(1).norm(dim=1), constant * sizes)
        assert lipschitz_bound(layer) == constant


# --- constants of other layers and chains ----------------------------------------------------------------------------


def test_a_chain_multiplies_its_constants_and_dropout_counts_in_training() -> None:
    linear = nn.Linear(4, 3)
    chain = nn.Sequential(linear, ScaledReLU(0.5), VariationalDropout(0.2), nn.Tanh(), nn.LeakyReLU(3.0))
    expected = norm(linear.weight.detach()) * 0.5 * 3
    assert lipschitz_bound(chain) == pytest.approx(expected)
    assert lipschitz_bound(chain, training=True) == pytest.approx(expected / 0.8)


class Residual(nn.Sequential):
    """Adds its input, of which the base class knows nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ResidualReLU(ScaledReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class KnownReLU(ResidualReLU):
    def lipschitz_bound(self, training: bool) -> float:
        return 1 + super().lipschitz_bound(training)


class Undropped(VariationalDropout):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_a_subclass_with_a_bound_of_its_own_is_believed() -> None:
    assert lipschitz_bound(KnownReLU(0.5)) == 1.5


class Doubled(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(4), "BatchNorm2d: batch statistics make a sample depend on its batch; use MeanOnlyGroupNorm"),
        (nn.GroupNorm(2, 4), "GroupNorm: a division by the standard deviation .* use MeanOnlyGroupNorm"),
        (nn.LayerNorm(4), "LayerNorm: a division by the standard deviation"),
        (nn.Conv2d(2, 2, 3), "Conv2d: its norm is not bounded, and depends on the size of the image; use CappedConv2d"),
        (nn.Sequential(nn.ReLU(), nn.SiLU()), "SiLU: no Lipschitz constant is known"),
        (Residual(ScaledReLU(0.5)), "Residual: no Lipschitz constant is known"),
        (Doubled(), "Doubled: no Lipschitz constant is known"),
        (ResidualReLU(0.5), "ResidualReLU: it overrides forward and inherits lipschitz_bound; define lipschitz_bound"),
        (Undropped(0.5), "Undropped: no Lipschitz constant is known"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_without_a_known_constant_are_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(UnknownConstant, match=message) as caught:
        lipschitz_bound(layer)
    assert caught.value.module is (layer[1] if type(layer) is nn.Sequential else layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanOnlyGroupNorm(3, 4), "num_channels=4 must be a multiple of num_groups=3"),
        (lambda: MeanOnlyGroupNorm(2, 4, max_gamma=0.0), "max_gamma=0.0: must be > 0"),
        (lambda: MeanOnlyGroupNorm(2, 4, max_gamma=math.nan), "max_gamma=nan: must be > 0"),
        (lambda: ScaledReLU(0.0), r"ScaledReLU\(slope=0.0\): must lie in \(0, 1\]"),
        (lambda: ScaledReLU(1.5), r"ScaledReLU\(slope=1.5\)"),
        (lambda: IsometricUpsample(0), r"IsometricUpsample\(factor=0\): must be >= 1"),
        (lambda: CappedConv2d(2, 2, 2, cap=1.0, size=4), "kernel_size=2: must be odd"),
        (lambda: CappedConv2d(2, 2, 3, cap=0.0, size=4), "cap=0.0 and size=4 must be > 0"),
        (lambda: CappedConv2d(2, 2, 3, cap=1.0, size=(4, 0)), r"cap=1.0 and size=\(4, 0\) must be > 0"),
        (lambda: SLLBlock(2, 4, 2), "kernel_size=2: must be odd"),
        (lambda: LevelWeights(2, "mean"), "mode='mean': must be softmax, uniform or learned"),
        (lambda: LevelWeights(2, "softmax", exchange=1.5), r"exchange=1.5: must lie in \[0, 1\]"),
    ],
)
def test_arguments_out_of_range(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- capped convolutions ---------------------------------------------------------------------------------------------

SHAPES = [(3, 4, 3, 1), (4, 3, 3, 2), (4, 4, 1, 1), (3, 5, 1, 2), (2, 3, 5, 1)]
shapes = pytest.mark.parametrize(("ins", "outs", "k", "stride"), SHAPES)
SIZE = (6, 5)


def raw(conv: CappedConv2d) -> nn.Parameter:
    """The kernel before the cap."""
    return conv.parametrizations.weight.original


def follow(conv: CappedConv2d, times: int) -> None:
    """As many solves in training, between which the kernel is doubled or halved."""
    with torch.no_grad():
        for step in range(times):
            raw(conv).mul_(0.5 if step % 2 else 2.0)
            assert conv.weight.isfinite().all()


def operator_norm(conv: CappedConv2d) -> float:
    """Of the layer as it is, from its dense matrix."""
    return norm(conv_matrix(conv.weight.detach(), conv.size, conv.stride[0], conv.padding[0]))


def capped_by_hand(conv: CappedConv2d) -> Tensor:
    """What the effective weight is in evaluation mode."""
    kernel = raw(conv).detach()
    bound = conv_norm_bound(kernel, conv.size, stride=conv.stride[0], padding=conv.padding[0])
    return kernel * min(1.0, conv.cap / float(bound))


@shapes
def test_the_cap_holds_for_the_dense_operator_and_small_kernels_are_left_alone(
    ins: int, outs: int, k: int, stride: int
) -> None:
    conv = CappedConv2d(ins, outs, k, stride=stride, cap=0.7, size=SIZE).eval()
    for scale in (0.01, 1.0, 100.0):
        with torch.no_grad():
            raw(conv).copy_(scale * torch.randn(outs, ins, k, k))
        assert operator_norm(conv) <= 0.7 * (1 + 1e-12)
        assert operator_norm(conv) <= conv.lipschitz_bound(False) * (1 + 1e-12)
        torch.testing.assert_close(conv.weight.detach(), capped_by_hand(conv))
        if scale == 0.01:
            assert torch.equal(conv.weight, raw(conv))
        if scale == 100.0:
            assert operator_norm(conv) > 0.55, "the cap is not wasted"
    x = torch.randn(2, ins, *SIZE)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, stride=stride, padding=k // 2))


def test_an_image_larger_than_the_proof_is_refused() -> None:
    conv = CappedConv2d(2, 2, 3, cap=1.0, size=(4, 6))
    assert conv(torch.ones(1, 2, 4, 6)).shape == (1, 2, 4, 6)
    for shape in ((5, 6), (4, 7)):
        with pytest.raises(ValueError, match=r"an image of \(\d, \d\) pixels is larger than size=\(4, 6\)"):
            conv(torch.ones(1, 2, *shape))


@shapes
def test_in_training_the_weight_follows_the_kernel(ins: int, outs: int, k: int, stride: int) -> None:
    """The power iteration converges on a kernel that stays, and the slack makes its estimate the bound."""
    conv = CappedConv2d(ins, outs, k, stride=stride, cap=0.5, size=SIZE)
    with torch.no_grad():
        raw(conv).mul_(10)
    follow(conv, 100)
    assert conv.lipschitz_bound(True) == pytest.approx(0.5, rel=1e-3)
    assert 0.4 < operator_norm(conv) <= 0.5 * (1 + 1e-3)


def test_the_bound_is_renewed_when_the_kernel_has_moved_by_a_twentieth() -> None:
    conv = CappedConv2d(3, 4, 3, cap=0.5, size=SIZE)
    part, kernel = conv.parametrizations.weight[0], raw(conv)
    start = kernel.detach().clone()

    def renewed() -> bool:
        with torch.no_grad():
            part.slack.fill_(0.0)
            part.bound.fill_(conv.cap)
            assert conv.weight.isfinite().all()
        return float(part.slack) >= 1

    for share in (0.02, 0.04, 0.03, 0.0):  # there and back again
        with torch.no_grad():
            kernel.copy_(start * (1 + share))
        assert not renewed()
    with torch.no_grad():
        kernel.add_(torch.randn_like(kernel), alpha=0.1 * float(start.norm() / start.numel() ** 0.5))
    assert renewed()
    assert operator_norm(conv) <= 0.5 * (1 + 1e-12)
    with torch.no_grad():
        kernel.zero_()
    assert renewed()
    assert not renewed()


def test_a_kernel_far_below_its_cap_may_move_until_it_could_reach_it() -> None:
    conv = CappedConv2d(3, 4, 3, cap=4.0, size=SIZE)
    part, kernel = conv.parametrizations.weight[0], raw(conv)
    with torch.no_grad():
        kernel.mul_(2 / float(part.bound))  # half of the cap: a quarter of what is missing is a quarter of the kernel
        part.renew(kernel)
        for share, bound in ((1.24, 2.0), (1.26, 2.52), (1.38, 2.52), (1.46, 2.92)):
            kernel.mul_(share * 2 / float(part._compute(kernel)))
            assert conv.weight.isfinite().all()
            assert float(part.bound) == pytest.approx(bound)


def test_a_norm_that_falls_while_another_rises_is_not_believed() -> None:
    """One singular vector is followed, and shrinks; the other one has overtaken it unseen."""
    conv = CappedConv2d(2, 2, 1, cap=1.0, size=1)
    part, kernel = conv.parametrizations.weight[0], raw(conv)
    with torch.no_grad():
        kernel.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.98]]).view(2, 2, 1, 1))
        follow(conv, 2)
        part.vector.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
        part.renew(kernel)
        kernel.copy_(torch.tensor([[1.96, 0.0], [0.0, 2.02]]).view(2, 2, 1, 1))
        assert float(part.bound) == pytest.approx(2.0, rel=0.02)
        assert operator_norm(conv) <= 2.02 / 2.0


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_that_of_the_leading_singular_value(training: bool) -> None:
    conv = CappedConv2d(3, 4, 3, cap=0.5, size=SIZE)
    with torch.no_grad():
        raw(conv).copy_(1 + 0.3 * torch.randn(4, 3, 3, 3))  # one singular value stands out
    follow(conv, 100)
    conv.train(training)
    direction = torch.randn(4, 3, 3, 3)
    (ours,) = torch.autograd.grad((conv.weight * direction).sum(), raw(conv))
    kernel = raw(conv).detach().requires_grad_()
    sigma = torch.linalg.matrix_norm(conv_matrix(kernel, SIZE, 1, 1), ord=2)
    in_use = 0.5 * float(kernel.detach().norm() / conv.weight.detach().norm())
    factor = in_use / float(sigma.detach())  # how far the bound that is in use lies above the norm
    assert 1 <= factor < 1.3
    (expected,) = torch.autograd.grad((kernel * (0.5 / (factor * sigma)) * direction).sum(), kernel)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    # Above the cap only the direction of a kernel matters, so the gradient is orthogonal to it.
    assert abs(float((ours * raw(conv).detach()).sum())) < 1e-10


Change = Callable[[CappedConv2d], CappedConv2d]


def _loaded(conv: CappedConv2d) -> CappedConv2d:
    conv.load_state_dict({name: value * 3 for name, value in conv.state_dict().items()})
    return conv


def _assigned(conv: CappedConv2d) -> CappedConv2d:
    conv.load_state_dict({name: value * 3 for name, value in conv.state_dict().items()}, assign=True)
    return conv


def _stepped(optimizer: type[torch.optim.Optimizer], **options: bool) -> Change:
    def change(conv: CappedConv2d) -> CappedConv2d:
        conv(torch.randn(2, 3, *SIZE)).square().sum().backward()
        optimizer(conv.parameters(), lr=0.5, **options).step()
        return conv

    return change


def _copied(conv: CappedConv2d) -> CappedConv2d:
    other = copy.deepcopy(conv)
    with torch.no_grad():
        raw(conv).mul_(7)
        follow(conv, 1)
        raw(other).mul_(5)
    return other


def _flattened(conv: CappedConv2d) -> CappedConv2d:
    vector_to_parameters(3 * parameters_to_vector(conv.parameters()).detach(), conv.parameters())
    return conv


def _trained(conv: CappedConv2d) -> CappedConv2d:
    conv.train()
    for _ in range(3):
        conv = _stepped(torch.optim.Adam)(conv)
    return conv.eval()


CHANGES: dict[str, Change] = {
    "load_state_dict": _loaded,
    "load_state_dict(assign)": _assigned,
    "SGD": _stepped(torch.optim.SGD),
    "Adam": _stepped(torch.optim.Adam),
    "Adam(foreach)": _stepped(torch.optim.Adam, foreach=True),
    "AdamW(fused)": _stepped(torch.optim.AdamW, fused=True),
    "float": lambda conv: conv.float(),
    "float, double": lambda conv: conv.float().double(),
    "deepcopy": _copied,
    "vector_to_parameters": _flattened,
    "training": _trained,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_bound_outlives_its_kernel(change: Change) -> None:
    conv = CappedConv2d(3, 4, 3, cap=0.5, size=SIZE).eval()
    with torch.no_grad():
        raw(conv).mul_(4)
        assert conv.weight.isfinite().all()  # its bound is kept from here on
    conv = change(conv)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(conv.weight.detach(), capped_by_hand(conv))
    assert conv.lipschitz_bound(False) <= 0.5 * (1 + 1e-6)


def test_no_bound_outlives_a_kernel_that_is_lent_for_a_call() -> None:
    """One temporary kernel after the other may come to lie at the same place."""
    conv, x = CappedConv2d(2, 2, 3, cap=0.1, size=4).eval(), torch.randn(1, 2, 4, 4)
    kernel, outs = torch.randn(2, 2, 3, 3), []
    with torch.no_grad():
        for scale in range(1, 8):
            lent = {"parametrizations.weight.original": kernel * scale}
            outs.append(torch.func.functional_call(conv, lent, (x,)))
            del lent
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_inference_mode_leaves_nothing_behind_that_training_trips_over() -> None:
    conv, x = CappedConv2d(2, 2, 3, cap=0.1, size=4).eval(), torch.randn(1, 2, 4, 4)
    with torch.inference_mode():
        expected = conv(x)
        made = CappedConv2d(2, 2, 3, cap=0.1, size=4).eval()
        raw(made).copy_(raw(conv))
        torch.testing.assert_close(made(x), expected)
        raw(made).mul_(2)
        torch.testing.assert_close(made(x), expected)
    out = conv(x)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected.clone())


def test_a_kernel_of_zeros_stays_finite_and_is_followed_when_it_grows() -> None:
    conv = CappedConv2d(2, 3, 3, cap=0.1, size=4)
    with torch.no_grad():
        raw(conv).zero_()
    for mode in (True, False):
        conv.train(mode)
        (gradient,) = torch.autograd.grad(conv.weight.sum(), raw(conv))
        torch.testing.assert_close(gradient, torch.ones_like(gradient))
        assert not bool(conv.weight.any())
    conv.train()
    with torch.no_grad():
        raw(conv).normal_()
    follow(conv, 20)
    assert conv.lipschitz_bound(True) < 0.12
    assert conv.eval().lipschitz_bound(False) <= 0.1 * (1 + 1e-12)


def test_weights_in_training_depend_on_the_kernel_and_not_on_how_often_they_are_read() -> None:
    conv = CappedConv2d(2, 3, 3, cap=0.1, size=4)
    first = conv.weight.detach()
    conv.lipschitz_bound(True)
    assert torch.equal(conv.weight, first)
    part = conv.parametrizations.weight[0]
    before = part.vector.clone()
    part.training = False  # as in a backward pass
    with torch.no_grad():
        raw(conv).add_(torch.randn(3, 2, 3, 3))
    assert not torch.equal(conv.weight, first)
    assert torch.equal(part.vector, before)


def test_the_state_dict_carries_the_power_iteration() -> None:
    conv = CappedConv2d(2, 3, 3, cap=0.1, size=4)
    with torch.no_grad():
        raw(conv).normal_()
    follow(conv, 1)
    other = CappedConv2d(2, 3, 3, cap=0.1, size=4)
    other.load_state_dict(conv.state_dict())
    for a, b in ((conv.eval(), other.eval()), (conv.train(), other.train())):
        with torch.no_grad():
            raw(a).add_(1.0)
            raw(b).add_(1.0)
        assert torch.equal(a.weight, b.weight)


def test_a_cap_can_be_removed() -> None:
    conv = CappedConv2d(2, 3, 3, cap=0.1, size=4).eval()
    weight = conv.weight.detach().clone()
    free = nn.utils.parametrize.remove_parametrizations(conv, "weight").train().eval()
    assert torch.equal(free.weight, weight)
    with torch.no_grad():
        free.weight.mul_(3)
    assert lipschitz_bound(free) == pytest.approx(0.3, rel=0.05)


def test_weight_norm_together_with_a_cap_is_refused() -> None:
    conv = CappedConv2d(2, 3, 3, cap=0.1, size=4)
    with pytest.raises(ValueError, match=r"weight_norm\(CappedConv2d\): its weight is parametrized already"):
        eq.nn.weight_norm(conv)
    for norm_of in (parametrizations.weight_norm, eq.nn.spectral_norm):
        for layer in (CappedConv2d(2, 3, 3, cap=0.1, size=4), SLLBlock(3, 4)):
            norm_of(layer)
            with pytest.raises(UnknownConstant, match=f"{type(layer).__name__[12:]}: another parametrization, such as"):
                lipschitz_bound(layer)


# --- residual blocks and level weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_residual_block_has_no_jacobian_above_one(k: int) -> None:
    block = SLLBlock(2, 4, k)
    largest = 0.0
    for _ in range(100 if k == 3 else 20):
        with torch.no_grad():
            kernel, log_scale = block.parametrizations.weight.original0, block.parametrizations.weight.original1
            kernel.copy_(torch.randn_like(kernel) * 10 ** torch.empty(1).uniform_(-3, 3))
            log_scale.normal_(std=2)
            block.bias.normal_()
        z = torch.randn(1, 2, 4, 5)
        u = torch.randn(1, 4, 4, 5)
        matrix = jacobian(lambda z, u=u: block(z, u), z)
        largest = max(largest, norm(matrix))
        weight = conv_matrix(block.weight.detach(), (4, 5), 1, k // 2)
        assert norm(weight) <= 1 + 1e-12
        h = (weight @ z.flatten() + (u + block.bias[:, None, None]).flatten()).clamp_min(0)
        torch.testing.assert_close(block(z, u).flatten(), z.flatten() - 2 * weight.T @ h)
    assert 0.9 < largest <= 1 + 1e-12
    assert lipschitz_bound(block) == 1.0


def test_the_rows_of_the_residual_block_are_scaled_by_the_weighted_sums_of_the_gram_matrix() -> None:
    block = SLLBlock(2, 3, 3)
    with torch.no_grad():
        block.parametrizations.weight.original1.normal_()
    kernel, log_scale = block.parametrizations.weight.original0.detach(), block.parametrizations.weight.original1
    matrix = conv_matrix(kernel, (9, 9), 1, 1)
    gram = (matrix @ matrix.T).view(3, 81, 3, 81)[:, 40].abs().sum(2)  # of the middle pixel, which sees no border
    q = log_scale.detach().exp()
    t = torch.stack([sum(gram[c, d] * q[d] / q[c] for d in range(3)) for c in range(3)])
    torch.testing.assert_close(block.weight.detach(), kernel / t.sqrt()[:, None, None, None])


def test_the_residual_block_is_differentiable_in_all_its_weights() -> None:
    block, z = SLLBlock(2, 3), torch.randn(2, 2, 3, 3)
    names = [name for name, _ in block.named_parameters()]

    def f(z: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (z,))

    assert torch.autograd.gradcheck(f, (z.requires_grad_(), *(p.detach().requires_grad_() for p in block.parameters())))


def test_shares_of_the_softmax_are_those_of_the_released_code() -> None:
    table = torch.tensor(
        [
            [0.0, 0.665, 0.245, 0.090],
            [0.665, 0.0, 0.245, 0.090],
            [0.422, 0.422, 0.0, 0.155],
            [1 / 3, 1 / 3, 1 / 3, 0.0],
        ]
    )
    layer = LevelWeights(4, "softmax", exchange=0.3)
    assert not list(layer.parameters())
    torch.testing.assert_close(layer(), 0.7 * torch.eye(4) + 0.3 * table, rtol=0, atol=0.3 * 6e-4)
    torch.testing.assert_close(layer().sum(1), torch.ones(4))
    uniform = LevelWeights(4, "uniform", exchange=0.3)()
    torch.testing.assert_close(uniform, 0.6 * torch.eye(4) + 0.1)
    torch.testing.assert_close(LevelWeights(2, "softmax", exchange=0.0)(), torch.eye(2))
    for mode in ("softmax", "uniform", "learned"):
        assert LevelWeights(1, mode)().tolist() == [[1.0]]


def test_learned_weights_are_nonnegative_of_unit_norm_and_start_as_the_softmax() -> None:
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
