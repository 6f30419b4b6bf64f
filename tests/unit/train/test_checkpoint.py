"""Saved files: exact, complete, written at once or not at all, refused when damaged, and never run."""

import builtins
import dataclasses
import errno
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import stat
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toy import MODEL, PLAIN, Bomb

import equipoise as eq
from equipoise import files, train
from equipoise.train import SGD, Adam, AdamW, CheckpointError, Optimizer, RunError, checkpoint, fit
from equipoise.train.loop import Average
from equipoise.zoo import CLASSES, MDEQClassifier, MDEQConfig
from equipoise.zoo.files import folder_config, load

FILES = pathlib.Path(__file__).with_name("files")


def make_model(**options: Any) -> MDEQClassifier:
    model = MDEQClassifier(MODEL, **options)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0)
    return model


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    train.save(make_model(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        (eq.Anderson(memory=3, rtol=1e-5), eq.JacobianFree()),
        (
            eq.Broyden(max_steps=7, memory=7),
            eq.Implicit(solver=eq.Broyden(max_steps=3), start=eq.Shine(fallback_ratio=2.0)),
        ),
        (eq.Picard(max_steps=4, lipschitz=0.5), eq.Phantom(steps=2, damping=0.25)),
    ],
    ids=["Anderson", "Broyden", "Picard"],
)
def test_round_trip(solver: eq.Solver, gradient: eq.Gradient, dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    model = make_model(solver=solver, gradient=gradient).to(dtype).train()
    about = {"classes": ["one", "zwei", "три"], "note": None}
    checkpoint.save(model, tmp_path / "model", about=about)
    assert model.training
    loaded = load(tmp_path / "model")
    assert not loaded.training
    assert (loaded.config, loaded.deq.solver, loaded.deq.gradient) == (MODEL, solver, gradient)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert checkpoint.describe(tmp_path / "model")["about"] == about


def test_python_fields(tmp_path: pathlib.Path) -> None:
    train.save(make_model(gradient=eq.Implicit(observe=print)), tmp_path / "model")
    assert load(tmp_path / "model").deq.gradient == eq.Implicit()
    aware = eq.LBFGS(outer_every=3, outer_loss=lambda z, rows: z[0].flatten(1).sum(1))
    train.save(make_model(solver=aware, gradient=eq.Implicit()), tmp_path / "model")
    assert load(tmp_path / "model").deq.solver == eq.LBFGS(outer_every=3)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Told(eq.Picard):
        choice: Any = None

    for value, kind in ((print, "builtin_function_or_method"), (torch.zeros(2), "tensor"), ({1}, "set")):
        with pytest.raises(ValueError, match=kind):
            train.save(make_model(solver=Told(choice=value)), tmp_path / "other")
    with pytest.raises(ValueError, match=r"cannot save a Linear: its `config` is no ModelConfig that builds it"):
        train.save(nn.Linear(2, 2), tmp_path / "other")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


DAMAGED_BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "truncated, damaged or no safetensors file"),
    "cut in the header": (lambda raw: raw[:200], "truncated, damaged"),
    "cut by a byte": (lambda raw: raw[:-1], "truncated, damaged"),
    "longer by a byte": (lambda raw: raw + b"\0", "truncated, damaged"),
    "a bit flipped": (lambda raw: raw[:-3] + b"\x01" + raw[-2:], "checksum is wrong"),
    "text": (lambda raw: b"hello, world, this is not a model", "pickled checkpoints are never read"),
}
DAMAGED_FACTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of a run": (lambda f: f.update(kind="state"), "is no saved model but 'state'"),
    "unknown class": (
        lambda f: f["config"].update(class_path="MDEQConfg"),
        "unknown class 'MDEQConfg'; did you mean 'MDEQConfig'",
    ),
    "class that is no name": (lambda f: f["config"].update(class_path=[]), "does not describe"),
    "without a solver": (lambda f: f.pop("solver"), "solver"),
    "unknown solver": (
        lambda f: f["solver"].update(class_path="os.system"),
        "unknown class 'os.system'; known: AdjointBroyden, Anderson",
    ),
    "unknown field": (
        lambda f: f["config"]["init_args"].update(chanels=[8, 8]),
        "unknown key 'model.chanels'; did you mean 'channels'",
    ),
    "field out of range": (
        lambda f: f["config"]["init_args"].update(expansion=0),
        "model.expansion=0: must be >= 1",
    ),
    "other shape": (lambda f: f["config"]["init_args"].update(num_classes=4), "size mismatch"),
}


