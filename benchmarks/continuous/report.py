"""Tables and figure of the benchmark of continuous and skip DEQs."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from benchmarks import harness
from benchmarks.continuous.settings import MILD, SWEPT
from equipoise.report.figures import BLUE, GRAY, GREEN, INK, RED, STYLE

COLUMNS = {
    "seeds": ("seeds", ".0f"),
    "test_accuracy": ("test accuracy", ".4f"),
    "nfe": ("evaluations", ".2f"),
    "backward_vjps": ("adjoint products", ".2f"),
    "train_step_ratio_to_node": ("step / node", ".3f"),
    "train_step_ratio_to_vanilla": ("step / vanilla", ".3f"),
    "median_residual": ("median residual", ".1e"),
    "train_step_ms": ("step, ms", ".2f"),
    "backward_ms": ("backward", ".2f"),
    "predict_ms": ("prediction", ".2f"),
}
FAR = 5e-2  # median residual beyond which a variant is far from its equilibrium


def summary(content: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means over the seeds whose training did not fail, as `<data>/<variant>/<figure>`, and standard deviations."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for data, variants in content.get("runs", {}).items():
        times = content.get("times", {}).get(data, {})
        for name, seeds in variants.items():
            timed = {seed: times.get(seed, {}).get("variants", {}).get(name, {}) for seed in seeds}
            rows[f"{data}/{name}"] = [run | timed[seed] for seed, run in seeds.items() if "failed" not in run]
    means, spreads = harness.summarize(rows)
    return means | {f"{key}/seeds": len(found) for key, found in rows.items()}, spreads


def table(content: dict[str, Any]) -> str:
    """Figures of all variants, times of the Neural ODEs, then the variants that reach each goal."""
    means, spreads = summary(content)
    nodes = [
        [data, seed, label.removeprefix("node, "), f"{ms:.1f}"]
        for data, seeds in content.get("times", {}).items()
        for seed, timed in sorted(seeds.items())
        for label, ms in timed["node_ms"].items()
    ]
    parts = [
        *(harness.figure_table([f"{data}/{name}" for name in runs], COLUMNS, means, spreads)
          for data, runs in content["runs"].items()),
        harness.table(("Neural ODE", "seed", "method", "ms a step"), nodes),
        *(f"{text}:\n\n- " + ("\n- ".join(names) or "none") for text, names in reached(means, spreads).items()),
    ]  # fmt: skip
    return "\n\n".join(parts)


def reached(means: harness.Means, spreads: harness.Means) -> dict[str, list[str]]:
    """Goals, and the variants that reach them near their equilibrium."""

    def as_accurate(key: str, other: str) -> bool:
        """Within one standard deviation, the larger of the two."""
        own, reference = (means.get(f"{name}/test_accuracy") for name in (key, other))
        if own is None or reference is None:
            return False
        return own >= reference - max(spreads.get(f"{name}/test_accuracy") or 0.0 for name in (key, other))

    far, stateless, fast, sooner, few = ([] for _ in range(5))
    for key in (key.removesuffix("/seeds") for key in means if key.endswith("/seeds")):
        data, _, name = key.partition("/")
        model, solver, penalized, _ = parts(name)
        residual, nfe = means.get(f"{key}/median_residual"), means.get(f"{key}/nfe")
        if residual is None or nfe is None:
            continue
        if residual > FAR:
            far.append(key)
            continue
        # A map that is exact after one step does not depend on its state.
        if residual == 0:
            stateless.append(key)
        vanilla = f"{data}/vanilla-{solver}{'-jac' if penalized else ''}"
        node, own = (means.get(f"{key}/train_step_ratio_to_{other}") for other in ("node", "vanilla"))
        continuous, skips = solver in ("vcab3", "tsit5"), model != "vanilla"
        if continuous and node is not None and node <= 1 / 2 and as_accurate(key, f"{data}/node"):
            fast.append(f"{key}: {1 / node:.2f} times")
        if continuous and skips and own is not None and own <= 1 / 1.5 and as_accurate(key, vanilla):
            sooner.append(f"{key}: {1 / own:.2f} times")
        before, after = (means.get(f"{other}/test_accuracy") for other in (vanilla, key))
        if data == "mnist" and skips and nfe <= 5 and before is not None and after is not None:
            lost = before - after
            if lost <= 0.01:
                few.append(f"{key}: from {means[f'{vanilla}/nfe']:.1f} to {nfe:.1f}, {100 * lost:.2f} points lost")
    return {
        f"Far from equilibrium (median residual above {FAR})": far,
        "Independent of the state (residual 0)": stateless,
        "Continuous, at least 2 times faster a step than the Neural ODE, as accurate": fast,
        "Skip or Skip Reg, at least 1.5 times faster a step than vanilla with the same flow, as accurate": sooner,
        "MNIST with at most 5 evaluations, at most 1 point lost": few,
    }


COLORS = {"vanilla": GRAY, "skip": BLUE, "skip-reg": GREEN, "node": RED}
MARKERS = {"anderson": "o", "broyden": "s", "vcab3": "D", "tsit5": "^"}


def parts(name: str) -> tuple[str, str, bool, str]:
    """Model, solver, whether penalized, and the weight of the skip penalty unless it is that of the grid."""
    if name == "node":
        return "node", "", False, ""
    pieces = name.split("-")
    at = next(i for i, piece in enumerate(pieces) if piece in MARKERS)
    return "-".join(pieces[:at]), pieces[at], "jac" in pieces[at:], pieces[-1][1:] if pieces[-1][0] == "w" else ""


@matplotlib.rc_context(STYLE)
def plot(content: dict[str, Any]) -> Figure:
    """Accuracy against the time of a step on each data set; evaluations against the weight of the skip penalty."""
    means, spreads = summary(content)
    figure = Figure(figsize=(10.5, 7.8), layout="constrained", dpi=160)
    *scatters, last = figure.subplots(2, 2).flat
    for axes, data in zip(scatters, ("mnist", "fashion-mnist", "multiscale"), strict=True):
        _scatter(axes, data, means, spreads)
    _weights(last, means)
    handles = [Line2D([], [], color=c, marker="o", ls="none", label=name) for name, c in COLORS.items()]
    handles[-1].set_marker("*")
    handles[-1].set_markersize(10)
    handles += [Line2D([], [], color=INK, marker=m, ls="none", label=name) for name, m in MARKERS.items()]
    handles.append(Line2D([], [], color=INK, marker="o", mfc="none", ls="none", label="with Jacobian penalty"))
    handles.append(Line2D([], [], color=INK, marker="o", fillstyle="left", ls="none", label=f"skip weight {MILD:g}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=10, columnspacing=1.0, handletextpad=0.3)
    return figure


def _names(means: harness.Means, data: str) -> list[str]:
    return [key.split("/")[1] for key in means if key.startswith(f"{data}/") and key.endswith("/seeds")]


def _scatter(axes: Axes, data: str, means: harness.Means, spreads: harness.Means) -> None:
    for name in _names(means, data):
        model, solver, penalized, weight = parts(name)
        x, y = (means.get(f"{data}/{name}/{key}") for key in ("train_step_ratio_to_node", "test_accuracy"))
        if x is None or y is None or weight not in ("", f"{MILD:g}"):
            continue
        color = COLORS[model]
        axes.errorbar(
            x, y, spreads.get(f"{data}/{name}/test_accuracy") or 0.0,
            color=color, marker=MARKERS.get(solver, "*"), markersize=12 if model == "node" else 6,
            mfc="none" if penalized else color, elinewidth=0.7, fillstyle="left" if weight else "full",
            alpha=0.35 if (means[f"{data}/{name}/median_residual"] or 0.0) > FAR else 1.0,
        )  # fmt: skip
    axes.axvline(1, color=RED, lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else ""))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set(xlabel="time of a training step, over that of the Neural ODE", ylabel="test accuracy")
    axes.set_title(data, loc="left", color=INK)


def _weights(axes: Axes, means: harness.Means) -> None:
    """Evaluations, and accuracy on an axis of its own."""
    right = axes.twinx()
    for model in ("skip", "skip-reg"):
        keys = [f"mnist/{n}" for n in _names(means, "mnist") if parts(n)[:3] == (model, SWEPT, False)]
        points = [tuple(means[f"{key}/{figure}"] for figure in ("skip_weight", "nfe", "test_accuracy")) for key in keys
                  if means.get(f"{key}/nfe") is not None]  # fmt: skip
        if points:
            weights, nfe, accuracy = zip(*sorted(points), strict=True)
            axes.plot(weights, nfe, "D-", color=COLORS[model])
            right.plot(weights, accuracy, "x:", color=COLORS[model], lw=1.2)
    for side, key, style in ((axes, "nfe", "-"), (right, "test_accuracy", ":")):
        level = means.get(f"mnist/vanilla-{SWEPT}/{key}")
        if level is not None:
            side.axhline(level, color=GRAY, ls=style, lw=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.1, 1, 5]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set(xlabel="weight of the skip penalty", ylabel="evaluations (solid)")
    right.set_ylabel("test accuracy (dotted)", color=GRAY)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    right.grid(False)
    axes.set_title(f"mnist, {SWEPT}; gray: vanilla", loc="left", color=INK)
