"""MDEQs that contract: reference numbers of the block matrix, caps after rough training, gradients of their solves."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import conv_matrix
from torch import Tensor, nn

import equipoise as eq
from equipoise.contraction import CappedConv2d, conv_norm_bound
from equipoise.nn import VariationalDropout
from equipoise.zoo import Contraction, MDEQCell, MDEQClassifier, MDEQConfig, ScaledLayers, SLLLayers

RELEASED = ScaledLayers()
TINY = MDEQConfig(
    image_size=8,
    image_channels=1,
    num_classes=3,
    channels=(4, 8),
    expansion=2,
    num_groups=2,
    head_channels=(2, 2),
    final_channels=4,
)
CONTRACTIONS = {"scaled": ScaledLayers(), "sll": SLLLayers()}
contractions = pytest.mark.parametrize("contraction", CONTRACTIONS.values(), ids=CONTRACTIONS)


def make_cell(
    contraction: Contraction, scale: float = 3.0, **fields: object
) -> tuple[MDEQCell, Tensor | tuple[Tensor, ...]]:
    """A cell whose kernels reach their caps, and an injection for three samples."""
    config = dataclasses.replace(TINY, contraction=contraction, **fields)
    cell = config.cell()
    with torch.no_grad():
        for module in cell.modules():
            if isinstance(module, CappedConv2d):
                module.parametrizations.weight.original.mul_(scale)
        for parameter in cell.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    outer = tuple(torch.randn(3, *shape) for shape in config.level_shapes)
    if isinstance(contraction, ScaledLayers):
        return cell, outer[0]
    inner = tuple(torch.randn(3, config.expansion * c, h, w) for c, h, w in config.level_shapes)
    return cell, outer + inner


def radius(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).abs().max())


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


# --- the block matrix ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dropout", "row", "norm_of", "radius_of"), [(0.0, 1.047, 0.732, 0.681), (0.3, 1.324, 0.925, 0.861)]
)
def test_the_released_settings_have_the_constants_of_the_specification(
    dropout: float, row: float, norm_of: float, radius_of: float
) -> None:
    matrix = RELEASED.block_matrix(4, dropout=dropout)
    assert float(matrix.sum(1).max()) == pytest.approx(row, abs=6e-4)
    assert norm(matrix) == pytest.approx(norm_of, abs=6e-4)
    assert radius(matrix) == pytest.approx(radius_of, abs=6e-4)
    assert RELEASED.constant(4, dropout=dropout) == pytest.approx(norm(matrix))


def test_every_entry_of_the_released_block_matrix() -> None:
    expected = [[0.291, 0.332, 0.244, 0.180], [0.166, 0.291, 0.122, 0.090]]
    expected += [[0.084, 0.105, 0.291, 0.078], [0.053, 0.067, 0.083, 0.291]]
    torch.testing.assert_close(RELEASED.block_matrix(4), torch.tensor(expected), rtol=0, atol=6e-4)


def test_uniform_shares_and_other_slopes() -> None:
    uniform = dataclasses.replace(RELEASED, weights="uniform").block_matrix(4)
    assert (norm(uniform), radius(uniform)) == pytest.approx((1.021, 0.713), abs=6e-4)
    table = {0.1: (0.024, 0.021), 0.2: (0.124, 0.110), 0.3: (0.344, 0.313), 0.45: (1.006, 0.944), 0.5: (1.341, 1.270)}
    for slope, expected in table.items():
        matrix = dataclasses.replace(RELEASED, slope=slope).block_matrix(4)
        assert (norm(matrix), radius(matrix)) == pytest.approx(expected, abs=6e-4), slope


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_largest_slopes(dropout: float) -> None:
    table = {1.0: (0.921, 0.933), 1.5: (0.612, 0.623), 2.0: (0.449, 0.459), 3.0: (0.284, 0.293)}
    if dropout:
        table = {1.0: (0.857, 0.870), 1.5: (0.564, 0.575), 2.0: (0.411, 0.422), 3.0: (0.258, 0.267)}
    for cap, slopes in table.items():
        for measure, slope in zip((norm, radius), slopes, strict=True):
            below, above = (
                measure(dataclasses.replace(RELEASED, cap=cap, slope=s).block_matrix(4, dropout=dropout))
                for s in (slope - 1e-3, slope + 1e-3)
            )
            assert below < 1 < above


def test_the_norm_of_the_reshaped_kernel_proves_nothing() -> None:
    """Negative control: capped so, kernels may have three times the norm, two times with stride 2, and M has 6.11."""
    s, block = 0.4, 0.4 * (0.5 + 0.5 * 6 * 0.4 * 6)
    assert block == pytest.approx(3.08)
    share = eq.contraction.LevelWeights(4, "softmax", exchange=0.3)()
    matrix = torch.empty(4, 4)
    for i in range(4):
        for j in range(4):
            path = 1.0 if i == j else 2 ** (j - i) * 2.0 if j > i else 4.0 ** (i - j) * s ** (i - j - 1)
            matrix[i, j] = 2 * s * share[i, j] * path * block
    assert (norm(matrix), radius(matrix)) == pytest.approx((6.11, 5.77), abs=6e-3)


def test_settings_are_capped_until_they_contract_in_training() -> None:
    assert RELEASED.capped(4, dropout=0.3) == RELEASED
    capped = dataclasses.replace(RELEASED, slope=0.8).capped(4, dropout=0.3)
    assert capped.constant(4, dropout=0.3) <= 0.99
    assert dataclasses.replace(capped, cap=capped.cap + 2e-3).constant(4, dropout=0.3) > 0.99
    with pytest.raises(ValueError, match=r"limit=1.0: must lie in \(0, 1\); only below 1 is there a contraction"):
        RELEASED.capped(4, limit=1.0)


@pytest.mark.parametrize("post_norm_affine", [False, True])
@pytest.mark.parametrize("max_gamma", [0.7, 1.3])
def test_no_weights_exceed_what_the_settings_promise(post_norm_affine: bool, max_gamma: float) -> None:
    contraction = dataclasses.replace(RELEASED, max_gamma=max_gamma)
    cell, _ = make_cell(contraction, channels=(4, 4, 8), head_channels=(2, 2, 2), post_norm_affine=post_norm_affine)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter *= 50
    promised = contraction.block_matrix(3)
    found = cell.eval().block_matrix()
    assert bool((found <= promised * (1 + 1e-9)).all())
    # Up to the scale of the last norm, which is a scale of one where it has none, the promise is kept exactly.
    post = max_gamma if post_norm_affine else 1.0
    torch.testing.assert_close(found, promised * post / max(1.0, max_gamma), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SLLLayers(ceiling=1.0),
            r"ceiling=1.0: must be > 0 and < 1; with a budget of 1 or more the map need not",
        ),
        (lambda: SLLLayers(ceiling=1.2), "ceiling=1.2"),
        (lambda: SLLLayers(start=1.0), r"start=1.0: must be > 0 and < 1"),
        (lambda: SLLLayers(exchange=-0.1), r"exchange=-0.1: must be >= 0 and <= 1"),
        (lambda: ScaledLayers(slope=0.0), "slope=0.0: must be"),
        (lambda: ScaledLayers(update=1.1), "update=1.1: must be"),
        (lambda: ScaledLayers(cap=0.0), "cap=0.0: must be > 0"),
        (lambda: ScaledLayers(max_gamma=math.nan), "max_gamma=nan: must be > 0"),
        (lambda: ScaledLayers(weights="sum"), "weights='sum': must be softmax or uniform"),
        (
            lambda: dataclasses.replace(TINY, dropout=0.1, contraction=SLLLayers()),
            "dropout=0.1 has no place in SLLLayers",
        ),
    ],
)
def test_settings_out_of_range(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# --- structure -------------------------------------------------------------------------------------------------------


def test_the_published_model_has_its_number_of_parameters_without_the_gains() -> None:
    config = dataclasses.replace(MDEQConfig.cifar10_large(), contraction=RELEASED, dropout=0.3)
    with torch.device("meta"):
        plain = sum(p.numel() for p in MDEQClassifier(MDEQConfig.cifar10_large()).parameters())
    assert plain == 11_097_438
    gains = 7 * sum(config.channels)
    assert plain - gains == 11_094_078


@pytest.mark.slow
def test_the_published_model_with_known_constants_has_its_number_of_parameters_and_is_certified() -> None:
    torch.set_default_dtype(torch.float32)
    config = dataclasses.replace(MDEQConfig.cifar10_large(), contraction=RELEASED)
    model = MDEQClassifier(config).eval()
    assert sum(p.numel() for p in model.parameters()) == 11_094_078
    assert config.state_size == 61_440
    certificate = eq.certify(model)
    assert certificate.norm <= RELEASED.constant(4)
    assert certificate.contracts


@contractions
def test_states_and_norms_of_the_map_are_what_its_formulas_say(contraction: Contraction) -> None:
    cell, u = make_cell(contraction)
    z = tuple(torch.randn(3, *shape) for shape in TINY.level_shapes)
    assert [level.shape for level in cell.eval()(z, u)] == [level.shape for level in z]
    assert not [m for m in cell.modules() if isinstance(m, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm))]


# --- caps after rough training ---------------------------------------------------------------------------------------


def largest_excess(model: MDEQClassifier) -> float:
    """By how much a weight in use is beyond its cap at most, from singular values at all frequencies."""
    found = [0.0]
    for conv in model.deq.cell.modules():
        if isinstance(conv, CappedConv2d):
            weight = conv.weight.detach()
            bound = conv_norm_bound(weight, conv.size, stride=conv.stride[0], padding=int(conv.padding[0]), exact=True)
            found.append(float(bound) / conv.cap - 1)
    return max(found)


def roughly_trained(contraction: Contraction, *, lr: float = 0.1) -> tuple[MDEQClassifier, list[float]]:
    """A small classifier after fifty Adam steps, in training mode, and the excess over the caps at every step."""
    config = dataclasses.replace(TINY, contraction=contraction)
    model = MDEQClassifier(config, solver=eq.Picard(max_steps=3), gradient=eq.JacobianFree())
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 1, 8, 8, generator=generator)
    labels = torch.randint(3, (12,), generator=generator)
    excesses = []
    for _ in range(50):
        adam.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        excesses.append(largest_excess(model))
        loss.backward()
        adam.step()
    return model, excesses


@pytest.mark.parametrize(
    "lr", [0.1, pytest.param(0.02, marks=pytest.mark.slow), pytest.param(0.003, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "contraction",
    [ScaledLayers(), pytest.param(ScaledLayers(slope=0.8).capped(2), marks=pytest.mark.slow), SLLLayers()],
    ids=["scaled", "steep", "sll"],
)
def test_during_rough_training_every_convolution_in_use_is_within_a_tenth_of_its_cap(
    contraction: Contraction, lr: float
) -> None:
    _, excesses = roughly_trained(contraction, lr=lr)
    assert len(excesses) == 50
    assert max(excesses) < 0.1


@contractions
def test_after_rough_training_every_convolution_is_within_its_cap(contraction: Contraction) -> None:
    model, _ = roughly_trained(contraction)
    convs = [m for m in model.deq.cell.modules() if isinstance(m, CappedConv2d)]
    assert len(convs) == (4 + 2 + 2 if isinstance(contraction, ScaledLayers) else 2)

    def excess(conv: CappedConv2d) -> float:
        dense = conv_matrix(conv.weight.detach(), conv.size, conv.stride[0], int(conv.padding[0]))
        return norm(dense) / conv.cap - 1

    model.eval()
    assert max(excess(conv) for conv in convs) <= 1e-4
    grown = [float(c.parametrizations.weight.original.detach().norm() / c.weight.detach().norm()) for c in convs]
    assert max(grown) > 1.5, "some kernel must have outgrown its cap for this test to say something"
    certificate = eq.certify(model)
    assert certificate.norm <= contraction.constant(2) * (1 + 1e-6)


# --- gradients -------------------------------------------------------------------------------------------------------


@contractions
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_meet_the_very_same_weights(
    contraction: Contraction, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, u = make_cell(contraction)
    cell.train(training)
    seen: dict[int, list[Tensor]] = {}
    original = CappedConv2d._conv_forward

    def watched(self: CappedConv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.setdefault(id(self), []).append(weight.detach().clone())
        return original(self, x, weight, bias)

    monkeypatch.setattr(CappedConv2d, "_conv_forward", watched)
    layer = eq.nn.DEQ(cell, solver=eq.Picard(max_steps=4), init=cell.zeros)
    first, second = layer(u), layer(u)
    forward = {key: len(weights) for key, weights in seen.items()}
    sum(level.sum() for level in first).backward()
    sum(level.sum() for level in second).backward()
    for key, weights in seen.items():
        assert len(weights) > forward[key], "the backward pass evaluates the map, too"
        assert all(torch.equal(weight, weights[0]) for weight in weights)


def gradients(cell: MDEQCell, u: Tensor | tuple[Tensor, ...], **choice: object) -> list[Tensor]:
    """Of a loss of the equilibrium, by the injection and all parameters; the same dropout in every call."""
    torch.manual_seed(7)
    injections = [t.detach().requires_grad_() for t in ((u,) if isinstance(u, Tensor) else u)]
    layer = eq.nn.DEQ(cell, init=cell.zeros, **choice)  # type: ignore[arg-type]
    z = layer(injections[0] if isinstance(u, Tensor) else tuple(injections))
    loss = sum((level * torch.linspace(-1, 1, level[0].numel()).view_as(level[0])).sum() for level in z)
    return list(torch.autograd.grad(loss, [*injections, *cell.parameters()], materialize_grads=True))


@contractions
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_a_solve_equals_that_of_the_unrolled_iteration(
    contraction: Contraction, training: bool
) -> None:
    dropout = 0.2 if isinstance(contraction, ScaledLayers) else 0.0
    cell, u = make_cell(contraction, dropout=dropout)
    cell.train(training)
    implicit = gradients(
        cell,
        u,
        solver=eq.Picard(max_steps=300, rtol=1e-13),
        gradient=eq.Implicit(solver=eq.Picard(max_steps=300, rtol=1e-13)),
    )
    unrolled = gradients(cell, u, solver=eq.Picard(max_steps=0), gradient=eq.Unrolled(steps=200))
    for ours, theirs in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * (1e-12 + float(theirs.abs().max())))
    assert sum(float(g.norm()) for g in implicit) > 1


def cotangents(
    cell: MDEQCell, u: Tensor | tuple[Tensor, ...], gradient: eq.Gradient, solver: eq.Solver
) -> tuple[Tensor, list[Tensor]]:
    """`(B, D)` the adjoint solution, which is the gradient by what is added to the map, and those by the parameters."""
    added = cell.zeros(u)
    torch.manual_seed(3)
    g = [torch.randn_like(level) for level in added]
    added = tuple(level.requires_grad_() for level in added)

    def f(z: tuple[Tensor, ...], u: object, added: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(level + more for level, more in zip(cell(z, u), added, strict=True))

    params = list(cell.parameters())
    z = eq.fixed_point(f, cell.zeros(u), u, added, solver=solver, gradient=gradient, params=params).value
    loss = sum((level * slope).sum() for level, slope in zip(z, g, strict=True))
    found = torch.autograd.grad(loss, [*added, *params], materialize_grads=True)
    return torch.cat([level.flatten(1) for level in found[: len(added)]], dim=1), list(found[len(added) :])


@pytest.mark.parametrize(
    "contraction", [ScaledLayers(slope=0.6).capped(2, limit=0.5), SLLLayers(ceiling=0.625)], ids=CONTRACTIONS
)
def test_truncated_gradients_point_where_the_constant_promises(contraction: Contraction) -> None:
    r"""$w_k - w = -(\lambda J^T + (1 - \lambda) I)^k w$; what is off by $e |w|$ has a cosine $\ge \sqrt{1 - e^2}$."""
    cell, u = make_cell(contraction)
    constant = eq.certify(cell.eval()).norm
    assert 0.3 < constant <= 0.5
    solver = eq.Picard(max_steps=300, rtol=1e-13)
    w, slopes = cotangents(cell, u, eq.Implicit(solver=solver), solver)
    for gradient, terms, damping, least in (
        (eq.JacobianFree(), 1, 1.0, 0.9),
        (eq.Phantom(steps=2, damping=1.0), 2, 1.0, 0.97),
        (eq.Phantom(steps=5, damping=0.5), 5, 0.5, 0.97),
        (eq.Phantom(steps=6, damping=1.0), 6, 1.0, 0.999),
        (eq.Neumann(steps=5), 6, 1.0, 0.999),
    ):
        found, others = cotangents(cell, u, gradient, solver)
        off = (damping * constant + 1 - damping) ** terms
        assert bool(((found - w).norm(dim=1) <= off * w.norm(dim=1)).all())
        cosines = nn.functional.cosine_similarity(found, w, dim=1)
        assert float(cosines.min()) >= max(least, math.sqrt(1 - off**2))
        a, b = (torch.cat([slope.flatten() for slope in each]) for each in (others, slopes))
        assert float(nn.functional.cosine_similarity(a, b, dim=0)) > least


class Smooth(nn.Module):
    """A differentiable activation with the constant 0.4."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.4 * torch.tanh(x)


