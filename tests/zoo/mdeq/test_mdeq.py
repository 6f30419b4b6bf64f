"""The MDEQ: configuration, map, stem, head, classifier."""

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq
from equipoise.zoo import MDEQCell, MDEQClassifier, MDEQConfig
from equipoise.zoo.mdeq import MDEQStem
from equipoise.zoo.mdeq.head import Bottleneck

SMALL = MDEQConfig(
    image_size=8,
    image_channels=2,
    num_classes=3,
    channels=(4, 8, 12),
    expansion=3,
    num_groups=2,
    head_channels=(2, 2, 3),
    final_channels=6,
    post_norm_affine=True,
)


def make_cell(config: MDEQConfig = SMALL, seed: int = 0) -> MDEQCell:
    """A cell in float64 all of whose parameters are random, scales and shifts of norms included."""
    torch.manual_seed(seed)
    cell = MDEQCell(config).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return cell


def make_state(config: MDEQConfig, batch: int = 3) -> tuple[tuple[Tensor, ...], Tensor]:
    """A random state and injection in float64."""
    z = tuple(torch.randn(batch, *shape, dtype=torch.float64) for shape in config.level_shapes)
    return z, torch.randn(batch, *config.level_shapes[0], dtype=torch.float64)


def plain_cell(weights: dict[str, Tensor], config: MDEQConfig, z: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
    """The map written out with torch.nn.functional and loops over a state dict: the oracle of the cell."""

    def norm(x: Tensor, name: str, groups: int = config.num_groups) -> Tensor:
        split = x.reshape(x.shape[0], groups, -1)
        mean, variance = split.mean(2, keepdim=True), split.var(2, keepdim=True, unbiased=False)
        x = ((split - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        if f"{name}.weight" in weights:
            x = x * weights[f"{name}.weight"].view(1, -1, 1, 1) + weights[f"{name}.bias"].view(1, -1, 1, 1)
        return x

    def normalized(name: str) -> Tensor:
        g, v = (weights[f"{name}.parametrizations.weight.original{k}"] for k in (0, 1))
        return g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    levels = range(config.num_levels)
    b = []
    for i in levels:
        h = F.conv2d(z[i], normalized(f"blocks.{i}.conv1"), padding=1)
        h = F.conv2d(norm(h, f"blocks.{i}.norm1").clamp(min=0), normalized(f"blocks.{i}.conv2"), padding=1)
        r = norm(h + u if i == 0 else h, f"blocks.{i}.norm2")
        b.append(norm((r + z[i]).clamp(min=0), f"blocks.{i}.norm3"))
    if config.num_levels == 1:
        return tuple(b)
    out = []
    for i in levels:
        y = b[i].clone()
        for j in levels:
            name, x = f"fusion.paths.{j}_to_{i}", b[j]
            if j > i:
                x = norm(F.conv2d(x, weights[f"{name}.0.weight"]), f"{name}.1")
                x = x.repeat_interleave(2 ** (j - i), 2).repeat_interleave(2 ** (j - i), 3)
            for stage in range(i - j):
                x = F.conv2d(x if stage == 0 else x.clamp(min=0), weights[f"{name}.{3 * stage}.weight"], None, 2, 1)
                x = norm(x, f"{name}.{3 * stage + 1}")
            y += x if i != j else 0
        y = F.conv2d(y.clamp(min=0), normalized(f"post.{i}.1"))
        out.append(norm(y, f"post.{i}.2", config.num_groups // 2))
    return tuple(out)


@pytest.mark.parametrize("post_norm_affine", [False, True])
@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_formulas(num_levels: int, post_norm_affine: bool) -> None:
    config = dataclasses.replace(
        SMALL,
        channels=SMALL.channels[:num_levels],
        head_channels=SMALL.head_channels[:num_levels],
        post_norm_affine=post_norm_affine,
    )
    cell = make_cell(config)
    z, u = make_state(config)
    torch.testing.assert_close(cell(z, u), plain_cell(cell.state_dict(), config, z, u), rtol=1e-12, atol=1e-12)


def test_shapes_and_arguments() -> None:
    cell = make_cell()
    z, u = make_state(SMALL)
    before = copy.deepcopy((*z, u))
    out = cell(z, u)
    assert [tuple(level.shape) for level in out] == [(3, 4, 8, 8), (3, 8, 4, 4), (3, 12, 2, 2)]
    assert all(level.is_contiguous() for level in out)
    torch.testing.assert_close((*z, u), before, rtol=0, atol=0)


def test_memory_layouts() -> None:
    cell = make_cell()
    z, u = make_state(SMALL)
    expected = cell(z, u)
    flat = torch.cat([level.flatten(1) for level in z], dim=1)
    sizes = [math.prod(shape) for shape in SMALL.level_shapes]
    views = tuple(part.view(3, *s) for part, s in zip(flat.split(sizes, 1), SMALL.level_shapes, strict=True))
    assert not views[0].is_contiguous()
    last = tuple(level.contiguous(memory_format=torch.channels_last) for level in z)
    for state, net in ((views, cell), (last, cell), (last, cell.to(memory_format=torch.channels_last))):
        torch.testing.assert_close(net(state, u), expected, rtol=1e-12, atol=1e-12)


def test_norms() -> None:
    cell = MDEQCell(MDEQConfig.cifar10_large())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in cell.modules())
    groups = {name: m.num_groups for name, m in cell.named_modules() if isinstance(m, nn.GroupNorm)}
    assert {name: number for name, number in groups.items() if number != 8} == {f"post.{i}.2": 4 for i in range(4)}


def test_dropout_masks() -> None:
    config = dataclasses.replace(SMALL, dropout=0.5)
    cell = make_cell(config)
    seen: list[Tensor] = []
    cell.blocks[1].dropout.register_forward_hook(lambda _, args, out: seen.append(out.detach() / args[0].detach()))
    _, u = make_state(config, batch=6)
    u.requires_grad_()
    layer = eq.nn.DEQ(cell, solver=eq.Picard(max_steps=4, rtol=0.0), gradient=eq.Neumann(steps=2), init=cell.zeros)
    masks = []
    for _ in range(2):
        seen.clear()
        sum(level.square().sum() for level in layer(u)).backward()
        assert len(seen) > 4  # the solve and the backward pass
        mask = seen[0].nan_to_num()
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))
        assert all(torch.equal(other.nan_to_num(), mask) for other in seen)
        masks.append(mask[:, :, 0, 0])
    assert not torch.equal(masks[0], masks[1])
    assert len(masks[0].unique(dim=0)) > 1
    seen.clear()
    cell.eval()
    layer(u)
    assert all((mask == 1).all() for mask in seen)


def test_initialization() -> None:
    torch.manual_seed(0)
    config = MDEQConfig.cifar10_tiny()
    cell = MDEQCell(config)
    plain = 0
    for name, layer in (*cell.named_modules(), *MDEQStem(config).named_modules()):
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is None
            if hasattr(layer, "parametrizations"):
                g, v = (getattr(layer.parametrizations.weight, f"original{k}").detach() for k in (0, 1))
                bound = 1 / math.sqrt(v[0].numel())  # Kaiming-uniform with a = sqrt(5)
                assert 0.9 * bound < v.abs().max() <= bound
                torch.testing.assert_close(g.flatten(), v.flatten(1).norm(dim=1))
                assert name.endswith(("conv1", "conv2")) or name.startswith("post")
            else:
                assert layer.weight.std().item() == pytest.approx(0.01, rel=0.15)
                assert abs(layer.weight.mean().item()) < 0.002
                plain += 1
        elif isinstance(layer, (nn.GroupNorm, nn.BatchNorm2d)) and layer.affine:
            assert bool((layer.weight == 1).all() & (layer.bias == 0).all())
    assert plain == 4  # two in the fusion, two in the stem


def test_zeros() -> None:
    cell = make_cell()
    for dtype in (torch.float32, torch.float64):
        z = cell.zeros(torch.ones(2, 4, 16, 16, dtype=dtype))
        assert [tuple(level.shape) for level in z] == [(2, 4, 16, 16), (2, 8, 8, 8), (2, 12, 4, 4)]
        assert all(level.dtype == dtype and not level.any() for level in z)


@pytest.mark.parametrize("num_downsamplings", [0, 1, 2, 3])
@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_stem(num_levels: int, num_downsamplings: int) -> None:
    config = MDEQConfig(
        image_size=32,
        num_classes=2,
        channels=(4,) * num_levels,
        num_downsamplings=num_downsamplings,
        num_groups=2,
        head_channels=(1,) * num_levels,
        final_channels=2,
    )
    stem = MDEQStem(config)
    assert stem(torch.randn(2, 3, 32, 32)).shape == (2, *config.level_shapes[0])
    kernels = [m.kernel_size for m in stem.modules() if isinstance(m, nn.Conv2d)]
    injected = num_levels > 2 or num_downsamplings > 0
    assert kernels == [(3, 3)] * max(2, num_downsamplings) + [(1, 1)] * injected


def test_published_state_sizes() -> None:
    assert MDEQConfig.cifar10_large().state_size == 61_440
    assert MDEQConfig.cifar10_large().level_shapes == ((32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4))
    assert [shape[1] for shape in MDEQConfig.imagenet_small().level_shapes] == [56, 28, 14, 7]


def test_values() -> None:
    """Configurations are values."""
    listed = dataclasses.replace(SMALL, channels=[4, 8, 12], head_channels=[2, 2, 3])  # type: ignore[arg-type]
    assert (listed, hash(listed)) == (SMALL, hash(SMALL))
    assert MDEQConfig(**dataclasses.asdict(SMALL)) == copy.deepcopy(SMALL) == SMALL
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.dropout = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        MDEQConfig(32, 10)  # type: ignore[misc]


TINY = MDEQConfig(
    image_size=8,
    image_channels=1,
    num_classes=3,
    channels=(4, 8),
    expansion=2,
    num_groups=2,
    dropout=0.2,
    post_norm_affine=True,
    head_channels=(1, 2),
    final_channels=5,
)
TIGHT = eq.Picard(max_steps=200, rtol=1e-13)


def make_model(
    config: MDEQConfig = TINY, contractive: bool = False, seed: int = 0, **options: object
) -> MDEQClassifier:
    """A model in float64; with `contractive` shifts outweigh what varies, so that Picard converges fast."""
    torch.manual_seed(seed)
    model = MDEQClassifier(config, **options).double()  # type: ignore[arg-type]
    if contractive:
        with torch.no_grad():
            for block in model.deq.cell.blocks:  # type: ignore[union-attr]
                block.norm1.weight.fill_(0.1)
                block.norm1.bias.fill_(1.0)
                block.norm2.weight.fill_(0.3)
                block.norm2.bias.copy_(torch.linspace(0.5, 3.0, len(block.norm2.bias)))
            for post in model.deq.cell.post:  # type: ignore[union-attr]
                post[-1].weight.fill_(0.05)
    return model


def make_images(config: MDEQConfig = TINY, batch: int = 4) -> Tensor:
    return torch.randn(batch, config.image_channels, config.image_size, config.image_size, dtype=torch.float64)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "total", "cell", "head", "dropout"),
    [
        ("cifar10_tiny", 158_890, 111_696, 41_266, 0.25),
        ("cifar10_large", 11_097_438, 8_715_232, 2_370_910, 0.3),
        ("cifar10_large_regularized", 11_097_438, 8_715_232, 2_370_910, 0.22),
        ("imagenet_small", 16_808_936, 8_716_192, 8_081_448, 0.0),
        ("imagenet_small_regularized", 18_613_496, 8_715_232, 9_886_968, 0.02),
        ("imagenet_large", 67_063_624, 54_422_800, 12_574_184, 0.0),
        ("imagenet_large_regularized", 67_061_224, 54_420_400, 12_574_184, 0.0),
        ("imagenet_xl", 90_463_280, 77_699_952, 12_682_984, 0.0),
    ],
)
def test_published_models(name: str, total: int, cell: int, head: int, dropout: float) -> None:
    config = getattr(MDEQConfig, name)()
    with torch.device("meta"):
        model = MDEQClassifier(config)
    assert (count(model), count(model.deq.cell), count(model.head)) == (total, cell, head)
    assert config.dropout == dropout


