"""Table and figure of the benchmark of reasoning."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import harness
from equipoise.report.figures import BLUE, INK, STYLE

COLUMNS = {
    "parameters": ("parameters", ",.0f"),
    "seconds": ("seconds of training", ".0f"),
    **{f"exact/{length}": (f"{length} bits", ".1%") for length in (32, 64, 128, 256, 512)},
    "exact/512-twice": ("twice the steps", ".1%"),
    "exact/512-random": ("random start", ".1%"),
    "exact/512-first": ("first step", ".1%"),
    "converged/512": ("converged", ".1%"),
    "steps/512": ("steps", ".0f"),
    "auc": ("AUC of the residual", ".3f"),
}


def summary(content: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means over seeds as `<model>/<figure>`, and their standard deviations."""
    doubts, runs = content.get("doubts", {}), content.get("runs", {})
    rows = {name: list(seeds.values()) for name, seeds in runs.items()}
    rows["equilibrium"] = [run | doubts.get(seed, {}) for seed, run in runs.get("equilibrium", {}).items()]
    return harness.summarize(rows)


def table(content: dict[str, Any]) -> str:
    """Figures of all models."""
    return harness.figure_table(content["runs"], COLUMNS, *summary(content))


@matplotlib.rc_context(STYLE)
def plot(content: dict[str, Any]) -> Figure:
    """Exact answers of 512 bits against the number of steps."""
    runs = content["runs"]["equilibrium"].values()
    figure = Figure(figsize=(6.4, 3.8), layout="constrained", dpi=160)
    axes = figure.subplots()
    for number, run in enumerate(runs):
        points = sorted((int(key.split("/")[1]), value) for key, value in run.items() if key.startswith("curve/"))
        label = "seeds 0 to 2" if not number else None
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4, lw=1.4, label=label)
    axes.set(xlabel="steps of the map", ylabel="strings of 512 bits all right", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.axvline(14 + 10, color=INK, lw=0.8, ls=":")
    axes.annotate("most steps in training", (26, 0.5), color=INK, fontsize=9)
    axes.legend(frameon=False, loc="lower right")
    return figure
