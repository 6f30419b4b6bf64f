"""Report of the bilevel benchmark: metrics of each seed, medians, the table and the figure."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table

from benchmarks.bilevel.problems import Run, Visit

WITHIN = 1.01  # of the best held-out loss
Results = Mapping[str, Mapping[int, Mapping[str, Run]]]  # by data set, seed and method
COLORS = {
    "shine": "#d55e00",
    "shine-opa": "#cc79a7",
    "shine-refine": "#e69f00",
    "hoag": "#0072b2",
    "jacobian-free": "#009e73",
    "grid": "#999999",
    "optuna-tpe": "#000000",
    "sklearn-cv": "#56b4e9",
}
FLOOR = 1e-4  # least excess drawn


def until(run: Run, goal: float) -> Visit | None:
    """The first model at least as good as a goal."""
    return next((visit for visit in run.visits if visit.held_out <= goal), None)


def per_seed(runs: Mapping[str, Run]) -> dict[str, dict[str, float | None]]:
    """Metrics of each method on one seed."""
    best = min(run.chosen.held_out for run in runs.values())
    solved = min(run.solved for run in runs.values())
    tpe = runs["optuna-tpe"]
    found: dict[str, dict[str, float | None]] = {}
    for method, run in runs.items():
        there, level = until(run, WITHIN * best), until(run, tpe.chosen.held_out)
        found[method] = {
            "seconds_to_1pct": None if there is None else there.seconds,
            "grad_evals_to_1pct": None if there is None else there.evals,
            "final_loss": run.chosen.held_out,
            "excess": run.chosen.held_out / best - 1,
            "solved_loss": run.solved,
            "solved_excess": run.solved / solved - 1,
            "test_loss": run.chosen.test,
            "seconds": run.seconds,
            "grad_evals": run.evals,
            "time_to_tpe_over_tpe": None if level is None else level.seconds / tpe.seconds,
        }
    for rule in ("", "/hoag-step"):
        if f"shine{rule}" not in runs:
            continue
        for key in ("seconds_to_1pct", "grad_evals_to_1pct"):
            ours, theirs = found[f"shine{rule}"][key], found[f"hoag{rule}"][key]
            found[f"shine{rule}"][f"{key}_over_hoag"] = None if ours is None or theirs is None else ours / theirs
    return found


def quartiles(values: Sequence[float | None]) -> list[float | None]:
    """First quartile, median and third; None counts as never."""
    reached = sorted(math.inf if value is None else value for value in values)
    low, high = (float(np.quantile(reached, part, method="inverted_cdf")) for part in (0.25, 0.75))
    return [value if math.isfinite(value) else None for value in (low, statistics.median(reached), high)]


def summary(results: Results) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Medians by key, and quartiles with the values of each seed."""
    medians: dict[str, float | None] = {}
    details: dict[str, Any] = {}
    for data, seeds in results.items():
        tables = [per_seed(runs) for _, runs in sorted(seeds.items())]
        if not tables:  # a run that is not finished
            continue
        for method in tables[0]:
            for metric in tables[0][method]:
                values = [table[method][metric] for table in tables]
                low, middle, high = quartiles(values)
                medians[f"{data}/{method}/{metric}"] = middle
                details[f"{data}/{method}/{metric}"] = {"quartiles": [low, high], "seeds": values}
    return medians, details


def show(console: Console, medians: Mapping[str, float | None], details: Mapping[str, Any]) -> None:
    """The table: median and quartiles."""
    metrics = {
        "seconds_to_1pct": "seconds to 1 %",
        "grad_evals_to_1pct": "gradients to 1 %",
        "final_loss": "final loss",
        "excess": "excess, %",
        "solved_excess": "solved excess, %",
        "test_loss": "test loss",
        "seconds": "seconds in all",
        "grad_evals": "gradients in all",
    }
    table = Table("data", "method", *metrics.values(), "reached", title="median (quartiles) over the seeds")
    last = None
    for key in dict.fromkeys(key.rpartition("/")[0] for key in medians):
        data, _, method = key.partition("/")
        cells = []
        for metric in metrics:
            unit = 100 if metric.endswith("excess") else 1
            values = (medians[f"{key}/{metric}"], *details[f"{key}/{metric}"]["quartiles"])
            cells.append("{} ({}, {})".format(*(text(value, unit) for value in values)))
        seeds = details[f"{key}/seconds_to_1pct"]["seeds"]
        reached = f"{sum(value is not None for value in seeds)}/{len(seeds)}"
        if last not in (None, data):
            table.add_section()
        table.add_row("" if data == last else data, method, *cells, reached)
        last = data
    console.print(table)
    for key, value in medians.items():
        if key.endswith(("_over_hoag", "/shine/time_to_tpe_over_tpe")):
            console.print(f"{key}: {text(value, 1)}", highlight=False)