def test_gradcheck_of_a_solve_with_smooth_activations() -> None:
    config = dataclasses.replace(TINY, contraction=RELEASED, image_size=4, channels=(2, 4), num_groups=2, expansion=1)
    cell = config.cell()
    for block, post in zip(cell.blocks, cell.post, strict=True):
        block.activation = Smooth()
        post[0] = Smooth()
    exact = eq.Picard(max_steps=200, rtol=1e-12)

    def solve(u: Tensor) -> tuple[Tensor, ...]:
        return eq.fixed_point(cell, cell.zeros(u), u, solver=exact, gradient=eq.Implicit(solver=exact)).value

    u = torch.randn(2, *config.level_shapes[0], requires_grad=True)
    for mode in (True, False):
        cell.train(mode)
        assert torch.autograd.gradcheck(solve, (u,), atol=1e-6, fast_mode=True)


def test_the_derivative_by_a_capped_kernel_is_that_of_the_layer_as_it_follows() -> None:
    """Along a direction in the kernels, against central differences of solves in training mode."""
    cell, u = make_cell(RELEASED)
    kernels = [m.parametrizations.weight.original for m in cell.modules() if isinstance(m, CappedConv2d)]
    exact = eq.Picard(max_steps=200, rtol=1e-13)

    def loss() -> Tensor:
        z = eq.fixed_point(cell, cell.zeros(u), u, solver=exact, gradient=eq.Implicit(solver=exact)).value
        return sum((level * torch.linspace(-1, 1, level[0].numel()).view_as(level[0])).sum() for level in z)

    with torch.no_grad():
        for step in range(200):  # until the power iteration has settled
            for kernel in kernels:
                kernel.mul_(0.5 if step % 2 else 2.0)
            for module in cell.modules():
                if isinstance(module, CappedConv2d):
                    assert module.weight.isfinite().all()
        for module in cell.modules():
            if isinstance(module, CappedConv2d):
                module.parametrizations.weight[0].bound.zero_()  # below which the norm in use would not fall
    directions = [torch.randn_like(kernel) for kernel in kernels]
    slopes = torch.autograd.grad(loss(), kernels)
    ours = sum(float((s * d).sum()) for s, d in zip(slopes, directions, strict=True))

    def moved(step: float) -> float:
        with torch.no_grad():
            for kernel, direction in zip(kernels, directions, strict=True):
                kernel.add_(direction, alpha=step)
        value = float(loss().detach())
        with torch.no_grad():
            for kernel, direction in zip(kernels, directions, strict=True):
                kernel.sub_(direction, alpha=step)
        return value

    step = 1e-5
    assert ours == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-2)


def test_masks_hold_for_a_solve_and_change_between_solves() -> None:
    cell, u = make_cell(RELEASED, dropout=0.5)
    assert isinstance(cell.blocks[0].dropout, VariationalDropout)
    layer = eq.nn.DEQ(cell, solver=eq.Picard(max_steps=40, rtol=1e-10), init=cell.zeros)
    with torch.no_grad():
        a, b = layer.solve(u).raise_for_status(), layer.solve(u).raise_for_status()
        assert not torch.equal(a.value[0], b.value[0])
        layer.eval()
        assert torch.equal(layer(u)[0], layer(u)[0])
