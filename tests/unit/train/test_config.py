"""Configurations: written and read without loss, checked with messages that help, and all that a run depends on."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from toy import CLASSES, FULL, PLAIN, Toy, read_config

import equipoise as eq
from equipoise import zoo
from equipoise.data import Digits, FashionMNIST, HubImages
from equipoise.train import SGD, Adam, AdamW, LRSchedule, Pretraining, RunError, TrainConfig, fit
from equipoise.train.run_folder import config_yaml, write_config
from equipoise.train.serialize import from_plain, to_plain
from equipoise.zoo import Classify, JacobianPenalty
from equipoise.zoo.files import overlay

VARIANTS = {
    **{name: make() for name, make in zoo.RECIPES.items()},
    "toy": FULL,
    "nested": dataclasses.replace(
        PLAIN,
        solver=eq.Anderson(memory=3, rtol=1e-12),
        gradient=eq.Implicit(solver=eq.Broyden(max_steps=3), start=eq.JacobianFree()),
        eval_solver=eq.SteadyState(max_steps=9),
        optimizer=AdamW(betas=(0.5, 0.75), lr=1e-7),
        name="Größe: null # '\"",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_yaml_round_trip(name: str, tmp_path: pathlib.Path) -> None:
    config, file = VARIANTS[name], tmp_path / "config.yaml"
    write_config(config, file)
    found = read_config(file)
    assert (found, hash(found), config_yaml(found)) == (config, hash(config), config_yaml(config))
    assert list(tmp_path.iterdir()) == [file]


def names(config: object) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", zoo.RECIPES)
def test_recipe_files(name: str) -> None:
    """A file holds every field."""
    config = zoo.RECIPES[name]()
    assert config.name == name
    plain = yaml.safe_load(config_yaml(config))
    assert list(plain) == ["version", *names(config)]
    for part, package in (("model", ".zoo"), ("solver", ""), ("optimizer", ".train")):
        value = getattr(config, part)
        assert plain[part]["class_path"] == f"equipoise{package}.{type(value).__name__}"
        assert sorted(plain[part]["init_args"]) == sorted(names(value))


@pytest.mark.slow
def test_reproduction(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(FULL, checkpoint_every=None, epochs=1)
    first = fit(config, run_dir=tmp_path / "first")
    torch.manual_seed(99)
    second = fit(read_config(tmp_path / "first" / "config.yaml"), run_dir=tmp_path / "second")
    other = fit(dataclasses.replace(config, seed=1), run_dir=tmp_path / "third")
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)
    assert not torch.equal(other.model.head.final[0].weight, first.model.head.final[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_callers_settings(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    torch.set_default_dtype(dtype)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = fit(dataclasses.replace(PLAIN, stop_after=1), run_dir=tmp_path)
    assert {value.dtype for value in result.model.parameters()} == {torch.float32}
    assert torch.get_default_dtype() == dtype
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(epoch=3), "unknown key 'epoch'; did you mean 'epochs'?"),
        (lambda c: c.update(zzz=3), "unknown key 'zzz'; known: accelerator, "),
        (
            lambda c: c["model"]["init_args"].update(chanels=[4]),
            "unknown key 'model.chanels'; did you mean 'channels'?",
        ),
        (
            lambda c: c["solver"]["init_args"].update(max_step=3),
            "unknown key 'solver.max_step'; did you mean 'max_steps'?",
        ),
        (lambda c: c["schedule"].update(warmup=3), "unknown key 'schedule.warmup'; did you mean 'warmup_steps'?"),
        (
            lambda c: c["solver"].update(class_path="equipoise.Broyde"),
            "solver: unknown class 'equipoise.Broyde'; did you mean 'Broyden'?",
        ),
        (lambda c: c["gradient"].update(class_path="subprocess.Popen"), "gradient: unknown class 'subprocess.Popen'"),
        (lambda c: c["gradient"].update(class_path="equipoise.Broyden"), "unknown class 'equipoise.Broyden'"),
        (lambda c: c["gradient"].update(class_path="os.Shine"), "unknown class 'os.Shine'"),
        (lambda c: c["optimizer"].pop("class_path"), "optimizer must have the keys class_path and init_args"),
        (lambda c: c.pop("model"), "model is missing"),
        (lambda c: c.update(epochs="many"), "epochs must be int, got 'many'"),
        (lambda c: c.update(epochs=True), "epochs must be int, got True"),
        (lambda c: c.update(epochs=1.5), "epochs must be int, got 1.5"),
        (lambda c: c.update(clip_norm="much"), "clip_norm must be float, got 'much'"),
        (lambda c: c.update(channels_last="yes"), "channels_last must be bool, got 'yes'"),
        (lambda c: c.update(precision="16-true"), "precision is '16-true'; choose one of '32-true', 'bf16-mixed'"),
        (lambda c: c["optimizer"]["init_args"].update(betas=[0.9]), "optimizer.betas must have 2 entries"),
        (lambda c: c["model"]["init_args"].update(channels=[4, "x"]), "model.channels[1] must be int, got 'x'"),
        (lambda c: c.update(model=[]), "model must hold the fields of ModelConfig, got []"),
        (lambda c: c.update(epochs=0), "epochs=0): must be >= 1"),
        (
            lambda c: c["gradient"].update(class_path="equipoise.Implicit", init_args={"observe": "print"}),
            "gradient.observe cannot be given in a file",
        ),
    ],
)
def test_wrong_files(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: pathlib.Path) -> None:
    plain, path = to_plain(FULL), tmp_path / "config.yaml"
    change(plain)
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(RunError) as raised:
        read_config(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs: [1", "is not valid YAML"),
        (b"\xff\xfe\xfa", "is not valid YAML"),
        (b"", "must hold the fields of a configuration, got NoneType"),
        (b"- 1", "must hold the fields of a configuration, got list"),
        (b"epochs: !!python/object/apply:os.system ['touch exploded']", "is not valid YAML"),
        (None, "cannot read the configuration .*: No such file or directory"),
    ],
)
def test_unreadable_files(
    content: bytes | None, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_config(tmp_path / "config.yaml")
    assert not (tmp_path / "exploded").exists()


def test_overlay(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "epochs: 3\nmodel: {dropout: 0}\noptimizer: {class_path: equipoise.train.Adam, init_args: {lr: 1e-2}}\n"
        "gradient: {class_path: Implicit}\n"
    )
    base = zoo.mdeq_digits()
    assert read_config(path, base) == dataclasses.replace(
        base,
        epochs=3,
        model=dataclasses.replace(base.model, dropout=0.0),
        optimizer=dataclasses.replace(base.optimizer, lr=0.01),
        gradient=eq.Implicit(),
    )
    below = {"solver": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}
    same = {"solver": {"class_path": "A", "init_args": {"x": 3}}}
    other = {"solver": {"class_path": "B", "init_args": {"x": 3}}}
    assert overlay(below, same) == {"solver": {"class_path": "A", "init_args": {"x": 3, "y": 2}}}
    assert overlay(below, other) == other
    assert overlay(below, {"solver": {"x": 3}}) == overlay(below, same)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(PLAIN, epochs=0), r"epochs=0\): must be >= 1"),
        (lambda: dataclasses.replace(PLAIN, stop_after=0), r"stop_after=0\): must be >= 1, or None"),
        (lambda: Classify(label_smoothing=1.0), r"label_smoothing=1.0: must be >= 0 and < 1"),
        (lambda: dataclasses.replace(PLAIN, clip_norm=0.0), r"clip_norm=0.0\): must be > 0, or None for no clipping"),
        (lambda: dataclasses.replace(PLAIN, clip_norm=float("nan")), r"clip_norm=nan\): must be > 0"),
        (lambda: dataclasses.replace(PLAIN, ema_decay=1.0), r"ema_decay=1.0\): must be >= 0 and < 1, or None"),
        (lambda: dataclasses.replace(PLAIN, solver=eq.Anderson()), "Anderson keeps none; use the solver Broyden"),
        (
            lambda: dataclasses.replace(PLAIN, data=Digits()),
            r"images of shape \(1, 8, 8\), the model takes \(1, 4, 4\)",
        ),
        (lambda: Adam(lr=0.0), "optimizer.lr=0.0: must be > 0"),
        (lambda: SGD(weight_decay=-1.0), "optimizer.weight_decay=-1.0: must be >= 0"),
        (lambda: LRSchedule(warmup_steps=-1), "schedule.warmup_steps=-1: must be >= 0"),
        (lambda: LRSchedule(final_lr=-1.0), "schedule.final_lr=-1.0: must be >= 0"),
        (lambda: Pretraining(depth=0), "depth=0: must be >= 1"),
        (lambda: JacobianPenalty(weight=-1.0), "penalty.weight=-1.0: must be >= 0"),
        (lambda: JacobianPenalty(probability=1.5), r"penalty.probability=1.5: must be >= 0 and <= 1"),
        (lambda: JacobianPenalty(num_probes=0), "num_probes=0"),
        (lambda: Toy(validation_fraction=1.0), r"data.validation_fraction=1.0: must be >= 0 and < 1"),
        (lambda: Toy(crop_padding=-1), "data.crop_padding=-1: must be >= 0"),
        (lambda: FashionMNIST(mean=(0.1, 0.2, 0.3)), "need 1 entries, one per channel"),
        (lambda: FashionMNIST(std=(0.0,)), "standard deviations > 0"),
        (lambda: HubImages(source="x", image_size=8, streaming=True), "data.in_memory=true excludes data.streaming"),
        (
            lambda: HubImages(source="x", image_size=8, streaming=True, in_memory=False, validation_fraction=0.1),
            "data.validation_fraction needs data.streaming=false",
        ),
        (lambda: HubImages(source="x", image_size=8, resize=7), "data.resize=7: must be at least data.image_size=8"),
    ],
)
def test_ranges(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_lists() -> None:
    found = from_plain(TrainConfig, to_plain(dataclasses.replace(FULL, data=Toy(mean=[0.4], std=[0.3]))), CLASSES)
    assert found.data == Toy()
    assert isinstance(found.data.mean, tuple)


@pytest.mark.parametrize("warmup", [0, 7])
def test_schedule(warmup: int) -> None:
    peak, total = 0.3, 40
    schedule = LRSchedule(warmup_steps=warmup, final_lr=0.01)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=0.01)
    expected = [peak * (k + 1) / warmup for k in range(warmup)]
    for _ in range(total - warmup + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [schedule.lr(k, total, peak) for k in range(total + 1)] == pytest.approx(expected, rel=1e-10)
    assert schedule.lr(total, total, peak) == pytest.approx(0.01)
    assert LRSchedule(warmup_steps=50).lr(30, 40, peak) == pytest.approx(peak * 31 / 50)