def text(value: float | None, unit: float) -> str:
    """A number with three digits, or a dash."""
    if value is None:
        return "-"
    return f"{value * unit:,.0f}" if abs(value * unit) >= 1000 else f"{value * unit:.3g}"


def plain(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """All runs as JSON data; of a model, seconds, gradients, held-out and test loss."""

    def one(run: Run) -> dict[str, Any]:
        visits = [model(visit) for visit in run.visits]
        hyper = [digits(value) for value in run.chosen.hyper]
        total = [run.seconds, run.evals]
        return {"end": run.end, "total": total, "chosen": model(run.chosen), "log_alpha": hyper, "solved": run.solved,
                "visits": visits}  # fmt: skip

    return {
        data: {str(seed): {method: one(run) for method, run in runs.items()} for seed, runs in seeds.items()}
        for data, seeds in results.items()
    }


def restored(content: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[int, dict[str, Run]]]:
    """The inverse of `plain`, up to digits."""

    def visit(values: Sequence[Any], hyper: list[float]) -> Visit:
        seconds, evals, held_out, test = values
        return Visit(seconds, evals, held_out, test, hyper)

    def one(run: Mapping[str, Any]) -> Run:
        (seconds, evals), chosen = run["total"], visit(run["chosen"], run["log_alpha"])
        return Run([visit(v, []) for v in run["visits"]], seconds, evals, run["end"], chosen, run["solved"])

    return {
        data: {int(seed): {method: one(run) for method, run in runs.items()} for seed, runs in seeds.items()}
        for data, seeds in content.items()
    }


def model(visit: Visit) -> list[float]:
    return [digits(visit.seconds), visit.evals, digits(visit.held_out), digits(visit.test)]


def digits(value: float) -> float:
    return float(f"{value:.8g}")


def plot(results: Results, path: pathlib.Path) -> None:
    """Excess of the best held-out loss so far over the best of all methods, against time: median over the seeds."""
    results = {data: seeds for data, seeds in results.items() if seeds}
    figure = Figure(figsize=(4.2 * len(results), 4.2), layout="constrained")
    every = np.atleast_1d(figure.subplots(1, len(results), sharey=True))
    for axes, (data, seeds) in zip(every, results.items(), strict=True):
        ends = [run.seconds for runs in seeds.values() for method, run in runs.items() if method in COLORS]
        times = np.geomspace(min(0.1, *ends), max(ends), 400)
        for method, color in COLORS.items():
            curves = np.array([excess(runs, method, times) for runs in seeds.values()])
            low, middle, high = np.quantile(curves, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf")
            # A single answer is a point: there is nothing before it.
            if all(len(runs[method].visits) == 1 for runs in seeds.values()):
                at = statistics.median(runs[method].seconds for runs in seeds.values())
                axes.plot(at, middle[-1], "o", color=color, label=method)
                continue
            axes.fill_between(times, low, high, color=color, alpha=0.12, linewidth=0)
            axes.plot(times, middle, color=color, label=method, linewidth=2.2 if method == "shine" else 1.5)
        axes.set(xscale="log", yscale="log", xlabel="seconds", ylim=(FLOOR * 0.8, 10), title=data)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axhline(WITHIN - 1, color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
        axes.grid(alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("held-out loss above the best, relative")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(COLORS), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def excess(runs: Mapping[str, Run], method: str, times: np.ndarray) -> np.ndarray:
    """Of the best model so far, at each time; infinite before the first."""
    best = min(run.chosen.held_out for run in runs.values())
    visits = runs[method].visits
    lowest = np.minimum.accumulate([math.inf, *(visit.held_out for visit in visits)])
    known = np.searchsorted([visit.seconds for visit in visits], times, side="right")
    return np.maximum(lowest[known] / best - 1, FLOOR)
