"""Tables and figure of the benchmark of inversion quality."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks import harness
from equipoise.report.figures import BLUE, GRAY, GREEN, ORANGE, RED, STYLE

KINDS = ("prescribed", "krylov", "random")
COLUMNS = {
    "cosine_median": ("cosine: median", ".7f"),
    "cosine_min": ("least", ".5f"),
    "ratio_median": ("ratio: median", ".4f"),
    "ratio_min": ("least", ".3f"),
    "ratio_max": ("largest", ".3f"),
    "evals": ("evaluations", ".0f"),
}
# Median and least cosine, median ratio and its range: the authors' solver with their settings, run again.
PUBLISHED = {
    ("OPA 5", "prescribed"): (0.99996, 0.9957, 1.0003, 0.990, 1.047),
    ("OPA 5", "krylov"): (1.0, 1.0, 1.0, 1.0, 1.0),
    ("OPA 5", "random"): (0.99865, 0.9913, 1.035, 1.009, 1.112),
    ("OPA off", "prescribed"): (0.99909, 0.9882, 1.0325, 1.002, 1.125),
    ("OPA 1", "prescribed"): (1.0, 0.9978, 1.0, 1.0, 1.113),
}
FLOOR = 1e-9  # cosines nearer to one are drawn there
COLORS = {  # of the estimators of the adjoint
    "Jacobian-free": GRAY,
    "SHINE, Broyden": ORANGE,
    "SHINE, adjoint Broyden": BLUE,
    "SHINE, adjoint Broyden, OPA 5": RED,
    "Neumann, 5 products": "#a04f86",
    "SHINE refined by 5 steps": GREEN,
}


def table(content: dict[str, Any]) -> str:
    """L-BFGS by setting and direction, then the estimators of the adjoint by training step."""
    figures = dict(harness.figures_of(content))
    names = [f"{key.rpartition('/')[0]}/{kind}" for key in figures if key.startswith("lbfgs/") for kind in KINDS
             if key.endswith("/evals")]  # fmt: skip
    for name in names:
        figures[f"{name}/evals"] = figures[f"{name.rpartition('/')[0]}/evals"]
    for (setting, kind), values in PUBLISHED.items():
        names.append(f"published/{setting}/{kind}")
        figures |= {f"{names[-1]}/{key}": value for key, value in zip(COLUMNS, values, strict=False)}
    steps = dict.fromkeys(key.split("/")[1] for key in figures if key.startswith("mdeq/"))
    cosines = [
        [name, *(harness.cell(figures[f"mdeq/{step}/{name}/cosine"], ".4f") for step in steps)] for name in COLORS
    ]
    return "\n\n".join([
        harness.figure_table(names, COLUMNS, figures, {}),
        harness.table(["MDEQ: median cosine at step", *steps], cosines),
    ])  # fmt: skip


@matplotlib.rc_context(STYLE)
def plot(content: dict[str, Any]) -> Figure:
    """Cosines and ratios of single runs of L-BFGS, and cosines of the estimators of the adjoint.

    Raises:
        SystemExit: the record is one of November 2026, which holds no single runs.
    """
    if "lbfgs" not in content:
        raise SystemExit("the record holds no single runs, which the figure shows; measure again")
    figure = Figure(figsize=(11.5, 4.0), layout="constrained", dpi=130)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for axes, awareness in ((left, "OPA off"), (middle, "OPA 5")):
        found = content["lbfgs"][f"nearly exact, {awareness}"]
        for kind, color, marker in zip(KINDS, (RED, BLUE, GRAY), "oDs", strict=True):
            axes.scatter(
                found["ratio"][kind], np.maximum(1 - np.array(found["cosine"][kind]), FLOOR),
                s=16, marker=marker, color=color, alpha=0.6, lw=0, label=kind,
            )  # fmt: skip
        axes.set(title=f"L-BFGS, {awareness}", xlabel="ratio of norms, estimate to exact", xlim=(0.94, 1.13))
        axes.set(yscale="log", ylim=(FLOOR / 3, 0.03))
        axes.invert_yaxis()
        axes.minorticks_off()
    left.set_ylabel("1 - cosine with the exact product, at least 1e-9")
    left.legend(loc="upper right")
    for name, color in COLORS.items():
        values = [found[f"{name}/cosine"] for found in content["mdeq"].values()]
        # Two lines nearly hide behind others.
        dashed = {"ls": "--", "zorder": 3} if name in ("SHINE, Broyden", "Neumann, 5 products") else {}
        right.plot([int(s) for s in content["mdeq"]], values, color=color, marker="o", ms=4, label=name, **dashed)
    right.set(title="MDEQ on digits", xlabel="training step", ylabel="cosine with the exact adjoint, median")
    right.set_ylim(top=1.005)
    right.legend(loc="best", fontsize=8)
    return figure
