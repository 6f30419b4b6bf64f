"""Table and figure of the benchmark of certified models."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, PercentFormatter

from benchmarks import harness
from equipoise.report.figures import BLUE, GRAY, GREEN, INK, STYLE

BASELINE = "mdeq"
COLUMNS = {
    "seeds": ("seeds", ".0f"),
    "test_accuracy": ("test accuracy", ".4f"),
    "evals_forward": ("evaluations forward", ".3g"),
    "evals_backward": ("products backward", ".3g"),
    "evals_ratio": ("ratio of both", ".3g"),
    "train_step_ratio": ("step time", ".3g"),
    "inference_ratio": ("inference", ".3g"),
    "converged_fraction": ("converged", ".1%"),
    "median_residual": ("residual", ".1e"),
    "certified_L": ("certified L", ".3g"),
    "tightness": ("tightness", ".3g"),
}


def summary(content: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means over seeds as `<variant>/<figure>`, and their standard deviations."""
    runs = {name: seeds for name, seeds in content.get("runs", {}).items() if seeds}
    times = content.get("times", {})
    means, spreads = harness.summarize(
        {name: [run | times.get(seed, {}).get(name, {}) for seed, run in seeds.items()] for name, seeds in runs.items()}
    )
    spent = {name: sum(means[f"{name}/evals_{way}"] or 0.0 for way in ("forward", "backward")) for name in runs}
    for name, seeds in runs.items():
        means[f"{name}/seeds"] = len(seeds)
        if BASELINE in runs:
            means[f"{name}/evals_ratio"] = spent[name] / spent[BASELINE]
    return means, spreads


def table(content: dict[str, Any]) -> str:
    """Figures of all variants."""
    return harness.figure_table(content["runs"], COLUMNS, *summary(content))


@matplotlib.rc_context(STYLE)
def plot(content: dict[str, Any]) -> Figure:
    """Accuracy against the time of a training step."""
    means, spreads = summary(content)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained", dpi=160)
    axes = figure.subplots()
    families = {"mdeq": ("published layers", GRAY, "s"), "lipschitz": ("scaled layers, slope s", BLUE, "o")}
    families["tight"] = ("SLL layers, ceiling of the budget", GREEN, "D")
    for family, (label, color, marker) in families.items():
        names = [n for n in content["runs"] if n.split("-")[0] == family and f"{n}/train_step_ratio" in means]
        x, y = ([means[f"{name}/{key}"] or 0.0 for name in names] for key in ("train_step_ratio", "test_accuracy"))
        spread = [spreads.get(f"{name}/test_accuracy", 0.0) for name in names]
        axes.errorbar(x, y, spread, color=color, marker=marker, ls="none", label=label, capsize=3, elinewidth=0.9)
        # Points of both kinds of layers lie close together: names of one stand on the left, of the other on the right.
        for name, a, b in zip(names, x, y, strict=True):
            text = name if family == "mdeq" else name.split("-")[1]
            side, ha = (-6, "right") if family == "lipschitz" or 0.9 < a < 1 else (6, "left")
            above = 5 if family == "tight" or b == max(y) else -12
            axes.annotate(text, (a, b), (side, above), textcoords="offset points", color=color, fontsize=8.5, ha=ha)
    axes.set(
        xlabel="time of a training step, over that of mdeq", ylabel="test accuracy", xscale="log", xlim=(0.22, 1.4)
    )
    axes.xaxis.set_major_locator(FixedLocator([0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    seeds = sorted({seed for runs in content["runs"].values() for seed in runs}, key=int)
    axes.set_title(f"mean and standard deviation of seeds {', '.join(seeds)}", color=INK, fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