@pytest.mark.parametrize("make", [MDEQConfig.digits, MDEQConfig.fashion_mnist, MDEQConfig.cifar10_tiny])
def test_shapes(make: Callable[[], MDEQConfig]) -> None:
    config = make()
    torch.manual_seed(0)
    model = MDEQClassifier(config, solver=eq.Picard(max_steps=2), gradient=eq.JacobianFree())
    images = torch.randn(2, config.image_channels, config.image_size, config.image_size)
    logits, solution = model.classify(images)
    assert logits.shape == (2, config.num_classes)
    assert [tuple(level.shape) for level in solution.value] == [(2, *shape) for shape in config.level_shapes]
    assert solution.num_steps.tolist() == [2, 2]


def test_forward() -> None:
    model = make_model().eval()
    images = make_images()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    logits, solution = model.classify(images)
    assert torch.equal(model(images), logits)
    assert torch.equal(model.head(solution.value), logits)
    # Nothing is left behind.
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())


@pytest.mark.parametrize("shape", [(4, 1, 10, 10), (4, 3, 8, 8), (4, 8, 8), (4, 1, 8, 4)])
def test_wrong_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1, 8, 8\), got \(4"):
        make_model()(torch.zeros(shape, dtype=torch.float64))


def test_head() -> None:
    config = dataclasses.replace(TINY, channels=(4, 8, 4), head_channels=(1, 1, 2))
    model = make_model(config).eval()
    head = model.head
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)  # variances must be positive
    weights = head.state_dict()
    z = [torch.randn(2, *shape, dtype=torch.float64) for shape in config.level_shapes]

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = (weights[f"{name}.running_{k}"].view(1, -1, 1, 1) for k in ("mean", "var"))
        x = (x - mean) / (variance + 1e-5).sqrt()
        if f"{name}.weight" in weights:
            x = x * weights[f"{name}.weight"].view(1, -1, 1, 1) + weights[f"{name}.bias"].view(1, -1, 1, 1)
        return x

    def bottleneck(x: Tensor, name: str) -> Tensor:
        out = x
        for k in (0, 3, 6):
            out = norm(conv(out, f"{name}.layers.{k}"), f"{name}.layers.{k + 1}")
            out = out if k == 6 else F.relu(out)
        if f"{name}.shortcut.0.weight" in weights:
            x = norm(conv(x, f"{name}.shortcut.0"), f"{name}.shortcut.1")
        return F.relu(out + x)

    y = bottleneck(z[0], "bottlenecks.0")
    for i in (0, 1):
        down = F.relu(norm(conv(y, f"downs.{i}.0", stride=2), f"downs.{i}.1"))
        y = bottleneck(z[i + 1], f"bottlenecks.{i + 1}") + down
    y = F.relu(norm(conv(y, "final.0"), "final.1")).mean((2, 3))
    expected = y @ weights["final.5.weight"].T + weights["final.5.bias"]
    torch.testing.assert_close(head(tuple(z)), expected, rtol=1e-12, atol=1e-12)
    assert not any(key.startswith("bottlenecks.0.shortcut") for key in weights)  # 4 channels come and 4 x 1 go
    assert all(not layer.affine for layer in Bottleneck(4, 1).layers if isinstance(layer, nn.BatchNorm2d))


