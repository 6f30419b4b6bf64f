"""Capped convolutions: caps against dense matrices, cached bounds against changes of the kernel."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from problems import conv_matrix
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

import equipoise as eq
from equipoise.contraction import CappedConv2d, SLLBlock, UnknownConstant, conv_norm_bound, lipschitz_bound

SIZE = (6, 5)
SHAPES = [(3, 4, 3, 1), (4, 3, 3, 2), (4, 4, 1, 1), (3, 5, 1, 2), (2, 3, 5, 1)]
shapes = pytest.mark.parametrize(("ins", "outs", "k", "stride"), SHAPES)


def make(cap: float, *, ins: int = 3, outs: int = 4, k: int = 3, stride: int = 1, factor: float = 1.0) -> CappedConv2d:
    """A layer in training mode whose kernel was multiplied by a factor."""
    conv = CappedConv2d(ins, outs, k, stride=stride, cap=cap, size=SIZE)
    raw(conv).data.mul_(factor)
    return conv


def raw(conv: CappedConv2d) -> nn.Parameter:
    """The kernel before the cap."""
    return conv.parametrizations.weight.original


@torch.no_grad()
def follow(conv: CappedConv2d, times: int) -> None:
    """As many solves in training, between which the kernel is doubled or halved."""
    for step in range(times):
        raw(conv).mul_(0.5 if step % 2 else 2.0)
        assert conv.weight.isfinite().all()


def operator_norm(conv: CappedConv2d) -> float:
    """The norm of the dense matrix of the layer."""
    matrix = conv_matrix(conv.weight.detach(), conv.size, conv.stride[0], conv.padding[0])
    return float(torch.linalg.matrix_norm(matrix, ord=2))


def capped_by_hand(conv: CappedConv2d) -> Tensor:
    """The weight in evaluation mode, by its formula."""
    kernel = raw(conv).detach()
    bound = conv_norm_bound(kernel, conv.size, stride=conv.stride[0], padding=conv.padding[0])
    return kernel * min(1.0, conv.cap / float(bound))


@torch.no_grad()
@shapes
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_cap_in_evaluation(ins: int, outs: int, k: int, stride: int, scale: float) -> None:
    conv = make(0.7, ins=ins, outs=outs, k=k, stride=stride).eval()
    raw(conv).normal_(std=scale)
    found = operator_norm(conv)
    assert found <= min(0.7, conv.lipschitz_bound(False)) * (1 + 1e-12)
    torch.testing.assert_close(conv.weight, capped_by_hand(conv))
    assert torch.equal(conv.weight, raw(conv)) or scale > 0.01
    assert found > 0.5 or scale < 100, "the cap is not wasted"
    x = torch.randn(2, ins, *SIZE)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, stride=stride, padding=k // 2))


@shapes
def test_cap_in_training(ins: int, outs: int, k: int, stride: int) -> None:
    """The power iteration converges on a kernel that stays, and the slack makes its estimate the bound."""
    conv = make(0.5, ins=ins, outs=outs, k=k, stride=stride, factor=10)
    follow(conv, 60)
    assert conv.lipschitz_bound(True) == pytest.approx(0.5, rel=1e-3)
    assert 0.4 < operator_norm(conv) <= 0.5 * (1 + 1e-3)


@torch.no_grad()
def test_renewal() -> None:
    """The bound is renewed when the kernel has moved by a twentieth."""
    conv = make(0.5)
    part, kernel, start = conv.parametrizations.weight[0], raw(conv), raw(conv).clone()

    def renewed(changed: Tensor) -> bool:
        kernel.copy_(changed)
        part.slack.fill_(0.0)
        part.bound.fill_(conv.cap)
        assert conv.weight.isfinite().all()
        return float(part.slack) >= 1

    for share in (0.02, 0.04, 0.03, 0.0):  # there and back again
        assert not renewed(start * (1 + share))
    assert renewed(start + 0.1 * start.square().mean().sqrt() * torch.randn_like(start))
    assert operator_norm(conv) <= 0.5 * (1 + 1e-12)
    assert renewed(torch.zeros_like(start))
    assert not renewed(torch.zeros_like(start))


@torch.no_grad()
def test_renewal_far_below_the_cap() -> None:
    """Half of the cap: a quarter of the distance to the cap is a quarter of the kernel."""
    conv = make(4.0)
    part, kernel = conv.parametrizations.weight[0], raw(conv)
    kernel.mul_(2 / float(part.bound))
    part.renew(kernel)
    for share, bound in ((1.24, 2.0), (1.26, 2.52), (1.38, 2.52), (1.46, 2.92)):
        kernel.mul_(share * 2 / float(part._compute(kernel)))
        assert conv.weight.isfinite().all()
        assert float(part.bound) == pytest.approx(bound)


@torch.no_grad()
def test_falling_estimate() -> None:
    """The power iteration follows a singular value that shrinks; another one has overtaken it unseen."""
    conv = CappedConv2d(2, 2, 1, cap=1.0, size=1)
    part, kernel = conv.parametrizations.weight[0], raw(conv)
    kernel.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.98]]).view(2, 2, 1, 1))
    follow(conv, 2)
    part.vector.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    part.renew(kernel)
    kernel.copy_(torch.tensor([[1.96, 0.0], [0.0, 2.02]]).view(2, 2, 1, 1))
    assert float(part.bound) == pytest.approx(2.0, rel=0.02)
    assert operator_norm(conv) <= 2.02 / 2.0


@pytest.mark.parametrize("training", [True, False])
def test_gradient(training: bool) -> None:
    conv, direction = make(0.5), torch.randn(4, 3, 3, 3)
    raw(conv).data.copy_(1 + 0.3 * torch.randn(4, 3, 3, 3))  # one singular value stands out
    follow(conv, 100)
    conv.train(training)
    (ours,) = torch.autograd.grad((conv.weight * direction).sum(), raw(conv))
    kernel = raw(conv).detach().requires_grad_()
    sigma = torch.linalg.matrix_norm(conv_matrix(kernel, SIZE, 1, 1), ord=2)
    factor = 0.5 * float(kernel.detach().norm() / conv.weight.detach().norm() / sigma.detach())
    assert 1 <= factor < 1.3, "the bound in use lies above the norm"
    (expected,) = torch.autograd.grad((kernel * (0.5 / (factor * sigma)) * direction).sum(), kernel)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    # Above the cap only the direction of a kernel matters, so the gradient is orthogonal to it.
    assert abs(float((ours * raw(conv).detach()).sum())) < 1e-10


# --- cached bounds ---------------------------------------------------------------------------------------------------


def _step(conv: CappedConv2d, optimizer: type[torch.optim.Optimizer], **options: bool) -> None:
    conv(torch.randn(2, 3, *SIZE)).square().sum().backward()
    optimizer(conv.parameters(), lr=0.5, **options).step()


def _load(conv: CappedConv2d, *, assign: bool) -> None:
    conv.load_state_dict({name: value * 3 for name, value in conv.state_dict().items()}, assign=assign)


def _copy(conv: CappedConv2d) -> CappedConv2d:
    other = copy.deepcopy(conv)
    raw(conv).data.mul_(7)
    follow(conv, 1)
    raw(other).data.mul_(5)
    return other


def _train(conv: CappedConv2d) -> CappedConv2d:
    conv.train()
    for _ in range(3):
        _step(conv, torch.optim.Adam)
    return conv.eval()


CHANGES: dict[str, Callable[[CappedConv2d], CappedConv2d | None]] = {
    "load_state_dict": lambda conv: _load(conv, assign=False),
    "load_state_dict(assign)": lambda conv: _load(conv, assign=True),
    "SGD": lambda conv: _step(conv, torch.optim.SGD),
    "Adam": lambda conv: _step(conv, torch.optim.Adam),
    "Adam(foreach)": lambda conv: _step(conv, torch.optim.Adam, foreach=True),
    "AdamW(fused)": lambda conv: _step(conv, torch.optim.AdamW, fused=True),
    "float": lambda conv: conv.float(),
    "float, double": lambda conv: conv.float().double(),
    "deepcopy": _copy,
    "vector_to_parameters": lambda conv: vector_to_parameters(
        3 * parameters_to_vector(conv.parameters()).detach(), conv.parameters()
    ),
    "training": _train,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_kernel(change: Callable[[CappedConv2d], CappedConv2d | None]) -> None:
    conv = make(0.5, factor=4).eval()
    with torch.no_grad():
        assert conv.weight.isfinite().all()  # caches its bound
    conv = change(conv) or conv
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(conv.weight.detach(), capped_by_hand(conv))
    assert conv.lipschitz_bound(False) <= 0.5 * (1 + 1e-6)


@torch.no_grad()
def test_temporary_kernels() -> None:
    """Temporary kernels, one after the other, may lie at the same address."""
    conv, x, kernel, outs = make(0.1).eval(), torch.randn(1, 3, 4, 4), torch.randn(4, 3, 3, 3), []
    for scale in range(1, 8):
        lent = {"parametrizations.weight.original": kernel * scale}
        outs.append(torch.func.functional_call(conv, lent, (x,)))
        del lent
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_inference_mode() -> None:
    conv, x = make(0.1).eval(), torch.randn(1, 3, 4, 4)
    with torch.inference_mode():
        expected, made = conv(x), make(0.1).eval()
        for factor in (1, 2):
            raw(made).copy_(factor * raw(conv))
            torch.testing.assert_close(made(x), expected)
    out = conv(x)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected.clone())


def test_kernel_of_zeros() -> None:
    conv = make(0.1, factor=0.0)
    for mode in (True, False):
        conv.train(mode)
        (gradient,) = torch.autograd.grad(conv.weight.sum(), raw(conv))
        torch.testing.assert_close(gradient, torch.ones_like(gradient))
        assert not bool(conv.weight.any())
    raw(conv.train()).data.normal_()
    follow(conv, 20)
    assert conv.lipschitz_bound(True) < 0.12
    assert conv.eval().lipschitz_bound(False) <= 0.1 * (1 + 1e-12)


def test_reading_changes_nothing() -> None:
    conv = make(0.1)
    first, part = conv.weight.detach(), conv.parametrizations.weight[0]
    conv.lipschitz_bound(True)
    assert torch.equal(conv.weight, first)
    before = part.vector.clone()
    part.training = False  # as in a backward pass
    raw(conv).data.add_(torch.randn(4, 3, 3, 3))
    assert not torch.equal(conv.weight, first)
    assert torch.equal(part.vector, before)


def test_state_dict() -> None:
    conv, other = make(0.1), make(0.1)
    raw(conv).data.normal_()
    follow(conv, 1)
    assert list(conv.state_dict()) == [
        "parametrizations.weight.original",
        *(f"parametrizations.weight.0.{name}" for name in ("vector", "bound", "slack", "sketch")),
    ]
    other.load_state_dict(conv.state_dict())
    for mode in (False, True):
        for layer in (conv.train(mode), other.train(mode)):
            raw(layer).data.add_(1.0)
        assert torch.equal(conv.weight, other.weight)


def test_removed_cap() -> None:
    conv = make(0.1).eval()
    weight = conv.weight.detach().clone()
    free = nn.utils.parametrize.remove_parametrizations(conv, "weight").train().eval()
    assert torch.equal(free.weight, weight)
    free.weight.data.mul_(3)
    assert lipschitz_bound(free) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("other", [parametrizations.weight_norm, eq.nn.spectral_norm])
@pytest.mark.parametrize("kind", [lambda: make(0.1), lambda: SLLBlock(3, 4)], ids=["CappedConv2d", "SLLBlock"])
def test_second_parametrization(kind: Callable[[], nn.Module], other: Callable[[nn.Module], object]) -> None:
    layer = kind()
    other(layer)
    with pytest.raises(UnknownConstant, match=f"{type(layer).__name__[12:]}: another parametrization, such as"):
        lipschitz_bound(layer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CappedConv2d(2, 2, 2, cap=1.0, size=4), "kernel_size=2: must be odd"),
        (lambda: CappedConv2d(2, 2, 3, cap=0.0, size=4), r"cap=0.0\): must be > 0"),
        (lambda: CappedConv2d(2, 2, 3, cap=1.0, size=(4, 0)), r"size=\(4, 0\)\): must be >= 1"),
        (lambda: make(1.0)(torch.ones(1, 3, 7, 5)), r"an image of \(7, 5\) pixels is larger than size=\(6, 5\)"),
        (lambda: make(1.0)(torch.ones(1, 3, 6, 6)), r"an image of \(6, 6\) pixels is larger than size=\(6, 5\)"),
        (lambda: eq.nn.weight_norm(make(1.0)), r"weight_norm\(CappedConv2d\): its weight is parametrized already"),
    ],
)
def test_messages(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