@pytest.mark.parametrize("damage", [*DAMAGED_BYTES, *DAMAGED_FACTS])
@pytest.mark.slow
def test_damage(damage: str, saved: pathlib.Path) -> None:
    if damage in DAMAGED_BYTES:
        cut, reason = DAMAGED_BYTES[damage]
        saved.write_bytes(cut(saved.read_bytes()))
    else:
        change, reason = DAMAGED_FACTS[damage]
        tensors, facts = files.read_tensors(saved)
        change(facts)
        files.write_tensors(saved, tensors, facts)
    with pytest.raises(CheckpointError, match=f"(?s){re.escape(str(saved))}.*{re.escape(reason)}"):
        load(saved)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "was not written by equipoise"),
        ({"equipoise": "{"}, "its configuration cannot be read"),
        ({"equipoise": "[" * 100_000}, "its configuration cannot be read"),
        ({"equipoise": "[1]"}, "its configuration is not a mapping"),
        ({"equipoise": "{}"}, "its checksum is wrong"),
    ],
)
def test_foreign_tensors(metadata: dict[str, str] | None, reason: str, tmp_path: pathlib.Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign", metadata)
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "foreign")


def test_determinism(saved: pathlib.Path) -> None:
    before = saved.read_bytes()
    for _ in range(8):  # random order would be seen with a chance of 1 - 2^-8
        files.write_tensors(saved, *files.read_tensors(saved))
        assert saved.read_bytes() == before


def test_missing_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing.* does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"is not a file"):
        load(tmp_path)