def test_independent_images() -> None:
    model = make_model(solver=eq.Broyden(max_steps=6, memory=6)).eval()
    images = make_images(batch=5)
    logits, solution = model.classify(images)
    for k in range(5):
        alone, single = model.classify(images[k : k + 1])
        torch.testing.assert_close(alone, logits[k : k + 1], rtol=1e-10, atol=1e-10)
        assert (single.num_steps[0], single.status[0]) == (solution.num_steps[k], solution.status[k])


@pytest.mark.parametrize("train", [False, True])
def test_implicit_gradients(train: bool) -> None:
    model = make_model(contractive=True, solver=TIGHT, gradient=eq.Implicit(solver=TIGHT)).train(train)
    images = make_images().requires_grad_()
    labels = torch.tensor([0, 1, 2, 0])
    gradients = []
    for solver, gradient in ((TIGHT, model.deq.gradient), (eq.Picard(max_steps=0), eq.Unrolled(steps=100))):
        torch.manual_seed(3)  # the same dropout masks
        with model.deq.using(solver=solver, gradient=gradient):
            logits, solution = model.classify(images)
        assert solver is not TIGHT or solution.converged.all()
        gradients.append(torch.autograd.grad(F.cross_entropy(logits, labels), [images, *model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("gradient", [eq.Implicit(), eq.Shine(), eq.JacobianFree(), eq.Phantom(), eq.Neumann()])
def test_all_gradients(gradient: eq.Gradient) -> None:
    model = make_model(solver=eq.Broyden(max_steps=4, memory=4), gradient=gradient)
    model(make_images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name  # type: ignore[union-attr]
        assert parameter.grad.any(), name  # type: ignore[union-attr]


def test_deep_copy() -> None:
    model = make_model().eval()
    images = make_images()
    expected = model(images)
    twin = copy.deepcopy(model)
    assert twin.deq.init.__self__ is twin.deq.cell  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(images), expected)


def test_autocast() -> None:
    torch.manual_seed(0)
    solver = eq.Anderson(max_steps=5)
    model = MDEQClassifier(TINY, solver=solver, gradient=eq.Implicit(solver=solver)).float()
    images = make_images().float()
    with torch.autocast("cpu", torch.bfloat16):
        logits, solution = model.classify(images)
        loss = F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert solution.residual.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name  # type: ignore[union-attr]
        assert parameter.grad.isfinite().all(), name  # type: ignore[union-attr]
