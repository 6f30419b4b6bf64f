"""Worth and cost of adversarial training by joint attacks, beside training by projected gradient ascent.

    python -m benchmarks adversarial [--quick] [--data digits fashion-mnist] [--seeds N]

Claim of the paper (Gurumurthy, Bai, Manchester and Kolter 2021): as robust as training by projected gradient ascent
(PGD), three times faster.
Evidence: `results/2026-11-26.json`: 4 epochs of the digits and 40 steps of Fashion-MNIST, 3 seeds, one thread of
x86-64, torch 2.13.0. Joint training is as robust as PGD within the spread, 16 times faster on the digits, and 4 to 5
times faster than PGD with early stops.

The model is that of the recipes `jiio-adversarial` and `jiio-adversarial-fashion-mnist`: a fully connected map capped
at 0.8; radius 1 in L2, pixels in [0, 1].

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
deviations under `spread`. `--seeds N` means seeds 0 to N - 1.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import equipoise as eq
from benchmarks import harness
from benchmarks.adversarial.report import summary, table
from equipoise import zoo
from equipoise.constraints import L2Ball
from equipoise.data import derive_seed
from equipoise.train import StepInfo, TrainConfig
from equipoise.train.device import to_device
from equipoise.zoo import ATTACK, Adversarial, EquilibriumClassifier, attack

CPU = torch.device("cpu")
METHODS = ("clean", "joint", "pgd", "pgd-tol")
EXACT = eq.Picard(max_steps=100, rtol=1e-5)
ATTACKED = eq.Picard(max_steps=60, rtol=1e-4)
RECIPES = {"digits": zoo.jiio_adversarial, "fashion-mnist": zoo.jiio_adversarial_fashion_mnist}
STEPS = {"digits": 44, "fashion-mnist": 40}  # of training: four epochs of the digits


class Trained:
    """A model in training by some method, with the cost so far: calls of the map, products, seconds.

    Args:
        name: of the method.
        config: of the training.
        seed: of the weights.
    """

    def __init__(self, name: str, config: TrainConfig, seed: int) -> None:
        torch.manual_seed(derive_seed(seed))
        self.name, self.config, self.model = name, config, config.build().train()
        self.optimizer = config.optimizer.build(self.model.parameters())
        self.evals, self.vjps, self.seconds = 0, 0, 0.0

    def count(self, solution: Any) -> None:
        self.evals += solution.num_evals  # if rows leave a solve, the map is evaluated anew for the others
        self.vjps += solution.num_vjps

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch, ready for the backward pass."""
        config = self.config
        assert isinstance(config.task, Adversarial)
        if self.name == "joint":
            solution = config.task.attack(config.objective(self.model).train(), x, labels, StepInfo(0, 0, 0))
            self.count(solution)
            return F.cross_entropy(self.model.head(solution.value[0]), labels)
        solver: eq.solvers.Solver = eq.Picard(max_steps=18, rtol=1e-2)
        if self.name == "pgd":
            solver = eq.Broyden(max_steps=18, memory=18, rtol=0.0)
        self.model.deq.solver = solver
        self.model.deq.gradient = eq.Implicit(solver=solver, observe=self.count)
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
        self.evals += solution.num_evals
        return logits

    def step(self, x: Tensor, labels: Tensor, lr: float) -> None:
        start = harness.clock()
        harness.descend(self.optimizer, [self.loss(x, labels)], lambda _: lr)
        self.seconds += harness.clock() - start


def measure(data: str, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Train by all methods in turn; costs and scores of each."""
    config, total = RECIPES[data](), 2 if quick else STEPS[data]
    runs = {name: Trained(name, config, seed) for name in METHODS if name != "pgd" or data == "digits"}
    batches = itertools.islice(harness.endless(config.data.load().train, config.batch_size, seed), total)
    for step, (*_, batch) in enumerate(batches):
        x, labels = to_device(config, *batch, CPU)
        for run in runs.values():
            run.step(x, labels, config.schedule.lr(step, total, config.optimizer.lr))
    return {
        name: {
            "seconds": run.seconds,
            "evals": run.evals,
            "vjps": run.vjps,
            **scores(config, run.model.eval(), seed, quick),
        }
        for name, run in runs.items()
    }


def foolbox_accuracy(
    model: EquilibriumClassifier, x: Tensor, labels: Tensor, restarts: int, steps: int, radius: float = 1.0
) -> float:
    """Accuracy under Foolbox's attack on the model as a plain module."""
    import foolbox

    with model.deq.using(solver=ATTACKED, gradient=eq.Implicit(solver=ATTACKED)):
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        pgd = foolbox.attacks.L2ProjectedGradientDescentAttack(steps=steps, rel_stepsize=0.1, random_start=True)
        _, _, fooled = pgd.repeat(restarts)(wrapped, x, labels, epsilons=radius)
    return 1 - float(fooled.double().mean())


def scores(config: TrainConfig, model: EquilibriumClassifier, seed: int, quick: bool) -> dict[str, float]:
    """Accuracies of a trained model on test images, by attack."""
    count, short, long = (20, (1, 3), (1, 4)) if quick else (359, (3, 50), (1, 200))  # images; restarts and steps
    images, labels = next(iter(config.data.load().test.batches(count)))
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
        "foolbox": foolbox_accuracy(model, x, labels, *short),
        "joint_attack": robust,
        "foolbox_long": foolbox_accuracy(model, *few, *long),
        "foolbox_radius_4": foolbox_accuracy(model, *few, *short, radius=4.0),
    }


def main(argv: Sequence[str] | None = None) -> None:
    data = ["digits", "fashion-mnist"]
    record = harness.Record(
        __name__,
        argv,
        quick="two steps of training, 20 test images",
        seeds=3,
        options={"--data": {"nargs": "+", "choices": data, "default": data}},
        free=["data"],
        packages=["foolbox"],
        summary=summary,
    )
    for seed, name in itertools.product(range(record.args.seeds), record.args.data):
        record.measure(functools.partial(measure, name, seed, record.args.quick), "runs", name, seed)
    record.finish(table)
