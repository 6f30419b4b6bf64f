"""The figure of a search for hyperparameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from equipoise.report.figures import BLUE, GRAY, ORANGE, STYLE


@matplotlib.rc_context(STYLE)
def search_figure(lines: Sequence[Mapping[str, Any]], label: str) -> Figure:
    """The held-out loss against time: the points tried, and the best so far.

    Args:
        lines: one for each outer step, with `seconds`, `held_out_loss` and `accepted`.
        label: of the vertical axis.
    """
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    finite = [line for line in lines if line["held_out_loss"] is not None]
    best = [min(line["held_out_loss"] for line in finite[: number + 1]) for number in range(len(finite))]
    seconds = [line["seconds"] for line in finite]
    axes.step(seconds, best, where="post", color=BLUE, label="best so far", zorder=1)
    for accepted, color, name in ((True, BLUE, "accepted"), (False, ORANGE, "rejected")):
        points = [line for line in finite if line["accepted"] == accepted]
        if points:
            axes.scatter(
                [line["seconds"] for line in points],
                [line["held_out_loss"] for line in points],
                color=color,
                s=16,
                label=name,
                zorder=2,
            )
    axes.set(xlabel="seconds", ylabel=label)
    axes.set_xlim(left=0)
    axes.tick_params(colors=GRAY)
    figure.legend(loc="outside upper left", ncols=3)
    return figure