@pytest.mark.parametrize("archive", [False, True], ids=["pickle", "torch.save"])
def test_pickles(archive: bool, tmp_path: pathlib.Path) -> None:
    path, bomb = tmp_path / "model.safetensors", Bomb(tmp_path / "exploded")
    torch.save(bomb, path) if archive else path.write_bytes(pickle.dumps(bomb))
    for read in (load, checkpoint.describe):
        with pytest.raises(CheckpointError, match="pickled checkpoints are never read"):
            read(path)
    assert not (tmp_path / "exploded").exists()
    if not archive:
        pickle.loads(path.read_bytes()).close()
        assert (tmp_path / "exploded").exists()  # it would have gone off


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
@pytest.mark.slow
def test_failed_write(moment: str, saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    if moment == "write":

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                super().write(bytes(data)[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(builtins, "open", lambda path, mode: Full(path, mode))
    else:
        monkeypatch.setattr(os, moment, no_space)
    with pytest.raises(OSError, match="No space left on device"):
        train.save(make_model(solver=eq.Picard()), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    train.save(make_model(solver=eq.Picard()), saved)
    assert load(saved).deq.solver == eq.Picard()


def test_atomic_write(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "file", []
    synced, replaced = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        about = os.fstat(descriptor)
        events.append(("folder" if stat.S_ISDIR(about.st_mode) else "content", path.exists(), about.st_size))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replaced(*paths)))
    files.write_atomic(path, b"x" * 12345)
    assert events[:2] == [("content", False, 12345), "replace"]
    assert events[2][:2] == ("folder", True)
    assert path.read_bytes() == b"x" * 12345


@pytest.mark.slow
def test_run_on_full_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"File exists.*file|Not a directory.*file"):
        fit(PLAIN, run_dir=tmp_path / "file")
    with pytest.raises(OSError, match=r"Not a directory"):
        train.save(make_model(), tmp_path / "file" / "model")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        fit(PLAIN, run_dir=tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    "optimizer",
    [Adam(weight_decay=0.1), AdamW(weight_decay=0.1), SGD(lr=0.1), SGD(lr=0.1, momentum=0.0)],
    ids=["Adam", "AdamW", "momentum", "plain"],
)
def test_optimizer(optimizer: Optimizer, tmp_path: pathlib.Path) -> None:
    gradients = torch.randn(8, 3, 4)
    one, two = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    first, second = optimizer.build([one]), optimizer.build([two])
    for number, gradient in enumerate(gradients):
        one.grad, two.grad = gradient, gradient.clone()
        first.step()
        second.step()
        if number in (2, 5):
            tensors, facts = checkpoint.pack_optimizer(second)
            files.write_tensors(tmp_path / "state", tensors, {"optimizer": json.loads(json.dumps(facts))})
            second = optimizer.build([two])
            checkpoint.unpack_optimizer(second, checkpoint.State(*files.read_tensors(tmp_path / "state")))
        assert torch.equal(one, two)
    assert not torch.equal(one, torch.ones(3, 4))


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_moving_average(decay: float) -> None:
    module, steps = nn.BatchNorm1d(2), 30
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(steps + 1, 2)))
    module.weight.data.copy_(values[0])
    average = Average(module, decay)
    for step in range(steps):
        module.weight.data.copy_(values[step + 1])
        module.num_batches_tracked.fill_(10 + step)
        average.update(module, step)
    kept = np.minimum(decay, (1 + np.arange(steps)) / (10 + np.arange(steps)))
    shares = np.append(1.0, 1 - kept) * np.append(np.cumprod(kept[::-1])[::-1], 1.0)
    assert shares.sum() == pytest.approx(1.0, abs=1e-12)
    mean = torch.from_numpy(shares) @ values
    assert int(average.values["num_batches_tracked"]) == 10 + steps - 1
    for expected in ((values[-1], mean), (mean, values[-1])):
        torch.testing.assert_close((module.weight.detach(), average.values["weight"]), expected, rtol=1e-12, atol=0)
        average.swap(module)
    torch.testing.assert_close(module.weight.detach(), values[-1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mdeq", "lipschitz"])
def test_models_of_0_1(name: str) -> None:
    path = FILES / f"{name}-0.1.0.safetensors"
    images = torch.linspace(-1, 1, 32, dtype=torch.float32).view(2, 1, 4, 4)
    with torch.no_grad():
        logits = load(path)(images)
    assert torch.equal(logits, torch.tensor(checkpoint.describe(path)["about"]["logits"], dtype=torch.float32))


@pytest.mark.slow
def test_files_of_0_1_alone(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"unknown key 'solver\.guard'; .* Equipoise 0\.1\.0 wrote it; that vers"):
        load(FILES / "broyden-0.1.0.safetensors")
    shutil.copy(FILES / "config-0.1.0.yaml", tmp_path / "config.yaml")
    reads = r"unknown key 'pretraining'; .* Equipoise 0\.1\.0 wrote it; that version reads it$"
    with pytest.raises(RunError, match=reads):
        folder_config(tmp_path)
    with pytest.raises(RunError, match=r"Equipoise 0\.1\.0 wrote it; that version reads it$"):
        fit(PLAIN, run_dir=tmp_path, resume=True)


def test_given_classes(saved: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"unknown class 'equipoise\.zoo\.MDEQConfig'; did you mean 'Dense"):
        load(saved, classes=[cls for cls in CLASSES if cls is not MDEQConfig])

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(MDEQConfig):
        pass

    model = Own(**vars(MODEL)).build()
    train.save(model, saved)
    with pytest.raises(CheckpointError, match=r"unknown class '.*train\.test_checkpoint\.Own'; known: .*MDEQConfig"):
        load(saved)
    assert load(saved, classes=(*CLASSES, Own)).config == model.config
