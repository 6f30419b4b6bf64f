"""Figures of a report, in one style."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from equipoise.report.predictions import Predictions
from equipoise.train.task import SCORES

# Colors for the color-blind (Okabe and Ito), each with one meaning on the whole page.
BLUE, ORANGE, GREEN, RED, GRAY, INK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#5b6673", "#1d2733"
STYLE: Any = {
    "font.family": "DejaVu Sans",  # wider than the fonts that browsers substitute, so no labels overlap
    "font.size": 9.5,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "axes.edgecolor": "#c3cad3",
    "axes.labelcolor": GRAY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebef",
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}
TRACES, FEW, LABELED = 40, 30, 20  # single images drawn; most points with markers; most classes with names

THOUSANDS = FuncFormatter(lambda x, _: f"{x:,.0f}")


@matplotlib.rc_context(STYLE)
def curve(lines: Sequence[Mapping[str, Any]], name: str, label: str, fixed: int, scale: str = "linear") -> Figure:
    """Plot a quantity of the log over the optimizer steps: training, validation and the final test.

    Args:
        lines: of `metrics.jsonl`.
        name: of the quantity; `backward_share` is the share of the seconds.
        label: of the vertical axis.
        fixed: number of first steps of fixed depth, which are shaded.
        scale: `linear`, `percent` or `log`.
    """
    figure, axes = _axes("optimizer step", label)
    finest = "step" if any(line["kind"] == "step" for line in lines) else "epoch"
    last = max(line["step"] for line in lines)
    for split, kind, color, marker in (
        ("train", finest, BLUE, "o"),
        ("validation", "epoch", ORANGE, "s"),
        ("test", "epoch", GREEN, "D"),
    ):
        chosen = [line for line in lines if line["split"] == split and line["kind"] == kind]
        if name == "backward_share":
            chosen = [{**x, name: x["backward_seconds"] / x["seconds"]} for x in chosen if x.get("backward_seconds")]
        chosen = [line for line in chosen if name in line]  # some scores exist in evaluation only
        if chosen:
            steps, values = ([line[key] for line in chosen] for key in ("step", name))
            called = "training" if split == "train" else split
            style = {"marker": marker} if len(steps) <= FEW else {"lw": 1.8 if len(steps) <= 10 * FEW else 0.9}
            axes.plot(steps, values, color=color, label=called, **style)
    if fixed:
        axes.axvspan(0, min(fixed, last), color="#eceff3", lw=0, zorder=0, label="fixed depth")
    axes.set_xlim(0, last * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)
    if scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(None if name in SCORES else -0.02, 1.02)
    elif scale == "log":
        _log(axes)
    else:
        axes.set_ylim(bottom=0)
    return _legend(figure)


@matplotlib.rc_context(STYLE)
def residual_plot(predictions: Predictions, rtol: float) -> Figure:
    """Plot the residual of the test images at each evaluation: single images, median and quantiles."""
    figure, axes = _axes("solver step (evaluation of f)", "relative residual |f(z) - z| / |z*|")
    steps = np.arange(1, len(predictions.trace) + 1)
    low, median, high = predictions.quantiles()
    single = axes.plot(steps, predictions.trace[:, :TRACES], color=GRAY, lw=0.6, alpha=0.35)
    single[0].set_label("single images")
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.2, lw=0, label="10 to 90%")
    axes.plot(steps, median, color=BLUE, marker="o" if len(steps) <= FEW else None, label="median")
    if rtol:
        axes.axhline(rtol, color=RED, ls="--", lw=1.2, label="tolerance")
    _log(axes)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return _legend(figure)


@matplotlib.rc_context(STYLE)
def step_counts(predictions: Predictions) -> Figure:
    """Plot a histogram of the solver steps per test image."""
    figure, axes = _axes("solver steps per image", "test images")
    steps = predictions.num_steps.numpy()
    width = 1 + int(steps.max() - steps.min()) // 40
    edges = np.arange(steps.min(), steps.max() + width + 1, width) - 0.5
    bottom = np.zeros(len(edges) - 1)
    converged = predictions.converged
    for name, mask, color in (("converged", converged, BLUE), ("not converged", ~converged, RED)):
        heights = np.histogram(steps[mask.numpy()], edges)[0]
        axes.bar(edges[:-1] + width / 2, heights, 0.86 * width, bottom, color=color, label=name)
        bottom += heights
    margin = max(0.5, (8 - len(bottom)) / 2) * width
    axes.set(xlim=(edges[0] - margin, edges[-1] + margin), ylim=(0, 1.06 * bottom.max()))
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(THOUSANDS)
    return _legend(figure)


@matplotlib.rc_context(STYLE)
def confusion_map(counts: Tensor, classes: Sequence[str]) -> Figure:
    """Plot true classes down, predicted classes across: correct blue, mistakes red, darker for more images."""
    figure, axes = _axes("predicted class", "true class", height=4.6)
    right = np.eye(len(counts), dtype=bool)
    share = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    mistakes = np.where(right, 0, share)
    depth = np.where(right, 0.9 * share, 0.25 * (mistakes > 0) + 0.6 * mistakes / max(mistakes.max(), 1e-9))
    color = np.where(right[:, :, None], to_rgb(BLUE), to_rgb(RED))
    axes.imshow(1 - depth[:, :, None] * (1 - color), interpolation="none")
    axes.grid(visible=False)
    if len(counts) <= LABELED:
        names = [name if len(name) <= 12 else name[:11] + "…" for name in classes]
        turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 2 else {}
        axes.set_xticks(range(len(names)), names, **turn)
        axes.set_yticks(range(len(names)), names)
        for (row, column), number in np.ndenumerate(counts.numpy()):
            if number:
                tone = "white" if depth[row, column] > 0.6 else INK
                size = 9 if len(names) <= 10 else 6
                axes.text(column, row, str(number), ha="center", va="center", color=tone, size=size)
    return figure


def to_svg(figure: Figure, title: str) -> str:
    """Return a figure as SVG to embed: of any width, without element ids (which figures would share) or addresses."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    body = re.sub(r'<g id="[^"]*"', "<g", text[text.index(">", box.end()) + 1 :])
    return f"<svg {box[0]}>{body}"


def _axes(across: str, up: str, height: float = 3.1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.9, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=across, ylabel=up)
    return figure, axes


def _log(axes: Any) -> None:
    """Make the vertical axis logarithmic, with plain tick labels; a short axis gets labels at 2 and 5, too."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure) -> Figure:
    """Put the legend above the axes, clear of the curves."""
    figure.legend(loc="outside upper left", ncols=4, columnspacing=1.1, handlelength=1.4)
    return figure
