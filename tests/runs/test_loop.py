"""The training loop against one written by hand, its objective, its logs and files, and runs that go wrong."""

import dataclasses
import json
import math
import pathlib
import platform
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import FULL, MODEL, PLAIN, Interrupt, Run, Toy, read_config, timeless

import equipoise as eq
from equipoise.data import derive_seed, generator
from equipoise.nn import jacobian_penalty
from equipoise.train import (
    SGD,
    NonFiniteLoss,
    Objective,
    Observer,
    StepInfo,
    checkpoint,
    evaluate,
    fit,
)
from equipoise.train.run_folder import read_lines
from equipoise.train.task import COMMON
from equipoise.zoo import Classify, JacobianPenalty, MDEQClassifier
from equipoise.zoo.files import load

pytestmark = pytest.mark.slow  # each test trains: together they take too long for the fast set


def test_loop_by_hand(tmp_path: pathlib.Path) -> None:
    """Order, crops, dropout, smoothing, penalty, clipping, schedule and average, all from their formulas."""
    config = dataclasses.replace(
        FULL,
        data=Toy(crop_padding=1),
        solver=eq.Broyden(max_steps=4, memory=4),
        optimizer=SGD(lr=0.2, momentum=0.9, nesterov=False, weight_decay=0.01),
        clip_norm=3.0,
        precision="64-true",
        checkpoint_every=None,
    )
    total, warmup, peak, final = 8, 3, 0.2, 1e-4
    split = config.data.load().train
    torch.manual_seed(derive_seed(0))
    torch.set_default_dtype(torch.float32)  # weights are drawn in single precision
    model = MDEQClassifier(MODEL, solver=config.solver, gradient=config.gradient).double()
    torch.set_default_dtype(torch.float64)
    mean, std = torch.tensor([0.4, 0.3], dtype=torch.float32)  # what is read is in single precision
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    average = {name: value.clone() for name, value in model.state_dict().items()}
    norms, penalized = [], 0
    for step in range(total):
        epoch, batch = divmod(step, 4)
        rows = torch.randperm(36, generator=generator(0, epoch))[8 * batch : 8 * batch + 8]
        corner = torch.randint(3, (2, 8), generator=generator(0, step, 0, 4))
        padded = nn.functional.pad(split.images[rows], (1, 1, 1, 1))  # type: ignore[attr-defined]
        images = torch.stack([p[:, y : y + 4, x : x + 4] for p, y, x in zip(padded, *corner.tolist(), strict=True)])
        labels = split.labels[rows]  # type: ignore[attr-defined]
        torch.manual_seed(derive_seed(0, step, 0, 3))
        early = {"solver": eq.Picard(max_steps=0), "gradient": eq.Unrolled(steps=2)} if step < 2 else {}
        with model.deq.using(**early):
            logits, solution = model.classify(((images.float() / 255 - mean) / std).double())
        log_p = logits.log_softmax(1)
        loss = -(0.9 * log_p[range(8), labels] + 0.1 * log_p.mean(1)).mean()
        if derive_seed(0, step, 1) < 0.5 * 2**63:
            loss = loss + 0.1 * jacobian_penalty(solution, 1)
            penalized += 1
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        norms.append(norm)
        progress = (step - warmup) / (total - warmup)
        lr = peak * (step + 1) / 3 if step < 3 else final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
        with torch.no_grad():
            for p, g, v in zip(model.parameters(), gradients, velocity, strict=True):
                v.mul_(0.9).add_(g * min(1.0, 3 / (norm + 1e-6)) + 0.01 * p)
                p -= lr * v
            for name, value in model.state_dict().items():
                d = min(0.9, (1 + step) / (10 + step))
                average[name] = d * average[name] + (1 - d) * value if value.is_floating_point() else value.clone()
    result = fit(config, run_dir=tmp_path)
    state, _ = checkpoint.read_newest_state(tmp_path / "checkpoints")
    assert state is not None
    weights = {name: state.tensors[f"model.{name}"] for name in average}
    near = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(weights, dict(model.state_dict()), **near)
    torch.testing.assert_close(dict(result.model.state_dict()), average, **near)
    assert min(norms) < 3 < max(norms)  # clipped on some steps and not on others
    assert 0 < penalized < total
    lines = [line for line in read_lines(tmp_path) if line["kind"] == "epoch" and line["split"] == "train"]
    assert lines[-1]["lr"] == pytest.approx(lr, rel=1e-12)


