"""Table and figure of the benchmark of backward cost."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter

from benchmarks import harness
from equipoise.report.figures import BLUE, GRAY, GREEN, INK, ORANGE, STYLE

FAMILIES = {  # label, color, marker, and the offset of the names of points
    "original": ("implicit from zero, k steps", GRAY, "s", (-6, -13)),
    "jfb": ("Jacobian-free, refined by k steps", ORANGE, "o", (-6, 7)),
    "shine": ("SHINE, refined by k steps", BLUE, "D", (5, -13)),
    "shine-opa": ("SHINE-OPA", GREEN, "^", (-9, -13)),
}
COLUMNS = {
    "seeds": ("seeds", ".0f"),
    "test_accuracy": ("test accuracy", ".4f"),
    "validation_accuracy": ("validation", ".4f"),
    "backward_ms": ("backward, ms", ".4g"),
    "backward_ratio": ("ratio", ".4g"),
    "forward_ms": ("forward, ms", ".4g"),
    "vjps": ("products", ".4g"),
    "cosine": ("cosine", ".4g"),
    "exact_residual": ("residual of the exact gradient", ".4g"),
    "fallback_rate": ("fallback", ".4g"),
    "radius_min": ("radius, least", ".4g"),
    "radius_median": ("median", ".4g"),
    "radius_max": ("largest", ".4g"),
    "nonlinear_gain": ("gain", ".4g"),
    "converged": ("converged", ".4g"),
    "seconds": ("training, s", ".4g"),
}


def names_of(content: dict[str, Any]) -> list[str]:
    """Variants as `<data>/<family>/<k>`, in the order of families and steps."""

    def order(name: str) -> tuple[int, float]:
        _, family, k = name.split("/")
        return list(FAMILIES).index(family), float("inf") if k == "full" else int(k)

    return sorted({key.rpartition("/")[0] for key in content["figures"]}, key=order)


def table(content: dict[str, Any]) -> str:
    """Figures of all variants."""
    return harness.figure_table(names_of(content), COLUMNS, content["figures"], harness.spreads_of(content))


@matplotlib.rc_context(STYLE)
def plot(content: dict[str, Any]) -> Figure:
    """Accuracy against the time of a backward pass, a line a family, points named by k, of variants with all seeds."""
    figures, spreads, seeds = content["figures"], harness.spreads_of(content), len(content["costs"])
    figure = Figure(figsize=(7.2, 4.6), layout="constrained", dpi=160)
    axes = figure.subplots()
    # A mean of fewer seeds than the others' has no place beside them.
    complete = [name for name in names_of(content) if figures[f"{name}/seeds"] == seeds]
    for family, (label, color, marker, offset) in FAMILIES.items():
        members = [name for name in complete if name.split("/")[1] == family]
        if not members:
            continue
        x, y = ([figures[f"{name}/{key}"] for name in members] for key in ("backward_ms", "test_accuracy"))
        spread = [spreads.get(f"{name}/test_accuracy", 0.0) for name in members]
        axes.errorbar(x, y, spread, color=color, marker=marker, label=label, capsize=3, elinewidth=0.9)
        side = "left" if offset[0] > 0 else "right"
        for name, a, b in zip(members, x, y, strict=True):
            k = name.split("/")[2]
            axes.annotate(k, (a, b), offset, textcoords="offset points", color=color, fontsize=8.5, ha=side)
    axes.set(xscale="log", xlabel="backward pass of a batch, ms", ylabel="test accuracy")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    figure.legend(loc="outside lower center", ncols=2)
    title = f"{complete[0].split('/')[0]}: mean and standard deviation of seeds 0 to {seeds - 1}"
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    return figure
