"""MDEQs that contract: block matrix, caps, gradients of their solves, and recipes."""

import dataclasses
import math
import pathlib
import statistics
import time
from typing import Any

import pytest
import torch
from problems import conv_matrix
from torch import Tensor, nn
from torch.nn.utils import parametrize
from toy import difference, directions

import equipoise as eq
from equipoise import zoo
from equipoise.contraction import CappedConv2d, conv_norm_bound
from equipoise.train import Adam, LRSchedule, TrainConfig, fit
from equipoise.zoo import Contraction, MDEQCell, MDEQClassifier, MDEQConfig, ScaledLayers, SLLLayers

RELEASED = ScaledLayers()
EXACT = eq.Picard(max_steps=300, rtol=1e-13)
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
    ("fields", "dropout", "norm_of", "radius_of"),
    [
        ({}, 0.0, 0.732, 0.681),
        ({}, 0.3, 0.925, 0.861),
        ({"weights": "uniform"}, 0.0, 1.021, 0.713),
        ({"slope": 0.1}, 0.0, 0.024, 0.021),
        ({"slope": 0.2}, 0.0, 0.124, 0.110),
        ({"slope": 0.3}, 0.0, 0.344, 0.313),
        ({"slope": 0.45}, 0.0, 1.006, 0.944),
        ({"slope": 0.5}, 0.0, 1.341, 1.270),
    ],
)
def test_known_constants(fields: dict[str, Any], dropout: float, norm_of: float, radius_of: float) -> None:
    layers = dataclasses.replace(RELEASED, **fields)
    matrix = layers.block_matrix(4, dropout=dropout)
    assert (norm(matrix), radius(matrix)) == pytest.approx((norm_of, radius_of), abs=6e-4)
    assert layers.constant(4, dropout=dropout) == pytest.approx(norm(matrix))


def test_released_block_matrix() -> None:
    expected = [[0.291, 0.332, 0.244, 0.180], [0.166, 0.291, 0.122, 0.090]]
    expected += [[0.084, 0.105, 0.291, 0.078], [0.053, 0.067, 0.083, 0.291]]
    torch.testing.assert_close(RELEASED.block_matrix(4), torch.tensor(expected), rtol=0, atol=6e-4)


@pytest.mark.parametrize(
    ("dropout", "cap", "slopes"),
    [
        (0.0, 1.0, (0.921, 0.933)),
        (0.0, 1.5, (0.612, 0.623)),
        (0.0, 2.0, (0.449, 0.459)),
        (0.0, 3.0, (0.284, 0.293)),
        (0.3, 1.0, (0.857, 0.870)),
        (0.3, 1.5, (0.564, 0.575)),
        (0.3, 2.0, (0.411, 0.422)),
        (0.3, 3.0, (0.258, 0.267)),
    ],
)
def test_largest_slopes(dropout: float, cap: float, slopes: tuple[float, float]) -> None:
    for measure, slope in zip((norm, radius), slopes, strict=True):
        near = (dataclasses.replace(RELEASED, cap=cap, slope=slope + change) for change in (-1e-3, 1e-3))
        below, above = (measure(layers.block_matrix(4, dropout=dropout)) for layers in near)
        assert below < 1 < above


def test_capped_settings() -> None:
    assert RELEASED.capped(4, dropout=0.3) == RELEASED
    capped = dataclasses.replace(RELEASED, slope=0.8).capped(4, dropout=0.3)
    assert capped.constant(4, dropout=0.3) <= 0.99
    assert dataclasses.replace(capped, cap=capped.cap + 2e-3).constant(4, dropout=0.3) > 0.99
    with pytest.raises(ValueError, match=r"limit=1.0: must lie in \(0, 1\); only below 1 is there a contraction"):
        RELEASED.capped(4, limit=1.0)


@pytest.mark.parametrize("post_norm_affine", [False, True])
@pytest.mark.parametrize("max_gamma", [0.7, 1.3])
def test_promise(post_norm_affine: bool, max_gamma: float) -> None:
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


# --- structure -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_published_model() -> None:
    torch.set_default_dtype(torch.float32)
    config = dataclasses.replace(MDEQConfig.cifar10_large(), contraction=RELEASED)
    model = MDEQClassifier(config).eval()
    assert sum(p.numel() for p in model.parameters()) == 11_094_078
    assert config.state_size == 61_440
    assert not [m for m in model.deq.cell.modules() if isinstance(m, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm))]
    certificate = eq.certify(model)
    assert certificate.norm <= RELEASED.constant(4)
    assert certificate.contracts


