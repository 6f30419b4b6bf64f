"""Few-shot learning of characters by optimized inputs, beside first-order MAML, prototypes and pixels.

    python -m benchmarks.few_shot.run [--quick] [--seeds N] [--methods NAME ...] [--steps N] [--kinds N ...] --json FILE
        [--table FILE] [--plot PNG]

All methods that learn have the encoder of the recipe `jiio-meta`, and train on the same tasks in the same order, 8 at
a time, with Adam and the same schedule of its rate: 5 ways, 1 shot. One network of each is then given tasks of
characters of held-out alphabets, 600 of every kind, and the 20 official one-shot runs.

    jiio               the recipe: context and head are inputs of an equilibrium, found with it; exact gradients
    jiio-first-order   the same, with the found inputs held constant in the gradient
    fomaml             first-order MAML of equal size: all parameters adapt by five steps, at the inner rate that does
                       best in short trainings, by validation alphabets
    prototypes         a prototypical network
    pixels             nearest neighbor, without training

Keys are <method>/<seed>/<ways>-way-<shots>-shot/accuracy, and interval, half the width of that of 95 % over tasks; and
<method>/<seed>/one_shot_runs_error. Weights are kept in FILE.runs, and figures written to FILE, as
each method ends; what is there is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import equipoise as eq
from benchmarks.few_shot.letters import OmniglotAndLetters
from benchmarks.few_shot.rivals import FirstOrderMAML, Network, Pixels, Prototypes
from equipoise import zoo
from equipoise.data import Split, Splits
from equipoise.files import read_tensors, write_atomic, write_tensors
from equipoise.train import TrainConfig
from equipoise.zoo import ADAPT, FewShotConfig, FewShotLearner, Omniglot
from equipoise.zoo.few_shot.omniglot import Episodes

METHODS = ("jiio", "fomaml", "prototypes", "pixels", "jiio-first-order")
KINDS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways and shots
RATES = (0.1, 0.4)  # inner ones of MAML that are tried
TRIED = 15  # steps of such a trial
Predict = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # support, labels, queries, ways: logits


@dataclasses.dataclass
class Bench:
    """Recipe, data and sizes."""

    config: TrainConfig
    splits: Splits
    tasks: int
    steps: int
    tried: int

    @property
    def data(self) -> Omniglot:
        assert isinstance(self.config.data, Omniglot)
        return self.config.data

    @property
    def support(self) -> int:
        return self.data.ways * self.data.shots


def bench(quick: bool, steps: int | None) -> Bench:
    config = zoo.jiio_meta()
    data = config.data
    assert isinstance(data, Omniglot)
    if quick:
        config = dataclasses.replace(config, batch_size=2)
    else:
        data = OmniglotAndLetters(**{field.name: getattr(data, field.name) for field in dataclasses.fields(data)})
        config = dataclasses.replace(config, data=data)
    whole = config.epochs * data.tasks // config.batch_size
    return Bench(
        config, config.data.load(), 2 if quick else 600, steps or (2 if quick else whole), 1 if quick else TRIED
    )


def train(bench: Bench, method: str, learner: Any, seed: int, steps: int) -> float:
    """Train in place; the seconds of this process that it took."""
    config, start = bench.config, time.process_time()
    optimizer = config.optimizer.build(learner.module.parameters())
    per_epoch = len(bench.splits.train) // config.batch_size
    batches = itertools.chain.from_iterable(
        bench.splits.train.batches(config.batch_size, shuffle=(seed, epoch)) for epoch in range(1 + steps // per_epoch)
    )
    for step, (images, labels) in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = config.schedule.lr(step, steps, config.optimizer.lr)
        optimizer.zero_grad()
        x, cut = config.data.prepare(images), bench.support
        loss = learner.loss(x[:, :cut], labels[:, :cut], x[:, cut:], labels[:, cut:], bench.data.ways)
        assert config.clip_norm is not None
        nn.utils.clip_grad_norm_(learner.module.parameters(), config.clip_norm)
        optimizer.step()
        if step % 50 == 0:
            print(f"{time.strftime('%H:%M:%S')} {method} step {step}: loss {float(loss):.3f}", flush=True)
    return time.process_time() - start


@dataclasses.dataclass
class Jiio:
    """The few-shot learner of the recipe."""

    module: FewShotLearner
    config: TrainConfig
    gradient: Any

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor, ways: int, *, training: bool = False) -> Tensor:
        solver = self.config.solver if training else self.config.eval_solver
        assert solver is not None
        optimizer = dataclasses.replace(ADAPT, solver=solver, gradient=self.gradient)
        found = self.module.adapt(support, labels, ways=ways, optimizer=optimizer)
        return self.module.classify(queries, found.value[2])[0]

    def loss(self, support: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor, ways: int) -> Tensor:
        logits = self.logits(support, labels, queries, ways, training=True)
        value = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        value.backward()
        return value.detach()


def learner(bench: Bench, method: str, seed: int, weights: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """A learner, trained unless its weights are there, and what its training told."""
    if method == "pixels":
        return Pixels(), {}
    if weights.exists():
        tensors, facts = read_tensors(weights)
        found = untrained(bench, method, facts.get("inner_rate", 0.0))
        found.module.load_state_dict(tensors)
        return found, facts
    facts = {}
    if method == "fomaml":
        validation = bench.splits.validation
        assert isinstance(validation, Episodes)
        few = episodes(validation, *KINDS[0], min(200, bench.tasks))
        trials = {}
        for rate in RATES:
            torch.manual_seed(seed)
            trial = untrained(bench, method, rate)
            train(bench, f"{method} at {rate}", trial, seed, bench.tried)
            trials[rate] = score(bench, trial.logits, few, 5, 5)[0]
        facts |= {"trials": {str(rate): value for rate, value in trials.items()}}
        facts |= {"inner_rate": max(trials, key=trials.__getitem__)}
    torch.manual_seed(seed)
    found = untrained(bench, method, facts.get("inner_rate", 0.0))
    facts["parameters"] = sum(parameter.numel() for parameter in found.module.parameters())
    facts["train_cpu_seconds"] = train(bench, method, found, seed, bench.steps)
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(weights, found.module.state_dict(), facts)
    return found, facts


def untrained(bench: Bench, method: str, rate: float) -> Any:
    """A learner whose weights are drawn at random."""
    if method.startswith("jiio"):
        gradient = eq.inputs.FirstOrder() if method == "jiio-first-order" else bench.config.gradient
        return Jiio(bench.config.build(), bench.config, gradient)
    assert isinstance(bench.config.model, FewShotConfig)
    network = Network(bench.config.model)
    return Prototypes(network) if method == "prototypes" else FirstOrderMAML(network, rate)


def episodes(split: Episodes, ways: int, shots: int, tasks: int) -> Episodes:
    """Tasks of another kind from the same classes; of 20 ways, with two queries for each class."""
    return Episodes(split.classes, tasks=tasks, ways=ways, shots=shots, queries=5 if ways == 5 else 2)


@torch.no_grad()
def score(bench: Bench, predict: Predict, split: Split, support: int, ways: int) -> tuple[float, float]:
    """Mean accuracy over tasks, and half the width of its 95 % interval."""
    found = []
    for images, labels in split.batches(25):
        x = bench.config.data.prepare(images)
        logits = predict(x[:, :support], labels[:, :support].contiguous(), x[:, support:], ways)
        found.append((logits.argmax(2) == labels[:, support:]).double().mean(1))
    accuracy = torch.cat(found)
    return float(accuracy.mean()), float(1.96 * accuracy.std() / len(accuracy) ** 0.5)


def test(bench: Bench, predict: Predict, found: dict[str, Any], kinds: list[int]) -> None:
    """Add what is lacking of the figures on test alphabets and official runs."""
    split = bench.splits.test
    assert isinstance(split, Episodes)
    if "one_shot_runs_error" not in found:
        found["one_shot_runs_error"] = 1 - score(bench, predict, bench.data.one_shot_runs(), 20, 20)[0]
    for ways, shots in (KINDS[number] for number in kinds):
        if f"{ways}-way-{shots}-shot" in found:
            continue
        mean, interval = score(bench, predict, episodes(split, ways, shots, bench.tasks), ways * shots, ways)
        found[f"{ways}-way-{shots}-shot"] = {"accuracy": mean, "interval": interval}
        print(f"{time.strftime('%H:%M:%S')}   {ways}-way {shots}-shot {mean:.4f} ± {interval:.4f}", flush=True)


def table(results: dict[str, Any]) -> str:
    """The figures of all methods, in Markdown."""
    lines = [
        "| method | seed | 5-way 1-shot | 5-way 5-shot | 20-way 1-shot | 20-way 5-shot | 20 runs, error | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, seeds in results.items():
        for seed, found in seeds.items():
            kinds = [found.get(f"{ways}-way-{shots}-shot") for ways, shots in KINDS]
            cells = [f"{100 * kind['accuracy']:.1f} ± {100 * kind['interval']:.1f}" if kind else "" for kind in kinds]
            seconds = f"{found['train_cpu_seconds']:.0f}" if "train_cpu_seconds" in found else ""
            cells += [f"{100 * found['one_shot_runs_error']:.1f} %", seconds]
            lines.append(f"| {method} | {seed} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(bench: Bench, jiio: Jiio, path: pathlib.Path) -> None:
    """A task: support, and queries with the chances of each class before and after the task is learned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    assert isinstance(bench.splits.test, Episodes)
    split = episodes(bench.splits.test, 5, 1, 1)
    images, labels = next(split.batches(1))
    x = bench.config.data.prepare(images)
    with torch.no_grad():
        after = jiio.logits(x[:, :5], labels[:, :5].contiguous(), x[:, 5:], 5).softmax(2)[0]
    before = torch.full_like(after, 0.2)  # a head of zeros
    figure, axes = plt.subplots(3, 10, figsize=(10, 2.6), height_ratios=[1, 0.6, 0.6], layout="constrained")
    for column, number in enumerate([*range(5), *(5 + 5 * label for label in range(5))]):
        axes[0, column].imshow(255 - images[0, number, 0], cmap="gray", vmin=0, vmax=255)
        axes[0, column].set_title(
            f"class {'ABCDE'[column]}" if column < 5 else f"a new {'ABCDE'[column - 5]}", fontsize=9
        )
        axes[0, column].set_xticks([])
        axes[0, column].set_yticks([])
        for row, chances in ((1, before), (2, after)):
            axis = axes[row, column]
            if column < 5:
                axis.axis("off")
                continue
            best = chances[number - 5].argmax() if row == 2 else -1
            right = labels[0, number]
            colors = ["#2a7f62" if c == right == best else "#c44536" if c == best else "#b8bec6" for c in range(5)]
            axis.bar(list("ABCDE"), chances[number - 5].tolist(), color=colors)
            axis.set_ylim(0, 1)
            axis.set_yticks([])
            axis.tick_params(axis="x", length=0, labelsize=7)
            for side in ("top", "left", "right"):
                axis.spines[side].set_visible(False)
    for row, text in ((1, "before: every class is as likely"), (2, "after learning from the five on the left")):
        axes[row, 4].text(1.0, 0.4, text, ha="right", fontsize=9, in_layout=False, transform=axes[row, 4].transAxes)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps and two tasks, without letters of fonts")
    parser.add_argument("--steps", type=int, help="of training, if not as many as the recipe takes")
    numbers = range(len(KINDS))
    parser.add_argument("--kinds", type=int, nargs="+", choices=numbers, default=list(numbers), help="of test tasks")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--table", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path, help="picture of a task; needs `jiio` trained in this call")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = bench(args.quick, args.steps)
    record: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"results": {}}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    record |= {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{machine}; torch {torch.__version__}, equipoise {eq.__version__}",
        "settings": {
            "steps": given.steps,
            "batch_size": given.config.batch_size,
            "test_tasks": given.tasks,
            "test_alphabets": given.data.test_alphabets,
            "validation_alphabets": given.data.validation_alphabets,
            "training_classes": len(given.splits.train.classes) if isinstance(given.splits.train, Episodes) else 0,
        },
    }
    for seed, method in itertools.product(range(args.seeds), args.methods):
        results = record["results"].setdefault(method, {})
        if method == "pixels" and seed:
            continue
        entry = results.setdefault(str(seed), {})
        done = all(f"{KINDS[number][0]}-way-{KINDS[number][1]}-shot" in entry for number in args.kinds)
        if done:
            continue
        found, facts = learner(given, method, seed, args.json.with_suffix(".runs") / f"{method}-{seed}.safetensors")
        entry |= facts
        if method == "jiio" and not seed and args.plot:
            plot(given, found, args.plot)
        test(given, found.logits, entry, args.kinds)
        write_atomic(args.json, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    text = table(record["results"])
    print(text)
    if args.table:
        args.table.write_text(text)


if __name__ == "__main__":
    main()
