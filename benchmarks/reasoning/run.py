"""Prefix sums of strings longer than any in training: an equilibrium beside other networks of equal size.

    python -m benchmarks reasoning [--quick] [--seeds N] [--workers N]

Claim: a map trained on strings of 32 bits has an equilibrium that answers strings of 512 bits exactly, where plain and
weight-tied convolutions of equal size and training time do not. Evidence: `results/2026-12-01.json`.

    equilibrium   the recipe `prefix-sums`: random counts of free and unrolled steps. At test Picard iteration solves to
                  rtol 1e-3
    tied          the same map and head as a network of depth 30 with the progressive loss of Bansal et al. (2022). At
                  test it is applied 30 n / 32 times to n bits
    plain         a feed-forward network of residual blocks of equal size, with dilated convolutions
    recurrent     a GRU of equal size that reads from left to right, as the definition of the answer does

The equilibrium trains for the steps of its recipe; evaluation does not count as training. A rival then trains for as
many processor seconds, with batches of the same size, Adam, warm-up and cosine by time, clipped gradients; its learning
rate is the one of two that has the least loss on validation strings of 32 bits with seed 0.

    exact/n           share of 500 test strings of n bits whose answer is right at every place
    exact/512-twice   of 100 of them after 320 steps without a tolerance, twice as many as an answer takes (tied: 960)
    exact/512-random  of 200 of them from a random start; converged/512-random: share CONVERGED
    exact/512-first   of 100 of them after one step from zero
    converged/512     share of samples CONVERGED; steps/512: mean number of steps
    curve/s           exact of 100 strings of 512 bits after s steps
    auc               of the residual after 128 steps as a sign of a wrong answer of 512 bits, 100 strings; None if all
                      are right or all wrong
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq
from benchmarks import harness
from benchmarks.reasoning.report import summary, table
from benchmarks.reasoning.rivals import RIVALS, Tied
from equipoise import zoo
from equipoise.data import Data
from equipoise.data.base import Split, generator
from equipoise.train import TrainConfig, fit
from equipoise.zoo import PrefixSums, Reasoner
from equipoise.zoo.files import load

LENGTHS = (32, 64, 128, 256, 512)
CURVE = (8, 32, 64, 96, 128, 160, 320)  # the last are twice as many as an answer takes
CUT = 128
RATES = (1e-3, 3e-3)


def recipe(quick: bool, seed: int) -> TrainConfig:
    """The recipe; in the quick setting a few steps of short strings."""
    config = dataclasses.replace(zoo.prefix_sums(), seed=seed, tensorboard=False)
    if not quick:
        return config
    data = PrefixSums(length=32, test_length=64, num_train=400, num_validation=20, num_test=20)
    return dataclasses.replace(config, data=data, stop_after=3)


def strings(length: int, quick: bool) -> tuple[Tensor, Tensor]:
    """Test strings of a length, and their answers."""
    data = PrefixSums(test_length=length, num_test=20 if quick else 500, num_train=1, num_validation=0)
    bits, answers = next(data.load().test.batches(500))
    return data.prepare(bits), answers


def exact(logits: Tensor, answers: Tensor) -> float:
    return float((logits.argmax(1) == answers).all(1).double().mean())


def exact_at(
    model: Reasoner,
    length: int,
    quick: bool,
    *,
    count: int = 500,
    steps: int = 1000,
    rtol: float = 1e-3,
    random_start: bool = False,
) -> tuple[float, eq.Solution[Tensor], Tensor]:
    """Share of exact answers of an equilibrium, its solution, and a mask of wrong answers."""
    x, y = (t[:count] for t in strings(length, quick))
    z0 = torch.randn(len(x), model.config.channels, length) if random_start else None
    with torch.no_grad(), model.deq.using(solver=eq.Picard(max_steps=steps, rtol=rtol)):
        logits, solution = model.answer(x, z0=z0)
    return exact(logits, y), solution, (logits.argmax(1) != y).any(1)


def examine(model: Reasoner, quick: bool) -> dict[str, Any]:
    """Figures of the equilibrium, beside those of the test split."""
    found: dict[str, Any] = {}
    last = LENGTHS[1] if quick else LENGTHS[-1]
    for length in LENGTHS[:1] if quick else LENGTHS[:-1]:
        found[f"exact/{length}"] = exact_at(model, length, quick)[0]
    torch.manual_seed(1)
    found[f"exact/{last}-random"], solution, _ = exact_at(model, last, quick, count=200, random_start=True)
    found[f"converged/{last}-random"] = float(solution.converged.double().mean())
    found[f"exact/{last}-first"] = exact_at(model, last, quick, count=100, steps=1, rtol=0.0)[0]
    for steps in CURVE[:2] if quick else CURVE:
        found[f"curve/{steps}"] = exact_at(model, last, quick, count=100, steps=steps, rtol=0.0)[0]
    found[f"exact/{last}-twice"] = found[f"curve/{steps}"]
    return found


def doubt(folder: pathlib.Path, quick: bool) -> dict[str, float | None]:
    """Area under the curve of the residual of a solve cut short as a sign of wrong answers."""
    from sklearn.metrics import roc_auc_score

    length = LENGTHS[1] if quick else LENGTHS[-1]
    model = load(folder / "model.safetensors")
    _, solution, wrong = exact_at(model, length, quick, count=100, steps=CUT, rtol=0.0)
    mixed = 0 < int(wrong.sum()) < len(wrong)
    return {"auc": float(roc_auc_score(wrong, solution.residual)) if mixed else None}


def train(seed: int, folder: pathlib.Path, quick: bool) -> dict[str, Any]:
    """Train the recipe, and examine its equilibria."""
    start = time.process_time()
    result = fit(recipe(quick, seed), run_dir=folder, resume=True)
    processor = time.process_time() - start
    tested = result.test
    length = LENGTHS[1] if quick else LENGTHS[-1]
    spent = dict.fromkeys(("train", "validation", "test"), 0.0)
    for line in result.history:
        spent[line["split"]] += line["seconds"]
    return {
        "parameters": tested["parameters"],
        "seconds": processor * spent["train"] / sum(spent.values()),
        f"exact/{length}": tested["test_exact"],
        f"converged/{length}": tested["converged"],
        f"steps/{length}": tested["mean_steps"],
        **examine(result.model, quick),
    }


def train_rival(name: str, seed: int, seconds: float, rates: Sequence[float], quick: bool) -> dict[str, Any]:
    """Train a rival for some processor seconds, and examine it."""
    data = recipe(quick, seed).data
    splits = data.load()
    assert splits.validation is not None
    tried = [train_by_time(name, seed, seconds, rate, data, splits.train) for rate in rates]
    bits, y = next(splits.validation.batches(500))
    with torch.no_grad():
        losses = [float(F.cross_entropy(model(data.prepare(bits)), y)) for model in tried]
    best = min(range(len(rates)), key=losses.__getitem__)
    return {
        "rate": rates[best],
        "parameters": sum(p.numel() for p in tried[best].parameters()),
        "seconds": seconds,
        **examine_rival(tried[best], quick),
    }


def train_by_time(name: str, seed: int, seconds: float, rate: float, data: Data, split: Split) -> nn.Module:
    """Train a rival; its learning rate rises for a twentieth of the time, then falls by a cosine."""
    torch.manual_seed(seed)
    model, source, start = RIVALS[name](), generator(seed, 6), time.process_time()

    def done() -> float:
        return min(1.0, (time.process_time() - start) / seconds)

    def losses() -> Iterator[Tensor]:
        for *_, (bits, answers) in harness.endless(split, 100, seed):
            if done() == 1:
                return
            x = data.prepare(bits)
            yield model.loss(x, answers, source) if isinstance(model, Tied) else F.cross_entropy(model(x), answers)

    harness.descend(
        torch.optim.Adam(model.parameters(), lr=rate),
        losses(),
        lambda step: rate * min(done() / 0.05, 0.5 + 0.5 * math.cos(math.pi * done())),
        clip_norm=1.0,
    )
    return model.eval()


@torch.no_grad()
def examine_rival(model: nn.Module, quick: bool) -> dict[str, Any]:
    """Figures of a rival."""
    found = {}
    for length in LENGTHS[:2] if quick else LENGTHS:
        x, y = strings(length, quick)
        steps = Tied.depth * length // 32
        found[f"exact/{length}"] = exact(model(x, steps=steps) if isinstance(model, Tied) else model(x), y)
    if isinstance(model, Tied):
        found[f"exact/{length}-twice"] = exact(model(x, steps=2 * steps), y)
        found[f"steps/{length}"] = float(steps)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(
        __name__, argv, quick="three steps, one seed: seconds", seeds=3, workers=2, packages=("scikit-learn",),
        summary=summary,
    )  # fmt: skip
    quick, seeds = record.args.quick, range(record.args.seeds)
    folders = {seed: record.folder / str(seed) for seed in seeds}
    for folder in folders.values():
        folder.parent.mkdir(parents=True, exist_ok=True)
    record.measure_all({("runs", "equilibrium", s): functools.partial(train, s, folders[s], quick) for s in seeds})
    budget = 1.0 if quick else record.find("runs", "equilibrium", 0, "seconds")
    for seed in seeds:
        record.measure(functools.partial(doubt, folders[seed], quick), "doubts", seed)
    record.measure_all(
        {("runs", name, 0): functools.partial(train_rival, name, 0, budget, RATES, quick) for name in RIVALS}
    )
    record.measure_all(
        {
            ("runs", name, seed): functools.partial(
                train_rival, name, seed, budget, [record.find("runs", name, 0, "rate")], quick
            )
            for name in RIVALS
            for seed in seeds[1:]
        }
    )
    record.finish(table)