# --- caps after rough training ---------------------------------------------------------------------------------------


def excess(conv: CappedConv2d) -> float:
    """By how much the weight in use is beyond its cap, from singular values at all frequencies."""
    weight = conv.weight.detach()
    bound = conv_norm_bound(weight, conv.size, stride=conv.stride[0], padding=int(conv.padding[0]), exact=True)
    return float(bound) / conv.cap - 1


STEEP = ScaledLayers(slope=0.8).capped(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contraction", "lr"),
    [
        (contraction, lr) if lr == 0.1 else pytest.param(contraction, lr, marks=pytest.mark.extended)
        for contraction in (ScaledLayers(), STEEP, SLLLayers())
        for lr in (0.1, 0.02, 0.003)
    ],
)
def test_caps(contraction: Contraction, lr: float) -> None:
    """Fifty rough steps leave every convolution in use within a tenth of its cap; in evaluation it is within it."""
    config = dataclasses.replace(TINY, contraction=contraction)
    model = MDEQClassifier(config, solver=eq.Picard(max_steps=3), gradient=eq.JacobianFree())
    convs = [m for m in model.deq.cell.modules() if isinstance(m, CappedConv2d)]
    assert len(convs) == (4 + 2 + 2 if isinstance(contraction, ScaledLayers) else 2)
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    images, labels = torch.randn(12, 1, 8, 8), torch.randint(3, (12,))
    for _ in range(50):
        adam.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        assert max(map(excess, convs)) < 0.1
        loss.backward()
        adam.step()
    model.eval()
    for conv in convs:
        dense = conv_matrix(conv.weight.detach(), conv.size, conv.stride[0], int(conv.padding[0]))
        assert norm(dense) <= conv.cap * (1 + 1e-4)
    grown = [float(c.parametrizations.weight.original.detach().norm() / c.weight.detach().norm()) for c in convs]
    assert lr < 0.1 or max(grown) > 1.5, "some kernel must have outgrown its cap for this test to say something"
    assert eq.certify(model).norm <= contraction.constant(2) * (1 + 1e-6)


# --- gradients -------------------------------------------------------------------------------------------------------


