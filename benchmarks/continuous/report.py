"""Report of the continuous benchmark: means and standard deviations, tables, which variants reach what, the figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

from benchmarks.continuous.settings import MILD, SWEPT
from equipoise.report.figures import BLUE, GRAY, GREEN, INK, RED, STYLE

FIGURES = (
    *("test_accuracy", "nfe", "backward_vjps"),
    *("train_step_ratio_to_node", "train_step_ratio_to_vanilla", "median_residual"),
)
BESIDES = (
    *("validation_accuracy", "converged", "train_step_ms", "backward_ms", "predict_ms"),
    *("train_step_ratio_to_node_first_step_1", "skip_weight", "parameters", "seconds"),
)
FAR = 5e-2  # median residual beyond which a variant is far from its equilibrium


def rows(content: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Data set, variant and the figures of each seed whose training did not fail."""
    for data, variants in content["runs"].items():
        for name, seeds in variants.items():
            found = []
            for seed, run in seeds.items():
                timed = content["times"].get(data, {}).get(seed, {}).get("variants", {}).get(name, {})
                if "failed" not in run:
                    found.append(run | timed)
            if seeds:
                yield data, name, found


def summary(content: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Means over seeds as `<data>/<variant>/<figure>`; and as details the standard deviations, and the means of what
    is told besides."""
    means: dict[str, float | None] = {}
    spreads: dict[str, float] = {}
    besides: dict[str, Any] = {}
    for data, name, seeds in rows(content):
        for figure in (*FIGURES, *BESIDES):
            values = [run[figure] for run in seeds if run.get(figure) is not None]
            mean = statistics.fmean(values) if values else None
            if figure in FIGURES:
                means[f"{data}/{name}/{figure}"] = mean
                if len(values) > 1:
                    spreads[f"{data}/{name}/{figure}"] = statistics.stdev(values)
            elif mean is not None:
                besides[f"{data}/{name}/{figure}"] = mean
        besides[f"{data}/{name}/seeds"] = len(seeds)
    return means, {"standard_deviations": spreads, "means": besides}


def show(content: dict[str, Any]) -> None:
    """All tables, then which variants reach what."""
    console = Console(width=190)
    means, details = summary(content)
    for data in content["runs"]:
        if any(key.startswith(f"{data}/") for key in means):
            console.print(table(content, data, means, details))
        for seed, timed in sorted(content["times"].get(data, {}).items()):
            ms = ", ".join(f"{name.removeprefix('node, ')} {value:.1f}" for name, value in timed["node_ms"].items())
            console.print(f"  Neural ODE, ms a step, seed {seed}: {ms}", highlight=False)
    for text, names in reached(content, means, details).items():
        console.print(f"\n[bold]{text}[/]\n  " + ("\n  ".join(names) or "none"), highlight=False)


def table(content: dict[str, Any], data: str, means: dict[str, float | None], details: dict[str, Any]) -> Table:
    """One line a variant; what is far from its equilibrium is marked."""
    columns = {
        "test_accuracy": "test accuracy",
        "nfe": "evaluations",
        "backward_vjps": "adjoint products",
        "train_step_ratio_to_node": "step / node",
        "train_step_ratio_to_vanilla": "step / vanilla",
        "median_residual": "median residual",
    }
    more = {"train_step_ms": "step, ms", "backward_ms": "backward", "predict_ms": "prediction"}
    view = Table(data, "seeds", *columns.values(), *more.values(), title=f"{data}: mean ± standard deviation of seeds")
    for name in content["runs"][data]:
        key = f"{data}/{name}"
        if f"{key}/seeds" not in details["means"]:
            continue
        cells = []
        for column in columns:
            value, spread = means[f"{key}/{column}"], details["standard_deviations"].get(f"{key}/{column}")
            form = {"test_accuracy": ".4f", "nfe": ".2f", "backward_vjps": ".2f", "median_residual": ".1e"}
            text = "-" if value is None else f"{value:{form.get(column, '.3f')}}"
            cells.append(text if spread is None else f"{text} ± {spread:{form.get(column, '.3f')}}")
        cells[-1] += remark(means[f"{key}/median_residual"])
        cells += [
            "-" if (value := details["means"].get(f"{key}/{column}")) is None else f"{value:.2f}" for column in more
        ]
        view.add_row(name, str(details["means"][f"{key}/seeds"]), *cells)
    return view


def remark(residual: float | None) -> str:
    """What a median residual says of a variant."""
    if residual is None:
        return ""
    # A map that is exact after one step does not depend on its state.
    return " FAR" if residual > FAR else " STATELESS" if residual == 0 else ""


def reached(content: dict[str, Any], means: dict[str, float | None], details: dict[str, Any]) -> dict[str, list[str]]:
    """What was aimed at, and the variants that reach it near their equilibrium."""
    spread = details["standard_deviations"]

    def as_accurate(key: str, other: str) -> bool:
        """Within one standard deviation, the larger of the two."""
        own, reference = (means.get(f"{name}/test_accuracy") for name in (key, other))
        if own is None or reference is None:
            return False
        return own >= reference - max(spread.get(f"{name}/test_accuracy", 0.0) for name in (key, other))

    fast: list[str] = []
    sooner: list[str] = []
    few: list[str] = []
    for data, name, _ in rows(content):
        model, solver, penalized, _ = parts(name)
        key, vanilla = f"{data}/{name}", f"{data}/vanilla-{solver}{'-jac' if penalized else ''}"
        residual, nfe = means[f"{key}/median_residual"], means[f"{key}/nfe"]
        if model == "node" or residual is None or residual > FAR or nfe is None:
            continue
        told = f"{key}{remark(residual)}"
        node, own = (means[f"{key}/train_step_ratio_to_{other}"] for other in ("node", "vanilla"))
        continuous, skips = solver in ("vcab3", "tsit5"), model != "vanilla"
        if continuous and node is not None and node <= 1 / 2 and as_accurate(key, f"{data}/node"):
            fast.append(f"{told}: {1 / node:.2f} times")
        if continuous and skips and own is not None and own <= 1 / 1.5 and as_accurate(key, vanilla):
            sooner.append(f"{told}: {1 / own:.2f} times")
        accuracies = [means.get(f"{other}/test_accuracy") for other in (vanilla, key)]
        if data == "mnist" and skips and nfe <= 5 and None not in accuracies:
            lost = accuracies[0] - accuracies[1]  # type: ignore[operator]
            if lost <= 0.01:
                few.append(f"{told}: from {means[f'{vanilla}/nfe']:.1f} to {nfe:.1f}, {100 * lost:.2f} points lost")
    return {
        "Continuous, at least 2 times faster a step than the Neural ODE, as accurate": fast,
        "Skip or Skip Reg, at least 1.5 times faster a step than vanilla with the same flow, as accurate": sooner,
        "MNIST with at most 5 evaluations, at most 1 point lost": few,
    }


COLORS = {"vanilla": GRAY, "skip": BLUE, "skip-reg": GREEN, "node": RED}
MARKERS = {"anderson": "o", "broyden": "s", "vcab3": "D", "tsit5": "^"}


def parts(name: str) -> tuple[str, str, bool, str]:
    """Model, solver, whether penalized, and the weight of the skip penalty if it is not the grid's."""
    if name == "node":
        return "node", "", False, ""
    pieces = name.split("-")
    at = next(i for i, piece in enumerate(pieces) if piece in MARKERS)
    return "-".join(pieces[:at]), pieces[at], "jac" in pieces[at:], pieces[-1][1:] if pieces[-1][0] == "w" else ""


@matplotlib.rc_context(STYLE)
def plot(content: dict[str, Any]) -> Figure:
    """Accuracy against the time of a step on each data set; evaluations against the weight of the skip penalty."""
    means, details = summary(content)
    figure = Figure(figsize=(10.5, 7.8), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for data in ("mnist", "fashion-mnist", "multiscale"):
        _scatter(next(axes), content, data, means, details)
    _weights(next(axes), content, means, details)
    handles = [Line2D([], [], color=c, marker="o", ls="none", label=name) for name, c in COLORS.items()]
    handles[-1].set_marker("*")
    handles[-1].set_markersize(10)
    handles += [Line2D([], [], color=INK, marker=m, ls="none", label=name) for name, m in MARKERS.items()]
    handles.append(Line2D([], [], color=INK, marker="o", mfc="none", ls="none", label="with Jacobian penalty"))
    handles.append(Line2D([], [], color=INK, marker="o", fillstyle="left", ls="none", label=f"skip weight {MILD:g}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=10, columnspacing=1.0, handletextpad=0.3)
    return figure


def _scatter(
    axes: Axes, content: dict[str, Any], data: str, means: dict[str, float | None], details: dict[str, Any]
) -> None:
    for name in content["runs"].get(data, {}):
        model, solver, penalized, weight = parts(name)
        x, y = (means.get(f"{data}/{name}/{key}") for key in ("train_step_ratio_to_node", "test_accuracy"))
        if x is None or y is None or weight not in ("", f"{MILD:g}"):
            continue
        color = COLORS[model]
        axes.errorbar(
            x, y, details["standard_deviations"].get(f"{data}/{name}/test_accuracy", 0.0),
            color=color, marker=MARKERS.get(solver, "*"), markersize=12 if model == "node" else 6,
            mfc="none" if penalized else color, elinewidth=0.7, fillstyle="left" if weight else "full",
            alpha=0.35 if (means[f"{data}/{name}/median_residual"] or 0.0) > FAR else 1.0,
        )  # fmt: skip
    axes.axvline(1, color=RED, lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else ""))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_xlabel("time of a training step, over that of the Neural ODE")
    axes.set_ylabel("test accuracy")
    axes.set_title(data, loc="left", color=INK)


def _weights(axes: Axes, content: dict[str, Any], means: dict[str, float | None], details: dict[str, Any]) -> None:
    """Evaluations, and accuracy on an axis of its own."""
    right = axes.twinx()
    for model in ("skip", "skip-reg"):
        names = [n for n in content["runs"].get("mnist", {}) if parts(n)[:3] == (model, SWEPT, False)]
        points = []
        for name in names:
            key = f"mnist/{name}"
            if means.get(f"{key}/nfe") is not None:
                weight = details["means"][f"{key}/skip_weight"]
                points.append((weight, means[f"{key}/nfe"], means[f"{key}/test_accuracy"]))
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
    axes.set_xlabel("weight of the skip penalty")
    axes.set_ylabel("evaluations (solid)")
    right.set_ylabel("test accuracy (dotted)", color=GRAY)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    right.grid(False)
    axes.set_title(f"mnist, {SWEPT}; gray: vanilla", loc="left", color=INK)
