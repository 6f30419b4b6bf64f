"""Few-shot learning of characters by optimized inputs, beside first-order MAML, prototypes and pixels.

    python -m benchmarks few_shot [--quick] [--seeds N] [--methods NAME ...] [--steps N] [--kinds N ...]
        [--picture PNG]

Claim: learning a task by optimizing the inputs of an equilibrium beats first-order MAML of equal size.
Evidence: `results/2026-11-26.json`: 3 seeds (`jiio-first-order`: 1), one thread of x86-64, torch 2.13.0. The claim
holds; the prototypical network is better than both.

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
<method>/<seed>/one_shot_runs_error. Weights are kept in FILE.runs.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import equipoise as eq
from benchmarks import harness
from benchmarks.few_shot.letters import OmniglotAndLetters
from benchmarks.few_shot.report import picture, summary, table
from benchmarks.few_shot.rivals import FirstOrderMAML, Learner, Network, Pixels, Prototypes
from equipoise import zoo
from equipoise.data import Split
from equipoise.files import read_tensors, write_tensors
from equipoise.train import TrainConfig
from equipoise.zoo import ADAPT, FewShotConfig, Omniglot
from equipoise.zoo.few_shot.omniglot import Episodes

METHODS = ("jiio", "fomaml", "prototypes", "pixels", "jiio-first-order")
KINDS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways and shots
RATES = (0.1, 0.4)  # inner ones of MAML that are tried
TRIED = 15  # steps of such a trial


@dataclasses.dataclass
class Jiio(Learner):
    """The few-shot learner of the recipe."""

    config: TrainConfig
    gradient: Any

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor, ways: int) -> Tensor:
        solver = self.config.solver if torch.is_grad_enabled() else self.config.eval_solver
        assert solver is not None
        optimizer = dataclasses.replace(ADAPT, solver=solver, gradient=self.gradient)
        found = self.module.adapt(support, labels, ways=ways, optimizer=optimizer)
        logits: Tensor = self.module.classify(queries, found.value[2])[0]
        return logits


class Bench:
    """Recipe, data and extent of a run.

    Args:
        quick: two steps and two tasks, without letters of fonts.
        steps: of training; None: those of the recipe.
    """

    def __init__(self, quick: bool, steps: int | None) -> None:
        config = zoo.jiio_meta()
        data = config.data
        assert isinstance(data, Omniglot)
        if not quick:
            data = OmniglotAndLetters(**{field.name: getattr(data, field.name) for field in dataclasses.fields(data)})
        self.data, self.splits = data, data.load()
        self.config = dataclasses.replace(config, data=data, batch_size=2 if quick else config.batch_size)
        self.tasks, self.tried = (2, 1) if quick else (600, TRIED)
        self.steps = steps or (2 if quick else config.epochs * data.tasks // config.batch_size)

    def train(self, learner: Learner, seed: int, steps: int) -> float:
        """Train in place; return the seconds of the processor."""
        config, data, start = self.config, self.data, harness.clock()
        cut = data.ways * data.shots

        def losses() -> Iterator[Tensor]:
            for *_, (images, labels) in itertools.islice(
                harness.endless(self.splits.train, config.batch_size, seed), steps
            ):
                x = data.prepare(images)
                yield learner.loss(x[:, :cut], labels[:, :cut], x[:, cut:], labels[:, cut:], data.ways)

        rate = functools.partial(config.schedule.lr, total=steps, peak=config.optimizer.lr)
        harness.descend(config.optimizer.build(learner.module.parameters()), losses(), rate, clip_norm=config.clip_norm)
        return harness.clock() - start

    def untrained(self, method: str, seed: int, rate: float) -> Learner:
        """Learner with random weights."""
        torch.manual_seed(seed)
        if method == "pixels":
            return Pixels()
        if method.startswith("jiio"):
            gradient = eq.inputs.FirstOrder() if method == "jiio-first-order" else self.config.gradient
            return Jiio(self.config.build(), self.config, gradient)
        assert isinstance(self.config.model, FewShotConfig)
        network = Network(self.config.model)
        return Prototypes(network) if method == "prototypes" else FirstOrderMAML(network, rate)

    def trained(self, method: str, seed: int, weights: pathlib.Path) -> tuple[Learner, dict[str, Any]]:
        """Learner, trained unless its weights exist, and facts of its training."""
        facts: dict[str, Any] = {}
        if weights.exists():
            tensors, facts = read_tensors(weights)
            found = self.untrained(method, seed, facts.get("inner_rate", 0.0))
            found.module.load_state_dict(tensors)
        elif method == "pixels":
            found = self.untrained(method, seed, 0.0)
        else:
            if method == "fomaml":
                trials = {rate: self.trial(seed, rate) for rate in RATES}
                facts["trials"] = {str(rate): value for rate, value in trials.items()}
                facts["inner_rate"] = max(trials, key=trials.__getitem__)
            found = self.untrained(method, seed, facts.get("inner_rate", 0.0))
            facts["parameters"] = sum(parameter.numel() for parameter in found.module.parameters())
            facts["train_cpu_seconds"] = self.train(found, seed, self.steps)
            weights.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(weights, found.module.state_dict(), facts)
        return found, facts

    def trial(self, seed: int, rate: float) -> float:
        """Validation accuracy of first-order MAML after a short training at an inner rate."""
        found = self.untrained("fomaml", seed, rate)
        self.train(found, seed, self.tried)
        few = self.episodes(self.splits.validation, *KINDS[0], min(200, self.tasks))
        return self.score(found, few, 5, 5)["accuracy"]

    @staticmethod
    def episodes(split: Split | None, ways: int, shots: int, tasks: int) -> Episodes:
        """Tasks of another kind from the same classes; of 20 ways, with two queries for each class."""
        assert isinstance(split, Episodes)
        return Episodes(split.classes, tasks=tasks, ways=ways, shots=shots, queries=5 if ways == 5 else 2)

    @torch.no_grad()
    def score(self, learner: Learner, split: Split, support: int, ways: int) -> dict[str, float]:
        """Mean accuracy over tasks, and half the width of its 95 % interval."""
        found = []
        for images, labels in split.batches(25):
            x = self.data.prepare(images)
            logits = learner.logits(x[:, :support], labels[:, :support].contiguous(), x[:, support:], ways)
            found.append((logits.argmax(2) == labels[:, support:]).double().mean(1))
        accuracy = torch.cat(found)
        return {"accuracy": float(accuracy.mean()), "interval": float(1.96 * accuracy.std() / len(accuracy) ** 0.5)}

    def official(self, learner: Learner) -> float:
        """Error in the official one-shot runs."""
        return 1 - self.score(learner, self.data.one_shot_runs(), 20, 20)["accuracy"]

    def test(self, learner: Learner, ways: int, shots: int) -> dict[str, float]:
        """Score on test alphabets."""
        return self.score(learner, self.episodes(self.splits.test, ways, shots, self.tasks), ways * shots, ways)

    @torch.no_grad()
    def draw(self, learner: Learner, path: pathlib.Path) -> None:
        """Picture of a task."""
        images, labels = next(self.episodes(self.splits.test, 5, 1, 1).batches(1))
        x = self.data.prepare(images)
        after = learner.logits(x[:, :5], labels[:, :5].contiguous(), x[:, 5:], 5).softmax(2)
        picture(images[0, :, 0], labels[0], after[0]).savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    numbers = range(len(KINDS))
    record = harness.Record(
        __name__,
        argv,
        quick="two steps and two tasks, without letters of fonts",
        seeds=1,
        options={
            "--steps": {"type": int, "help": "of training [those of the recipe]"},
            "--kinds": {"type": int, "nargs": "+", "choices": numbers, "default": [*numbers], "help": "of test tasks"},
            "--methods": {"nargs": "+", "choices": METHODS, "default": list(METHODS)},
            "--picture": {"type": pathlib.Path, "metavar": "PNG", "help": "picture of a task, by `jiio` of seed 0"},
        },
        free=["kinds", "methods", "picture"],
        summary=summary,
    )
    args = record.args
    bench = Bench(args.quick, args.steps)
    for seed, method in itertools.product(range(args.seeds), args.methods):
        if method == "pixels" and seed:
            continue
        learner, facts = bench.trained(method, seed, record.folder / f"{method}-{seed}.safetensors")
        for key, value in facts.items():
            record.put(value, "results", method, seed, key)
        record.measure(functools.partial(bench.official, learner), "results", method, seed, "one_shot_runs_error")
        for ways, shots in (KINDS[number] for number in args.kinds):
            test = functools.partial(bench.test, learner, ways, shots)
            record.measure(test, "results", method, seed, f"{ways}-way-{shots}-shot")
        if args.picture and method == "jiio" and not seed:
            bench.draw(learner, args.picture)
    record.finish(table)
