"""Tables and figure of the bilevel benchmark."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks import harness

WITHIN = 1.01  # of the best held-out loss
SECONDS, EVALS, HELD_OUT, TEST = range(4)  # of a visited model, as records list it
COLUMNS = {
    "seconds_to_1pct": "seconds to 1 %",
    "grad_evals_to_1pct": "gradients to 1 %",
    "final_loss": "final loss",
    "excess": "excess, %",
    "solved_excess": "solved excess, %",
    "test_loss": "test loss",
    "seconds": "seconds in all",
    "grad_evals": "gradients in all",
}
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
Runs = Mapping[str, Mapping[str, Any]]  # by method, as records hold them


def per_seed(runs: Runs) -> dict[str, dict[str, float | None]]:
    """Metrics of each method on one seed."""
    best = min(run["chosen"][HELD_OUT] for run in runs.values())
    solved = min(run["solved"] for run in runs.values())
    tpe = runs["optuna-tpe"]
    found: dict[str, dict[str, float | None]] = {}
    for method, run in runs.items():

        def until(goal: float, visits: Any = run["visits"]) -> Sequence[float | None]:
            """The first model at least as good as a goal."""
            return next((visit for visit in visits if visit[HELD_OUT] <= goal), (None, None))

        there, level = until(WITHIN * best), until(tpe["chosen"][HELD_OUT])[SECONDS]
        found[method] = {
            "seconds_to_1pct": there[SECONDS],
            "grad_evals_to_1pct": there[EVALS],
            "final_loss": run["chosen"][HELD_OUT],
            "excess": run["chosen"][HELD_OUT] / best - 1,
            "solved_loss": run["solved"],
            "solved_excess": run["solved"] / solved - 1,
            "test_loss": run["chosen"][TEST],
            "seconds": run["total"][SECONDS],
            "grad_evals": run["total"][EVALS],
            "time_to_tpe_over_tpe": None if level is None else level / tpe["total"][SECONDS],
        }
    for ours, theirs in (("shine", "hoag"), ("shine/hoag-step", "hoag/hoag-step")):
        for key in ("seconds_to_1pct", "grad_evals_to_1pct") if ours in runs else ():
            own, other = found[ours][key], found[theirs][key]
            found[ours][f"{key}_over_hoag"] = None if own is None or other is None else own / other
    return found


def metrics(content: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Metrics as `<data>/<method>/<metric>`, a value for each seed; None: not reached."""
    found: dict[str, list[float | None]] = {}
    for data, seeds in content.get("runs", {}).items():
        for _, runs in sorted(seeds.items()):
            for key, value in harness.flatten(per_seed(runs)).items():
                found.setdefault(f"{data}/{key}", []).append(value)
    return found


def summary(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Medians over the seeds, and first and third quartiles; None counts as never."""
    medians, quartiles = {}, {}
    for key, values in metrics(content).items():
        reached = sorted(math.inf if value is None else value for value in values)
        low, high = (float(np.quantile(reached, part, method="inverted_cdf")) for part in (0.25, 0.75))
        middle, low, high = (v if math.isfinite(v) else None for v in (statistics.median(reached), low, high))  # type: ignore[assignment]
        medians[key], quartiles[key] = middle, [low, high]
    return medians, quartiles


def table(content: Mapping[str, Any]) -> str:
    """Medians with quartiles and the number of seeds that reach 1 %, then ratios to HOAG and to Optuna."""
    values, (medians, quartiles) = metrics(content), summary(content)
    rows = []
    for name in dict.fromkeys(key.rpartition("/")[0] for key in values):
        cells = []
        for metric in COLUMNS:
            every = [medians[f"{name}/{metric}"], *quartiles[f"{name}/{metric}"]]
            cells.append("{} ({}, {})".format(*(text(v, 100 if metric.endswith("excess") else 1) for v in every)))
        reached = values[f"{name}/seconds_to_1pct"]
        rows.append([name, *cells, f"{sum(value is not None for value in reached)}/{len(reached)}"])
    ratios = [(key, text(value)) for key, value in medians.items()
              if key.endswith(("_over_hoag", "/shine/time_to_tpe_over_tpe"))]  # fmt: skip
    head = ("median (quartiles) over the seeds", *COLUMNS.values(), "reached")
    return f"{harness.table(head, rows)}\n\n{harness.table(('ratio', 'median'), ratios)}"


def text(value: float | None, unit: float = 1) -> str:
    """A number with three digits, or a dash."""
    large = value is not None and abs(value * unit) >= 1000
    return harness.cell(None if value is None else value * unit, ",.0f" if large else ".3g")


def plot(content: Mapping[str, Any]) -> Figure:
    """Excess of the best held-out loss so far over the best of all methods, against time: median over the seeds."""
    results = {data: list(seeds.values()) for data, seeds in content["runs"].items() if seeds}
    figure = Figure(figsize=(4.2 * len(results), 4.2), layout="constrained", dpi=140)
    every = np.atleast_1d(figure.subplots(1, len(results), sharey=True))
    for axes, (data, seeds) in zip(every, results.items(), strict=True):
        ends = [runs[method]["total"][SECONDS] for runs in seeds for method in COLORS]
        times = np.geomspace(min(0.1, *ends), max(ends), 400)
        for method, color in COLORS.items():
            curves = np.array([excess(runs, method, times) for runs in seeds])
            low, middle, high = np.quantile(curves, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf")
            # A single answer is a point: there is nothing before it.
            if all(len(runs[method]["visits"]) == 1 for runs in seeds):
                at = statistics.median(runs[method]["total"][SECONDS] for runs in seeds)
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
    return figure


def excess(runs: Runs, method: str, times: np.ndarray) -> np.ndarray:
    """Excess of the best model so far, at each time; infinite before the first."""
    best = min(run["chosen"][HELD_OUT] for run in runs.values())
    visits = runs[method]["visits"]
    lowest = np.minimum.accumulate([math.inf, *(visit[HELD_OUT] for visit in visits)])
    known = np.searchsorted([visit[SECONDS] for visit in visits], times, side="right")
    return np.maximum(lowest[known] / best - 1, FLOOR)