def test_scores() -> None:
    model = MDEQClassifier(MODEL, solver=eq.Broyden(max_steps=6, memory=6, rtol=0.1)).eval()
    images, labels = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 2, 0])
    objective = Objective(model, Classify(label_smoothing=0.3))
    logits, solution = model.classify(images)
    plain = nn.functional.cross_entropy(logits, labels)
    loss, sums = objective(images, labels, StepInfo(0, 0, 0))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels, label_smoothing=0.3))
    torch.testing.assert_close(objective(images, labels)[0], plain)  # in evaluation there is none
    found = dict(zip((*COMMON, "accuracy"), sums.tolist(), strict=True))
    z = torch.cat([level.flatten(1) for level in solution.value], 1)
    fz = torch.cat([level.flatten(1) for level in model.deq.cell(solution.value, model.stem(images))], 1)
    assert found == pytest.approx(
        {
            "count": 5.0,
            "loss": 5 * loss.item(),
            "accuracy": float((logits.argmax(1) == labels).sum()),
            "steps": float(solution.num_steps.sum()),
            "converged": float((solution.status == eq.Status.CONVERGED).sum()),
            "residual": ((fz - z).norm(dim=1) / z.norm(dim=1)).sum().item(),
            "penalty": 0.0,
        },
        rel=1e-5,
    )


def test_jacobian_penalty() -> None:
    model = MDEQClassifier(MODEL, solver=eq.Broyden(max_steps=30, memory=30, rtol=1e-8)).eval()
    images, labels = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    objective = Objective(model, Classify(penalty=JacobianPenalty(weight=0.5, num_probes=200)))
    loss, sums = objective(images, labels, StepInfo(0, 0, 0))
    logits, solution = model.classify(images)
    jacobians = []
    for i in range(2):
        z, u = (level[i : i + 1] for level in solution.value), model.stem(images[i : i + 1])
        rows = torch.autograd.functional.jacobian(lambda *z, u=u: model.deq.cell(z, u), tuple(z))
        jacobians.append(
            torch.cat([torch.cat([b.reshape(b[..., 0, 0, 0, 0].numel(), -1) for b in r], 1) for r in rows])
        )
    exact = 0.5 * torch.stack([j.square().sum() / len(j) for j in jacobians]).mean().item()
    penalty = loss.item() - nn.functional.cross_entropy(logits, labels).item()
    assert penalty == pytest.approx(exact, rel=0.15)
    assert sums[COMMON.index("penalty")].item() == pytest.approx(2 * penalty)
    assert objective(images, labels)[1][COMMON.index("penalty")] == 0


def test_penalty_schedule() -> None:
    penalty = JacobianPenalty(weight=2.0, probability=0.3, growth=0.5, growth_every=1000, stop_epoch=3)
    weights = torch.tensor([penalty.at(step, 0, 7) for step in range(3000)])
    share = (weights > 0).double().view(3, 1000).mean(1)
    assert (share - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 1000)
    assert [set(part.tolist()) for part in weights.view(3, 1000)] == [{0.0, 2.0}, {0.0, 2.5}, {0.0, 3.0}]
    assert [penalty.at(step, 0, 8) for step in range(50)] != [penalty.at(step, 0, 7) for step in range(50)]
    assert all(penalty.at(step, 3, 7) == 0 for step in range(100))
    assert JacobianPenalty().at(0, 0, 0) == 0


@pytest.mark.parametrize(("native", "notes"), [(True, 0), (False, 1)])
def test_emulated_bf16(native: bool, notes: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Interrupt()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if native else "AVX2")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    fit(dataclasses.replace(PLAIN, stop_after=1, precision="bf16-mixed"), run_dir=tmp_path, observer=observer)
    assert ["--precision 32-true is faster" in text for text in observer.notes] == [True] * notes


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_files(precision: Any, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(
        PLAIN, data=Toy(validation_fraction=0.2), precision=precision, epochs=1, stop_after=2, log_every=1,
        ema_decay=0.5, tensorboard=True,
    )  # fmt: skip
    result = fit(config, run_dir=tmp_path)
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {
        "config",
        "metrics",
        "result",
        "model",
        "checkpoints",
        "events",
    }
    found = json.loads((tmp_path / "result.json").read_text())
    assert found == result.test
    assert (found["seconds"] > 0, 0 < found["backward_share"] < 1) == (True, True)
    assert (found["steps"], found["epochs"], found["seed"], found["recipe"]) == (2, 2 / 3, 0, "toy")
    assert read_config(tmp_path / "config.yaml") == config

    lines = read_lines(tmp_path)
    kinds = [(line["kind"], line["split"], line["step"], line["count"]) for line in lines]
    steps = [("step", "train", step, 8) for step in (1, 2)]
    assert kinds == [*steps, ("epoch", "train", 2, 16), ("epoch", "validation", 2, 7), ("epoch", "test", 2, 15)]
    assert result.history == lines[2:]
    assert lines[2]["loss"] == pytest.approx((lines[0]["loss"] + lines[1]["loss"]) / 2)
    same = {"test_accuracy": "accuracy", "test_loss": "loss", "mean_steps": "mean_steps", "residual": "residual"}
    assert {name: found[name] for name in same} == {name: lines[-1][key] for name, key in same.items()}
    assert 0 < found["mean_steps"] <= 4

    weights = load_file(tmp_path / "model.safetensors")
    state, _ = checkpoint.read_newest_state(tmp_path / "checkpoints")
    assert state is not None
    for model in (result.model, checkpoint.model_of_state(state, config)):
        torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}
    assert found["parameters"] == sum(p.numel() for p in result.model.parameters())
    again = evaluate(load(tmp_path / "model.safetensors"), config.data.load().test, config)
    assert (again["accuracy"], again["loss"]) == (found["test_accuracy"], found["test_loss"])
    assert checkpoint.describe(tmp_path / "model.safetensors")["about"]["classes"] == ["first", "second", "third"]


