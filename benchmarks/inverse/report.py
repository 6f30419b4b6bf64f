"""Table of the benchmark of inverse problems, and a picture of its answers."""

from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import harness

TASKS = ("noise-0.1", "noise-0.2", "hole-9")
METHODS = ("joint", "guess", "tv", "biharmonic", "joint-few", "adam", "first-order")


def table(content: dict[str, Any]) -> str:
    """Mean and median of PSNR, and mean SSIM, of each method and task."""
    rows = []
    for task in TASKS:
        rows.append([task])
        for method in METHODS:
            values = [content["figures"].get(f"{task}/{method}/{name}") for name in ("psnr", "median", "ssim")]
            rows[-1].append("" if None in values else "{:.2f} ({:.2f}) dB, {:.3f}".format(*values))
    return harness.table(("", *METHODS), rows)


def draw(shown: dict[str, Tensor]) -> Figure:
    """A column of images for each task and method."""
    count = len(shown["clean"])
    figure = Figure(figsize=(1.05 * len(shown), 1.05 * count + 0.4), dpi=110)
    axes = figure.subplots(count, len(shown), squeeze=False)
    for column, (key, images) in zip(axes.T, shown.items(), strict=True):
        for axis, image in zip(column, images, strict=True):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.axis("off")
        column[0].set_title(key.replace("/", "\n"), fontsize=8)
    figure.tight_layout(pad=0.3)
    return figure
