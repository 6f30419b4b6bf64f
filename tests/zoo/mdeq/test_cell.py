"""The MDEQ's configuration, map and stem."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq
from equipoise.zoo import MDEQCell, MDEQConfig
from equipoise.zoo.mdeq import MDEQStem

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
    expected = plain_cell(cell.state_dict(), config, z, u)
    torch.testing.assert_close(cell(z, u), expected, rtol=1e-12, atol=1e-12)


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


def test_batch_independence() -> None:
    cell = make_cell().train()
    z, u = make_state(SMALL, batch=4)
    together = cell(z, u)
    for k in range(4):
        alone = cell(tuple(level[k : k + 1] for level in z), u[k : k + 1])
        torch.testing.assert_close(alone, tuple(level[k : k + 1] for level in together), rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 10}, "image_size must be a multiple of 4, got 10"),
        ({"image_size": 28, "num_downsamplings": 1}, "multiple of 8, got 28"),
        ({"image_size": 0}, "image_size=0: must be >= 1"),
        ({"num_classes": 0}, "num_classes=0: must be >= 1"),
        ({"num_downsamplings": -1}, "num_downsamplings=-1: must be >= 0"),
        ({"dropout": 1.0}, r"dropout=1.0: must be >= 0 and < 1"),
        ({"channels": ()}, "channels is empty"),
        ({"channels": (4, 8, 11)}, r"channels must be multiples of num_groups 2, got \(4, 8, 11\)"),
        ({"num_groups": 1}, "num_groups must be even"),
        ({"head_channels": (2, 2)}, "head_channels .* one entry per level"),
        ({"head_channels": (2, 2, 0)}, r"head_channels=\(2, 2, 0\): must be >= 1"),
    ],
)
def test_refusals(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]


def test_values() -> None:
    """Configurations are values."""
    listed = dataclasses.replace(SMALL, channels=[4, 8, 12], head_channels=[2, 2, 3])  # type: ignore[arg-type]
    assert (listed, hash(listed)) == (SMALL, hash(SMALL))
    assert MDEQConfig(**dataclasses.asdict(SMALL)) == copy.deepcopy(SMALL) == SMALL
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.dropout = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        MDEQConfig(32, 10)  # type: ignore[misc]