@contractions
@pytest.mark.parametrize("training", [True, False])
def test_fixed_weights(contraction: Contraction, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, u = make_cell(contraction)
    cell.train(training)
    seen: dict[int, list[Tensor]] = {}
    original = CappedConv2d._conv_forward

    def watched(self: CappedConv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.setdefault(id(self), []).append(weight.detach().clone())
        return original(self, x, weight, bias)

    monkeypatch.setattr(CappedConv2d, "_conv_forward", watched)
    layer = eq.nn.DEQ(cell, solver=eq.Picard(max_steps=4), init=cell.zeros)
    z = (*layer(u), *layer(u))
    forward = {key: len(weights) for key, weights in seen.items()}
    sum(level.sum() for level in z).backward()
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
def test_unrolled_gradients(contraction: Contraction, training: bool) -> None:
    dropout = 0.2 if isinstance(contraction, ScaledLayers) else 0.0
    cell, u = make_cell(contraction, dropout=dropout)
    cell.train(training)
    implicit = gradients(cell, u, solver=EXACT, gradient=eq.Implicit(solver=EXACT))
    unrolled = gradients(cell, u, solver=eq.Picard(max_steps=0), gradient=eq.Unrolled(steps=120))
    for ours, theirs in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * (1e-12 + float(theirs.abs().max())))
    assert sum(float(g.norm()) for g in implicit) > 1


def cotangents(cell: MDEQCell, u: Tensor | tuple[Tensor, ...], gradient: eq.Gradient) -> tuple[Tensor, list[Tensor]]:
    """`(B, D)` the adjoint solution, which is the gradient by what is added to the map, and those by the parameters."""
    added = cell.zeros(u)
    torch.manual_seed(3)
    g = [torch.randn_like(level) for level in added]
    added = tuple(level.requires_grad_() for level in added)

    def f(z: tuple[Tensor, ...], u: object, added: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(level + more for level, more in zip(cell(z, u), added, strict=True))

    params = list(cell.parameters())
    z = eq.fixed_point(f, cell.zeros(u), u, added, solver=EXACT, gradient=gradient, params=params).value
    loss = sum((level * slope).sum() for level, slope in zip(z, g, strict=True))
    found = torch.autograd.grad(loss, [*added, *params], materialize_grads=True)
    return torch.cat([level.flatten(1) for level in found[: len(added)]], dim=1), list(found[len(added) :])


@pytest.mark.parametrize(
    "contraction", [ScaledLayers(slope=0.6).capped(2, limit=0.5), SLLLayers(ceiling=0.625)], ids=CONTRACTIONS
)
def test_truncated_gradients(contraction: Contraction) -> None:
    r"""$w_k - w = -(\lambda J^T + (1 - \lambda) I)^k w$; what is off by $e |w|$ has a cosine $\ge \sqrt{1 - e^2}$."""
    cell, u = make_cell(contraction)
    constant = eq.certify(cell.eval()).norm
    assert 0.3 < constant <= 0.5
    w, slopes = cotangents(cell, u, eq.Implicit(solver=EXACT))
    for gradient, terms, damping, least in (
        (eq.JacobianFree(), 1, 1.0, 0.9),
        (eq.Phantom(steps=2, damping=1.0), 2, 1.0, 0.97),
        (eq.Phantom(steps=5, damping=0.5), 5, 0.5, 0.97),
        (eq.Phantom(steps=6, damping=1.0), 6, 1.0, 0.999),
        (eq.Neumann(steps=5), 6, 1.0, 0.999),
    ):
        found, others = cotangents(cell, u, gradient)
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


def test_gradcheck() -> None:
    config = dataclasses.replace(TINY, contraction=RELEASED, image_size=4, channels=(2, 4), num_groups=2, expansion=1)
    cell = config.cell()
    for block, post in zip(cell.blocks, cell.post, strict=True):
        block.activation = Smooth()
        post[0] = Smooth()

    def solve(u: Tensor) -> tuple[Tensor, ...]:
        return eq.fixed_point(cell, cell.zeros(u), u, solver=EXACT, gradient=eq.Implicit(solver=EXACT)).value

    u = torch.randn(2, *config.level_shapes[0], requires_grad=True)
    for mode in (True, False):
        cell.train(mode)
        assert torch.autograd.gradcheck(solve, (u,), atol=1e-6, fast_mode=True)


@pytest.mark.slow
def test_derivative_by_kernels() -> None:
    """Along a direction in the kernels, against central differences of solves in training mode."""
    cell, u = make_cell(RELEASED)
    convs = [m for m in cell.modules() if isinstance(m, CappedConv2d)]
    kernels = [conv.parametrizations.weight.original for conv in convs]

    def loss() -> Tensor:
        z = eq.fixed_point(cell, cell.zeros(u), u, solver=EXACT, gradient=eq.Implicit(solver=EXACT)).value
        return sum((level * torch.linspace(-1, 1, level[0].numel()).view_as(level[0])).sum() for level in z)

    with torch.no_grad():
        for step in range(200):  # until the power iteration has settled
            torch._foreach_mul_(kernels, 0.5 if step % 2 else 2.0)
            assert all(conv.weight.isfinite().all() for conv in convs)
        for conv in convs:
            conv.parametrizations.weight[0].bound.zero_()  # below which the norm in use would not fall
    along = directions(kernels)
    slopes = torch.autograd.grad(loss(), kernels)
    ours = sum(float((s * d).sum()) for s, d in zip(slopes, along, strict=True))
    assert ours == pytest.approx(difference(loss, kernels, along, 1e-5), rel=1e-2)


LONG = pytest.mark.timeout(900)
SHORT = {"epochs": 1, "batch_size": 8}  # small batches, as the statistics of BatchNorm need steps


@pytest.mark.parametrize("name", [name for name in zoo.RECIPES if name.startswith("lipschitz")])
def test_solvers_of_contracting_recipes(name: str) -> None:
    config = zoo.RECIPES[name]()
    layers, n, p = config.model.contraction, config.model.num_levels, config.model.dropout
    assert layers is not None
    assert isinstance(config.gradient, eq.Implicit)
    assert config.eval_solver is not None
    in_training, in_evaluation = layers.constant(n, dropout=p), layers.constant(n)
    assert in_evaluation <= in_training < 1
    for solver, constant in (
        (config.solver, in_training),
        (config.gradient.solver, in_training),
        (config.eval_solver, in_evaluation),
    ):
        assert isinstance(solver, eq.Anderson if constant > 0.6 else eq.Picard)
        assert solver.lipschitz == constant
    assert (config.solver.max_steps, config.gradient.solver.max_steps) == (18, 20)
    assert config.eval_solver == eq.contraction_solver(in_evaluation, rtol=config.solver.rtol)
    assert config.task.pretraining.steps == 0


def test_published_lipschitz_mdeq() -> None:
    config = zoo.lipschitz_cifar10()
    assert config.model.contraction == ScaledLayers(
        slope=0.4, update=0.5, exchange=0.3, weights="softmax", max_gamma=1.0, cap=2.0
    )
    assert config.model.channels == (32, 64, 128, 256)
    assert config.model.dropout == 0.3
    assert config.optimizer == Adam(lr=1e-3)
    assert config.schedule == LRSchedule(final_lr=1e-6)
    assert (config.epochs, config.batch_size, config.solver.rtol) == (200, 128, 1e-3)
    assert config.data.flip
    assert config.data.crop_padding == 4


def test_expanding_layers() -> None:
    with pytest.raises(ValueError, match=r"ScaledLayers\(slope=0.8.* allows a constant of 4\.844.* lower slope, cap"):
        zoo.contracting(zoo.mdeq_digits(), ScaledLayers(slope=0.8))
    smaller = zoo.contracting(zoo.mdeq_digits(), ScaledLayers(slope=0.2))
    assert isinstance(smaller.solver, eq.Picard)
    assert smaller.solver.lipschitz == pytest.approx(0.1255, abs=0.01)


@pytest.mark.parametrize(
    ("config", "changes", "accuracy"),
    [
        pytest.param(zoo.lipschitz_digits(), SHORT, 0.92, marks=pytest.mark.slow, id="scaled"),
        pytest.param(
            zoo.lipschitz_tight_digits(), {**SHORT, "stop_after": 80}, 0.75, marks=pytest.mark.slow, id="tight"
        ),
        pytest.param(
            zoo.lipschitz_digits(), {"epochs": 7}, 0.97, marks=[pytest.mark.extended, LONG], id="scaled, long"
        ),
        pytest.param(
            zoo.lipschitz_tight_digits(), {"epochs": 5}, 0.97, marks=[pytest.mark.extended, LONG], id="tight, long"
        ),
    ],
)
def test_digits(config: TrainConfig, changes: dict[str, int], accuracy: float, tmp_path: pathlib.Path) -> None:
    """They are learned by a map that is proved to contract."""
    pytest.importorskip("sklearn")
    torch.set_default_dtype(torch.float32)
    result = fit(dataclasses.replace(config, **changes, tensorboard=False), run_dir=tmp_path)
    assert result.test_accuracy > accuracy
    assert 0 < result.test["measured_lipschitz"] <= result.test["certified_lipschitz"] < 1
    assert eq.certify(result.model, training=True).norm < 1
    assert result.test["converged"] == 1
    assert 1 < result.test["mean_steps"] <= result.test["predicted_evaluations"]


@pytest.mark.extended
@pytest.mark.timeout(600)
def test_cost_of_caps() -> None:
    """Against the same model with its convolutions set free, in turns; medians of processor times of one thread."""
    torch.set_default_dtype(torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = zoo.lipschitz_fashion_mnist()
    three = eq.Picard(max_steps=3, rtol=0, atol=1e-30)  # as many evaluations as digits need, for both models
    capped, free = (MDEQClassifier(config.model, solver=three, gradient=eq.Implicit(solver=three)) for _ in range(2))
    free.load_state_dict(capped.state_dict())
    for module in free.modules():
        if isinstance(module, CappedConv2d):
            parametrize.remove_parametrizations(module, "weight")
    adams = {model: torch.optim.Adam(model.train().parameters(), lr=config.optimizer.lr) for model in (capped, free)}
    seconds: dict[MDEQClassifier, list[float]] = {model: [] for model in adams}
    images, labels = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))

    def step(model: MDEQClassifier) -> float:
        """Seconds of processor time of a training step."""
        start = time.process_time()
        nn.functional.cross_entropy(model(images), labels).backward()
        adams[model].step()
        adams[model].zero_grad()
        return time.process_time() - start

    def cost() -> float:
        for turn in range(12):
            for model in (capped, free) if turn % 2 else (free, capped):
                seconds[model].append(step(model))
        start = time.process_time()
        eq.certify(capped)
        certificate = time.process_time() - start
        with_caps, without = (statistics.median(seconds[model][2:]) for model in (capped, free))
        an_epoch = 57_000 // 128  # steps, after which a certificate is due
        return (with_caps + certificate / an_epoch) / without - 1

    try:
        # More turns where other programs on the machine disturb the first ones.
        assert any(cost() < 0.05 for _ in range(3))
    finally:
        torch.set_num_threads(threads)
