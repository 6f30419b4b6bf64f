"""Table of the few-shot benchmark, and a picture of a task."""

from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import harness

KINDS = {f"{ways}-way {shots}-shot": f"{ways}-way-{shots}-shot" for ways in (5, 20) for shots in (1, 5)}
GREEN, RED, GRAY = "#2a7f62", "#c44536", "#b8bec6"


def summary(content: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means over seeds as `<method>/<figure>`, and their standard deviations."""
    rows = {method: [harness.flatten(found) for found in seeds.values()]
            for method, seeds in content.get("results", {}).items()}  # fmt: skip
    return harness.summarize(rows)


def table(content: dict[str, Any]) -> str:
    """Accuracies of each method and seed with the half width of their 95 % interval."""
    rows = []
    for method, seeds in content["results"].items():
        for seed, found in seeds.items():
            kinds = [found.get(key) for key in KINDS.values()]
            cells = [f"{100 * kind['accuracy']:.1f} ± {100 * kind['interval']:.1f}" if kind else "" for kind in kinds]
            seconds = harness.cell(found.get("train_cpu_seconds"), ".0f", missing="")
            rows.append([method, seed, *cells, f"{100 * found['one_shot_runs_error']:.1f} %", seconds])
    return harness.table(("method", "seed", *KINDS, "20 runs, error", "CPU s"), rows)


def picture(images: Tensor, labels: Tensor, after: Tensor) -> Figure:
    """A task of five classes: support, and queries with the chances of each class before and after learning.

    Args:
        images: `(30, H, W)`, of which the first five are the support.
        labels: `(30,)`.
        after: `(25, 5)` chances of the queries after learning; before, all classes are as likely.
    """
    figure = Figure(figsize=(10, 2.6), layout="constrained", dpi=110)
    axes = figure.subplots(3, 10, height_ratios=[1, 0.6, 0.6])
    for column, number in enumerate([*range(5), *(5 + 5 * label for label in range(5))]):
        axes[0, column].imshow((255 - images[number]).numpy(), cmap="gray", vmin=0, vmax=255)
        axes[0, column].set_title(
            f"class {'ABCDE'[column]}" if column < 5 else f"a new {'ABCDE'[column - 5]}", fontsize=9
        )
        axes[0, column].set(xticks=[], yticks=[])
        for row in (1, 2):
            axis = axes[row, column]
            if column < 5:
                axis.axis("off")
                continue
            chances = [0.2] * 5 if row == 1 else after[number - 5].tolist()
            best = chances.index(max(chances)) if row == 2 else -1
            colors = [GREEN if c == labels[number] == best else RED if c == best else GRAY for c in range(5)]
            axis.bar(list("ABCDE"), chances, color=colors)
            axis.set(ylim=(0, 1), yticks=[])
            axis.tick_params(axis="x", length=0, labelsize=7)
            axis.spines[["top", "left", "right"]].set_visible(False)
    for row, text in ((1, "before: every class is as likely"), (2, "after learning from the five on the left")):
        axes[row, 4].text(1.0, 0.4, text, ha="right", fontsize=9, in_layout=False, transform=axes[row, 4].transAxes)
    return figure
