"""What adversarial training by joint attacks gives and costs, beside training by projected gradient ascent.

    python -m benchmarks.adversarial.run [--quick] [--data digits fashion-mnist] [--seeds 0 1 2] [--show] --json FILE

Claim of the paper (Gurumurthy, Bai, Manchester and Kolter 2021): as robust as training by projected gradient ascent
(PGD), three times faster. The model is that of the recipes `jiio-adversarial` and `jiio-adversarial-fashion-mnist`: a
fully connected map capped at 0.8; radius 1 in L2, pixels in [0, 1].

    clean     no attack
    joint     the recipe: image, state and adjoint together, 10 rounds, the loss read at the joint iterate
    pgd       as in the paper: 20 steps of 0.2 along the normalized gradient, each a solve from zero by 18 steps of
              Broyden and a backward solve by 18, then a training step of the same kind; on the digits alone, as
              it takes most of the time
    pgd-tol   the same with solves by plain iteration to a relative residual of 1e-2, 18 steps at most

All methods start from the same weights and take turns on the same batches, in one process with one thread. `seconds`
is the processor time of their optimizer steps, `evals` counts calls of the map and `vjps` products with its Jacobian in
them, each on a batch. On test images (the first 359 of Fashion-MNIST), after training:

    accuracy          of clean images, equilibria by plain iteration to 1e-5
    foolbox           accuracy under Foolbox's L2 PGD: 50 steps of a tenth of the radius, 3 random starts, on equilibria
                      and gradients solved for from zero to 1e-4
    joint_attack      accuracy under the joint attack of 40 rounds, the equilibrium solved for once more
    foolbox_long      on 50 images: 200 steps. Much below `foolbox`, a gradient would be masked
    foolbox_radius_4  on 50 images, at radius 4. Well above zero, a gradient would be masked

Settings were chosen on validation images carved out of the training images. Figures are means over seeds, standard
deviations under `<key>_std`. Each seed is written to FILE as it ends; what is there is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import equipoise as eq
from equipoise import zoo
from equipoise.constraints import L2Ball
from equipoise.data import derive_seed
from equipoise.files import write_atomic
from equipoise.gradients import Gradient, Implicit
from equipoise.train import StepInfo, TrainConfig
from equipoise.train.device import to_device
from equipoise.zoo import ATTACK, Adversarial, EquilibriumClassifier, attack

CPU = torch.device("cpu")
METHODS = ("clean", "joint", "pgd", "pgd-tol")
EXACT = eq.Picard(max_steps=100, rtol=1e-5)
ATTACKED = eq.Picard(max_steps=60, rtol=1e-4)
SCORES = ("accuracy", "foolbox", "joint_attack", "foolbox_long", "foolbox_radius_4")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done.

    Args:
        epochs: over the digits.
        steps: on Fashion-MNIST.
        images: of the test, at most.
        restarts: of Foolbox's attack, and steps of it; then of the long one.
    """

    epochs: int = 4
    steps: int = 40
    images: int = 359
    restarts: tuple[int, int] = (3, 50)
    long: tuple[int, int] = (1, 200)


QUICK = Settings(epochs=1, steps=2, images=20, restarts=(1, 3), long=(1, 4))


def config_of(data: str, settings: Settings) -> TrainConfig:
    if data == "digits":
        return dataclasses.replace(zoo.jiio_adversarial(), epochs=settings.epochs)
    return dataclasses.replace(zoo.jiio_adversarial_fashion_mnist(), stop_after=settings.steps)


class Counts:
    """Calls of the map and products with its Jacobian, in forward and backward solves."""

    def __init__(self) -> None:
        self.evals, self.vjps, self.seconds = 0, 0, 0.0

    def adjoint(self, solution: Any) -> None:
        self.evals += solution.num_evals  # where rows leave a solve, the map is evaluated anew for the others
        self.vjps += solution.num_vjps


