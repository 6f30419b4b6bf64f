"""Few-shot learner and its tasks: optimality, exact gradients, reproducible episodes, damaged files."""

import dataclasses
import io
import math
import os
import pathlib
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from toy import difference, directions

import equipoise as eq
from benchmarks.few_shot import letters
from equipoise.data import DataError
from equipoise.zoo import ADAPT, FewShotConfig, FewShotLearner, Omniglot
from equipoise.zoo.few_shot.model import FewShotCell
from equipoise.zoo.few_shot.omniglot import Episodes, read_alphabets

TIGHT = eq.Anderson(memory=20, max_steps=400, rtol=1e-9, ridge=1e-8)
SMALL = FewShotConfig(image_size=28, image_channels=1, channels=4, num_groups=2, width=5, context=3)
EXACT = dataclasses.replace(
    ADAPT, solver=TIGHT, gradient=eq.Implicit(solver=eq.GMRES(max_steps=300, rtol=0.0, atol=1e-11))
)


def learner() -> FewShotLearner:
    torch.manual_seed(3)
    model: FewShotLearner = SMALL.build(
        solver=eq.Anderson(max_steps=200, rtol=1e-12),
        gradient=eq.Implicit(solver=eq.GMRES(atol=1e-12, rtol=0.0)),
    )
    with torch.no_grad():
        model.decay.log_weight.copy_(torch.tensor([0.1, 0.3]).log())
        model.deq.cell.film.weight.mul_(5)
    return model