def test_tensorboard(tmp_path: pathlib.Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(PLAIN, tensorboard=True, checkpoint_every=1)
    with pytest.raises(Exception):  # noqa: B017, PT011
        fit(config, run_dir=tmp_path, observer=Interrupt(7))
    fit(config, run_dir=tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in read_lines(tmp_path):
        prefix = line["split"] if line["kind"] == "epoch" else "train_step"
        expected.setdefault(f"{prefix}/loss", []).append((line["step"], line["loss"]))
    assert expected.keys() == {"train/loss", "train_step/loss", "test/loss"}
    for name, values in expected.items():
        found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]
        assert values == found, name


def broken(monkeypatch: pytest.MonkeyPatch, at: int, kind: str) -> None:
    """Makes the loss of a training step, its gradient or its penalty NaN, or the loss of evaluations infinite."""
    forward = Objective.forward

    def replaced(
        self: Objective, images: Tensor, labels: Tensor, moment: StepInfo | None = None
    ) -> tuple[Tensor, Tensor]:
        loss, sums = forward(self, images, labels, moment)
        if moment is None and kind == "evaluation":
            sums[COMMON.index("loss")] = float("inf")
        if moment is not None and moment.step == at:
            if kind in COMMON:
                loss, sums[COMMON.index(kind)] = loss * float("nan"), float("nan")
            elif kind == "gradient":  # zero, with the gradient 0 / 0
                loss = loss + (self.model.head.final[0].weight * 0).square().sum().sqrt()
        return loss, sums

    monkeypatch.setattr(Objective, "forward", replaced)


@pytest.mark.parametrize(
    ("kind", "message", "good"),
    [
        ("loss", r"the loss of batch 2 of epoch 1 \(step 6\) is not finite", 6),
        ("penalty", r"the loss of batch 2 of epoch 1 \(step 6\) is not finite", 6),
        ("gradient", r"one of the weights after 7 steps is not finite", 6),
        ("evaluation", r"the loss of the validation samples after 4 steps is not finite", 3),
    ],
)
def test_breakdown(
    kind: str, message: str, good: int, whole: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        broken(patch, 6, kind)
        with pytest.raises(NonFiniteLoss, match=message) as raised:
            fit(FULL, run_dir=tmp_path / "run")
    newest = checkpoint.states(tmp_path / "run" / "checkpoints")[0]
    assert newest.name == f"step-{good:09d}.safetensors"
    assert f"the last good checkpoint is {newest}. Lower optimizer.lr" in str(raised.value)
    assert all(tensor.isfinite().all() for tensor in checkpoint.read_tensors(newest)[0].values())
    assert all(math.isfinite(line["loss"]) for line in read_lines(tmp_path / "run"))
    assert not (tmp_path / "run" / "result.json").exists()
    assert timeless(fit(FULL, run_dir=tmp_path / "run", resume=True).history) == timeless(whole(FULL).history)


def test_large_learning_rate(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"batch \d of epoch \d .*there is no checkpoint before it"):
        fit(dataclasses.replace(PLAIN, optimizer=SGD(lr=1e38)), run_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 37}, "batch_size=37 exceeds the 36 training samples; lower it"),
        ({"model": dataclasses.replace(MODEL, num_classes=4)}, "the data has 3 classes and model.num_classes=4"),
    ],
)
def test_refusals(change: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(dataclasses.replace(PLAIN, **change), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_observer(tmp_path: pathlib.Path) -> None:
    heard: list[Any] = []
    names = ("started", "stepped", "logged", "evaluating", "finished")
    ears = {
        name: lambda self, *given, name=name, **named: heard.append((name, *given, *named.values())) for name in names
    }
    config = dataclasses.replace(PLAIN, stop_after=2)
    result = fit(config, run_dir=tmp_path, observer=type("Ears", (Observer,), ears)())
    told = [(name, *(each.get("step") if isinstance(each, dict) else each for each in given)) for name, *given in heard]
    assert told[0] == ("started", tmp_path, 2, 0, result.test["parameters"])
    total, size = result.history[-1]["count"], config.eval_batch_size
    evaluated = [("evaluating", "test", min(done, total), total) for done in range(size, total + size, size)]
    assert told[1:] == [("stepped", 1), ("stepped", 2), ("logged", 2), *evaluated, ("logged", 2), ("finished", result)]