@dataclasses.dataclass
class Trained:
    """A model on its way, with what its training has cost."""

    name: str
    model: EquilibriumClassifier
    optimizer: torch.optim.Optimizer
    counts: Counts = dataclasses.field(default_factory=Counts)

    def loss(self, config: TrainConfig, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, ready for the backward pass."""
        assert isinstance(config.task, Adversarial)
        counts = self.counts
        if self.name == "joint":
            solution = config.task.attack(config.objective(self.model).train(), x, labels, StepInfo(0, 0, 0))
            counts.evals, counts.vjps = counts.evals + solution.num_evals, counts.vjps + solution.num_vjps
            return F.cross_entropy(self.model.head(solution.value[0]), labels)
        solver: eq.solvers.Solver = eq.Picard(max_steps=18, rtol=1e-2)
        if self.name == "pgd":
            solver = eq.Broyden(max_steps=18, memory=18, rtol=0.0)
        gradient = Implicit(solver=solver, observe=counts.adjoint)
        self.model.deq.solver, self.model.deq.gradient = solver, gradient
        if self.name != "clean":
            x = self.ascend(config.task.constraint(x), x, labels)
        return F.cross_entropy(self.classify(x), labels)

    def ascend(self, ball: eq.constraints.Constraint, x: Tensor, labels: Tensor) -> Tensor:
        """Projected ascent along normalized gradients, 20 steps of 0.2."""
        for _ in range(20):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(self.classify(x), labels, reduction="sum"), x)
            norm = slope.flatten(1).norm(dim=1).clamp_min(1e-12)
            x = ball.project(x.detach() + 0.2 * slope / norm[:, None, None, None])
        return x.detach()

    def classify(self, x: Tensor) -> Tensor:
        logits, solution = self.model.classify(x)
        self.counts.evals += solution.num_evals
        return logits

    def step(self, config: TrainConfig, x: Tensor, labels: Tensor, lr: float) -> None:
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.loss(config, x, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.counts.seconds += time.process_time() - start


def train(config: TrainConfig, methods: Sequence[str], seed: int, console: Console) -> list[Trained]:
    """Models by some methods, turn by turn."""
    runs = []
    for name in methods:
        torch.manual_seed(derive_seed(seed))
        model = config.build().train()
        runs.append(Trained(name, model, config.optimizer.build(model.parameters())))
    split = config.data.load().train
    per_epoch = len(split) // config.batch_size
    total = min(per_epoch * config.epochs, config.stop_after or 2**62)
    step = 0
    for epoch in range(config.epochs):
        for images, labels in split.batches(config.batch_size, shuffle=(seed, epoch)):
            if step == total:
                break
            x, labels = to_device(config, images, labels, CPU)
            for run in runs:
                run.step(config, x, labels, config.schedule.lr(step, total, config.optimizer.lr))
            step += 1
        seconds = ", ".join(f"{run.name} {run.counts.seconds:.1f} s" for run in runs)
        console.print(f"  epoch {epoch + 1}, step {step} of {total}: {seconds}", highlight=False)
        if step == total:
            break
    for run in runs:
        run.model.eval()
    return runs


def foolbox_accuracy(
    model: EquilibriumClassifier, x: Tensor, labels: Tensor, restarts: int, steps: int, radius: float = 1.0
) -> float:
    """Accuracy under Foolbox's attack on the model as a plain module."""
    import foolbox

    gradient: Gradient = Implicit(solver=ATTACKED)
    with model.deq.using(solver=ATTACKED, gradient=gradient):
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        pgd = foolbox.attacks.L2ProjectedGradientDescentAttack(steps=steps, rel_stepsize=0.1, random_start=True)
        _, _, fooled = pgd.repeat(restarts)(wrapped, x, labels, epsilons=radius)
    return 1 - float(fooled.double().mean())


def scores(config: TrainConfig, model: EquilibriumClassifier, seed: int, settings: Settings) -> dict[str, float]:
    """What a trained model is worth on test images."""
    images, labels = next(iter(config.data.load().test.batches(settings.images)))
    x, labels = to_device(config, images, labels, CPU)
    ball = L2Ball(radius=1.0, center=x, lower=0.0, upper=1.0)
    unverified = dataclasses.replace(ATTACK, verify_solver=None)
    changed = attack(model, x, labels, constraint=ball, optimizer=unverified).value[2].detach()
    torch.manual_seed(derive_seed(seed, 1))
    with torch.no_grad(), model.deq.using(solver=EXACT):
        accuracy, robust = (float((model(t).argmax(1) == labels).double().mean()) for t in (x, changed))
    few = x[:50], labels[:50]
    return {
        "accuracy": accuracy,
        "foolbox": foolbox_accuracy(model, x, labels, *settings.restarts),
        "joint_attack": robust,
        "foolbox_long": foolbox_accuracy(model, *few, *settings.long),
        "foolbox_radius_4": foolbox_accuracy(model, *few, *settings.restarts, radius=4.0),
    }


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Means and deviations over seeds, and ratios of costs."""
    figures: dict[str, Any] = {}
    for data, seeds in runs.items():
        for method in METHODS:
            for key in (*SCORES, "seconds", "evals", "vjps"):
                values = [found[method][key] for found in seeds.values() if key in found.get(method, {})]
                if not values:
                    continue
                figures[f"{data}/{method}/{key}"] = statistics.fmean(values)
                figures[f"{data}/{method}/{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
            for other in ("pgd", "pgd-tol"):  # on the seeds that have both
                both = [found for found in seeds.values() if {other, method} <= found.keys()]
                if both:
                    ratios = [found[other]["seconds"] / found[method]["seconds"] for found in both]
                    figures[f"{data}/{method}/speedup_over_{other}"] = statistics.fmean(ratios)
    return figures


def table(content: dict[str, Any]) -> Table:
    figures = content["figures"]
    shown = Table(
        "data", "training", "clean", "Foolbox", "joint attack", "long", "radius 4", "evals", "vjps", "seconds"
    )
    for data in content["runs"]:
        for method in METHODS:
            if f"{data}/{method}/accuracy" not in figures:
                continue
            keys = (*SCORES, "evals", "vjps", "seconds")
            found = {key: figures.get(f"{data}/{method}/{key}", math.nan) for key in keys}
            spread = figures[f"{data}/{method}/foolbox_std"]
            percent = [f"{100 * found[key]:.1f}" for key in SCORES]
            if spread is not None:
                percent[1] += f" ± {100 * spread:.1f}"
            counts = [f"{found[key]:,.0f}" for key in ("evals", "vjps")]
            shown.add_row(data, method, *percent, *counts, f"{found['seconds']:.1f}")
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a run that shows that it runs")
    parser.add_argument("--data", nargs="+", choices=["digits", "fashion-mnist"], default=["digits", "fashion-mnist"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--show", action="store_true", help="print what FILE holds, and do nothing")
    parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE")
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else Settings()
    plain = json.loads(json.dumps(dataclasses.asdict(settings)))
    content: dict[str, Any] = {"settings": plain, "figures": {}, "runs": {}}
    if options.json.exists():
        content = json.loads(options.json.read_text())
        if content["settings"] != plain and not options.show:
            parser.error(f"{options.json} is of other settings; choose another FILE")
    elif options.show:
        parser.error(f"--show: {options.json} does not exist")
    torch.set_num_threads(1)
    console = Console(width=120)
    for seed in () if options.show else options.seeds:
        for data in options.data:
            done = content["runs"].get(data, {})
            if str(seed) in done:
                continue
            console.print(f"{data}, seed {seed}")
            config = config_of(data, settings)
            found: dict[str, Any] = {}
            methods = [name for name in METHODS if name != "pgd" or data == "digits"]
            for run in train(config, methods, seed, console):
                cost = {"seconds": run.counts.seconds, "evals": run.counts.evals, "vjps": run.counts.vjps}
                found[run.name] = {**cost, **scores(config, run.model, seed, settings)}
            content["runs"].setdefault(data, {})[str(seed)] = {
                **found,
                "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
            }
            content["figures"] = summary(content["runs"])
            write_atomic(options.json, json.dumps(content, indent=1).encode())
    console.print(table(content))


if __name__ == "__main__":
    main()