def task(tasks: int = 2, ways: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(5)
    images = torch.randn(tasks, 2 * ways, 1, 28, 28, generator=source)
    labels = torch.arange(ways).expand(tasks, -1)
    return images[:, :ways], labels, images[:, ways:], labels.flip(1)


def by_hand(model: FewShotLearner, images: Tensor, x: dict[str, Tensor]) -> Tensor:
    """Logits by two hundred applications of the formula."""
    u = model.stem(images.flatten(0, 1)).view(*images.shape[:2], -1)
    scale, shift = (x["context"] @ model.deq.cell.film.weight.T)[:, None].chunk(2, dim=-1)
    z = torch.zeros_like(u)
    for _ in range(200):
        z = torch.tanh((1 + scale) * (z @ model.deq.cell.state.weight.T) + u + shift)
    return torch.einsum("bnd,bkd->bnk", z, x["head"]) / math.sqrt(SMALL.width)


def test_stationary_point() -> None:
    model = learner()
    support, labels, queries, _ = task()
    found = model.adapt(support, labels, ways=3, optimizer=EXACT)
    assert bool(found.converged.all())
    x = {name: value.detach().requires_grad_() for name, value in found.value[2].items()}
    likelihood = by_hand(model, support, x).log_softmax(2).gather(2, labels[..., None]).sum()
    decay = 0.5 * (0.1 * x["context"].square().sum() + 0.3 * x["head"].square().sum())
    slopes = torch.autograd.grad(decay - likelihood, list(x.values()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-6
    assert min(float(value.detach().norm(dim=-1).min()) for value in x.values()) > 1e-3
    logits, _ = model.classify(queries, x)
    torch.testing.assert_close(logits, by_hand(model, queries, x), rtol=0, atol=1e-8)


def loss(model: FewShotLearner, **changes: Any) -> Tensor:
    support, labels, queries, wanted = task()
    found = model.adapt(support, labels, ways=3, optimizer=dataclasses.replace(EXACT, **changes))
    logits, _ = model.classify(queries, found.value[2])
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


@pytest.mark.parametrize("name", ["deq.cell.film.weight", "decay.log_weight", "stem.13.weight"])
def test_gradients(name: str) -> None:
    """The full gradient equals differences of the query loss, and that of first order does not."""
    model = learner()
    weights = [model.get_parameter(name)]
    (direction,) = along = directions(weights)
    slope = pytest.approx(difference(lambda: loss(model), weights, along, 1e-4), rel=1e-4, abs=1e-8)
    (exact,) = torch.autograd.grad(loss(model), weights)
    assert float((exact * direction).sum()) == slope
    blind = loss(model, gradient=eq.inputs.FirstOrder())
    (blind,) = torch.autograd.grad(blind, weights, materialize_grads=True)
    assert float((blind * direction).sum()) != slope


def test_order_of_classes() -> None:
    model = learner()
    support, labels, queries, _ = task()
    order = torch.tensor([2, 0, 1])
    one = model.classify(queries, model.adapt(support, labels, ways=3, optimizer=EXACT).value[2])[0]
    other = model.classify(queries, model.adapt(support, order[labels], ways=3, optimizer=EXACT).value[2])[0]
    torch.testing.assert_close(one, other[:, :, order], rtol=0, atol=1e-6)
    support, labels, queries, _ = task(tasks=1, ways=5)
    assert model.classify(queries, model.adapt(support, labels, ways=5).value[2])[0].shape == (1, 5, 5)


class SineCell(FewShotCell):
    """The few-shot map on numbers, whose task sets a context alone."""

    def forward(self, z: Tensor, context: Tensor, u: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z, {"context": context}, u)


class SineCost(nn.Linear):
    """Squared errors of the numbers that a head reads, which the context sets."""

    def forward(self, z: Tensor, context: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return ((z * super().forward(context)[:, None]).sum(2) - y).square().sum(1)


@pytest.mark.slow
def test_sinusoids() -> None:
    """Finn et al. (2017): amplitude in [0.1, 5], phase in [0, pi], inputs in [-5, 5]."""
    torch.set_default_dtype(torch.float32)
    source = torch.Generator().manual_seed(0)
    config = FewShotConfig(image_size=16, image_channels=1, width=40, context=8)
    stem, cell, cost = nn.Linear(1, 40), SineCell(config), SineCost(8, 40, bias=False)
    with torch.no_grad():
        stem.weight.mul_(2)
        stem.bias.mul_(3)
    parameters = [*stem.parameters(), *cell.parameters(), *cost.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)

    def errors(tasks: int) -> tuple[Tensor, Tensor]:
        amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, generator=source)
        phase = math.pi * torch.rand(tasks, 1, generator=source)
        x = 10 * torch.rand(tasks, 20, generator=source) - 5
        y = amplitude * torch.sin(x - phase)
        u = stem(x[..., None])
        zeros = torch.zeros(tasks, 8)
        found = eq.optimize_inputs(
            cell,
            z0=torch.zeros_like(u[:, :10]),
            x0=zeros,
            cost=cost,
            inputs=(u[:, :10],),
            targets=(y[:, :10],),
            regularizer=lambda context: 0.05 * context.square().sum(1),
            optimizer=eq.inputs.InputOptimizer(
                solver=eq.Anderson(memory=10, max_steps=40, rtol=1e-2, ridge=1e-3),
                step_size=0.02,
                gradient=eq.Implicit(solver=eq.GMRES(max_steps=30, rtol=0.0, atol=1e-2)),
                verify_solver=None,
            ),
        )
        z = [eq.fixed_point(cell, torch.zeros_like(u[:, 10:]), x, u[:, 10:]).value for x in (found.value[2], zeros)]
        adapted, unadapted = (
            cost(each, x, y[:, 10:]).mean() / 10 for each, x in zip(z, (found.value[2], zeros), strict=True)
        )
        return adapted, unadapted

    for _ in range(30):
        optimizer.zero_grad()
        errors(16)[0].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        adapted, unadapted = errors(100)
    assert float(adapted) < 0.25 * float(unadapted)
    assert float(unadapted) > 1.0


REAL = pathlib.Path(os.environ.get("EQUIPOISE_DATA") or pathlib.Path(__file__).parents[4] / "shared/data") / "omniglot"
NOTO = pathlib.Path("/usr/share/fonts/truetype/noto")
ALPHABETS = {"Greek": 3, "Latin": 4, "Tagalog": 3, "Balinese": 2}
PARTS = {"images_background_small1": ("Greek", "Latin", "Balinese"), "images_background_small2": ("Greek", "Tagalog")}
DRAWINGS = 4


def drawing(character: int, number: int) -> bytes:
    """A horizontal bar in the upper half, black on white; its place tells the character, its length the drawing."""
    paper, buffer = np.full((105, 105), 255, dtype=np.uint8), io.BytesIO()
    paper[4 + 12 * character : 8 + 12 * character, 4 : 40 + 15 * number] = 0
    Image.fromarray(paper).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def content() -> dict[str, dict[str, bytes]]:
    """Files of each zip file, by name."""
    parts = {
        part: {
            f"{part}/{name}/character{character + 1:02}/{character:04}_{number + 1:02}.png": drawing(character, number)
            for name in alphabets
            for character in range(ALPHABETS[name])
            for number in range(DRAWINGS)
        }
        for part, alphabets in PARTS.items()
    }
    parts["all_runs"] = runs = {}
    for run in (1, 2):
        test, training = f"run{run:02}/test/item", f"run{run:02}/training/class"
        for number in range(3):
            runs[f"{training}{number + 1:02}.png"] = drawing(number, 0)
            runs[f"{test}{number + 1:02}.png"] = drawing((number + run) % 3, 1)
        lines = [f"{test}{n + 1:02}.png {training}{(n + run) % 3 + 1:02}.png" for n in range(3)]
        runs[f"run{run:02}/class_labels.txt"] = "\n".join(lines).encode()
    return parts


def zipped(folder: pathlib.Path, part: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    for part, files in content().items():
        zipped(tmp_path, part, files)
    return tmp_path


def source(root: pathlib.Path | None, **changes: Any) -> Omniglot:
    base = Omniglot(ways=2, shots=1, queries=2, tasks=6, held_out_tasks=4, test_alphabets=("Tagalog",))
    return dataclasses.replace(base, root=None if root is None else str(root), **changes)


def one_shot(root: pathlib.Path) -> tuple[Tensor, Tensor]:
    (batch,) = source(root).one_shot_runs().batches(2)
    return batch


def test_alphabets(root: pathlib.Path) -> None:
    """One that is in both files counts once; ink is bright."""
    known = read_alphabets(root, "images_background")
    assert {name: len(characters) for name, characters in known.items()} == ALPHABETS
    images = known["Latin"]["character03"]
    assert (images.shape, images.dtype) == ((DRAWINGS, 1, 28, 28), torch.uint8)
    assert int(images[0, 0, 8, 3]) > 100  # of the bar at pixels 28 to 32 of 105, from the left
    assert not images[:, 0, 14:].any()
    assert int((images[3] > 80).sum()) > int((images[0] > 80).sum())


@pytest.mark.parametrize("layout", ["parts", "alphabets"])
def test_folders(root: pathlib.Path, tmp_path: pathlib.Path, layout: str) -> None:
    """They are read like the zip files."""
    folder = tmp_path / "unpacked"
    for part, files in content().items():
        for name, data in files.items():
            inside = f"{part}/{name}" if part == "all_runs" else name
            path = folder / (inside.split("/", 1)[1] if layout == "alphabets" and part != "all_runs" else inside)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    packed, unpacked = (read_alphabets(place, "images_background") for place in (root, folder))
    assert packed.keys() == unpacked.keys() - {"run01", "run02"}
    for name, characters in packed.items():
        torch.testing.assert_close(unpacked[name], characters, rtol=0, atol=0)
    torch.testing.assert_close(one_shot(folder), one_shot(root), rtol=0, atol=0)


def test_held_out_alphabets(root: pathlib.Path) -> None:
    splits = source(root).load()
    parts = [(len(split.classes), len(split), split.rotate) for split in (splits.train, splits.validation, splits.test)]
    assert parts == [(7, 6, True), (2, 4, False), (3, 4, False)]
    assert source(root, validation_alphabets=()).load().validation is None


def numbered(classes: int = 5, images: int = 8) -> list[Tensor]:
    """Classes of images whose pixels hold their class and their number, with a corner that shows how they lie."""
    found = torch.zeros(classes, images, 1, 4, 4, dtype=torch.uint8)
    found[..., 0, 0, 1] = torch.arange(1, classes + 1, dtype=torch.uint8)[:, None]
    found[..., 0, 1, 1] = torch.arange(1, images + 1, dtype=torch.uint8)
    return list(found)


def test_tasks() -> None:
    """Each has new labels, and no image twice."""
    ((images, labels),) = Episodes(numbered(), tasks=20, ways=3, shots=2, queries=3).batches(20)
    assert images.shape == (20, 15, 1, 4, 4)
    assert labels.tolist() == [[0, 0, 1, 1, 2, 2, *[0] * 3, *[1] * 3, *[2] * 3]] * 20
    classes, numbers = images[:, :, 0, 0, 1], images[:, :, 0, 1, 1]
    for task in range(20):
        names = {(label, name) for label, name in zip(labels[task].tolist(), classes[task].tolist(), strict=True)}
        assert len(names) == len({name for _, name in names}) == 3
        assert len(set(zip(classes[task].tolist(), numbers[task].tolist(), strict=True))) == 15
    assert len({tuple(row) for row in classes.tolist()}) > 10


def test_rotations() -> None:
    """Training turns a class of a task as a whole."""
    ((images, labels),) = Episodes(numbered(), tasks=30, ways=2, shots=1, queries=2, rotate=True).batches(30)
    turned = (images[:, :, 0].flatten(2) > 0).to(torch.uint8)
    patterns = [turned[task][labels[task] == label].unique(dim=0) for task in range(30) for label in range(2)]
    assert {len(pattern) for pattern in patterns} == {1}
    assert len(torch.cat(patterns).unique(dim=0)) == 4


def test_reproducible_tasks() -> None:
    """A task depends on its place alone."""
    split = Episodes(numbered(), tasks=10, ways=2, shots=1, queries=1, rotate=True)

    def images(*place: Any, **options: int) -> Tensor:
        return torch.cat([images for images, _ in split.batches(*place, **options)])

    whole = images(5, shuffle=(3, 1))
    assert torch.equal(whole[5:], images(5, shuffle=(3, 1), start=1))
    ranks = [images(2, shuffle=(3, 1), rank=r, world_size=2) for r in (0, 1)]
    assert torch.equal(whole, torch.stack(ranks, 1).flatten(0, 1))
    assert not torch.equal(whole, images(5, shuffle=(3, 2)))
    assert torch.equal(images(10), images(10))


def test_one_shot_runs(root: pathlib.Path) -> None:
    images, labels = one_shot(root)
    assert images.shape == (2, 6, 1, 28, 28)
    assert labels.tolist() == [[0, 1, 2, 1, 2, 0], [0, 1, 2, 2, 0, 1]]
    rows = images[:, :, 0].float().sum(3).argmax(2)  # of the bars
    assert torch.equal(rows[:, 3:], rows.gather(1, labels[:, 3:]))


@pytest.mark.parametrize(
    ("part", "name", "data", "message"),
    [
        (
            "images_background_small1",
            "Latin/character01/0000_02.png",
            drawing(0, 0)[:60],
            r"images_background_small1\.zip: .*0000_02\.png is a damaged image",
        ),
        ("all_runs", "run02/class_labels.txt", b"only-one-word\n", r"run02/class_labels\.txt is damaged"),
        (
            "all_runs",
            "run02/class_labels.txt",
            b"run02/test/none.png run02/training/class01.png\n",
            r"run02/test/none\.png cannot be read",
        ),
        ("images_background_small1", None, b"PK no zip file", r"small1\.zip is no zip file, or damaged"),
    ],
)
def test_damage(part: str, name: str | None, data: bytes, message: str, root: pathlib.Path) -> None:
    if name is None:
        (root / f"{part}.zip").write_bytes(data)
    else:
        zipped(root, part, content()[part] | {name if part == "all_runs" else f"{part}/{name}": data})
    with pytest.raises(DataError, match=message):
        one_shot(root) if part == "all_runs" else source(root).load()


def test_missing_files(root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    with pytest.raises(DataError, match=r"no Omniglot in \$EQUIPOISE_DATA/omniglot"):
        Omniglot().load()
    empty, folder = tmp_path / "empty", tmp_path / "data"
    empty.mkdir()
    folder.mkdir()
    (folder / "omniglot").symlink_to(root)
    monkeypatch.setenv("EQUIPOISE_DATA", str(folder))
    assert len(source(None).load().test) == 4
    for load, message in (
        (source(tmp_path / "nowhere").load, r"no Omniglot in .*nowhere: fetch .*--data.root"),
        (source(empty).load, "has no images_background"),
        (source(empty).one_shot_runs, r"has no all_runs\.zip"),
        (
            source(None, test_alphabets=("Klingon",)).load,
            r"no alphabet 'Klingon', but Balinese, Greek, Latin, Tagalog",
        ),
        (source(None, ways=3).load, r"2 classes of at least 4 images do not give tasks of 3 ways"),
    ):
        with pytest.raises(DataError, match=message):
            load()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="Omniglot is not at hand")
def test_real_omniglot() -> None:
    known = read_alphabets(REAL, "images_background")
    assert {name: len(characters) for name, characters in known.items()} == {
        "Balinese": 24,
        "Early_Aramaic": 22,
        "Greek": 24,
        "Japanese_(katakana)": 47,
        "Korean": 40,
        "Latin": 26,
        "Sanskrit": 42,
        "Tagalog": 17,
    }
    assert {len(images) for characters in known.values() for images in characters.values()} == {20}
    ((images, labels),) = Omniglot(root=str(REAL)).one_shot_runs().batches(20)
    assert images.shape == (20, 40, 1, 28, 28)
    assert all(sorted(row[20:].tolist()) == list(range(20)) for row in labels)
    assert 0.03 < float(images.double().mean() / 255) < 0.2


@pytest.mark.slow
@pytest.mark.skipif(not NOTO.is_dir(), reason="Debian's fonts-noto-core is not installed")
def test_letters(tmp_path: pathlib.Path) -> None:
    """Of fonts, without the scripts that are for evaluation."""
    for name in ("NotoSansArmenian-Regular", "NotoSansTibetan-Regular", "NotoSerifTibetan-Regular", "NotoSans-Italic"):
        if (NOTO / f"{name}.ttf").exists():
            (tmp_path / f"{name}.ttf").symlink_to(NOTO / f"{name}.ttf")
    first, again = letters.render(tmp_path, 28), letters.render(tmp_path, 28)
    assert letters.PER_SCRIPT <= len(first) <= 2 * letters.PER_SCRIPT  # Armenian, and perhaps a few Latin letters
    assert {tuple(images.shape) for images in first} == {(20, 1, 28, 28)}
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert all(len(images.flatten(1).unique(dim=0)) > 15 for images in first)  # each is drawn otherwise


def test_bad_fonts(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"has no fonts .* fonts-noto-core, or name another folder"):
        letters.render(tmp_path, 28)
    (tmp_path / "broken.ttf").write_bytes(b"no font at all")
    with pytest.raises(DataError, match=r"broken\.ttf is a damaged font"):
        letters.render(tmp_path, 28)
