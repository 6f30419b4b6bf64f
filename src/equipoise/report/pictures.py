"""Pictures of single images: attacks and reconstructions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from equipoise.report.figures import GREEN, INK, RED, STYLE

ROWS = ("image", "change", "attacked")


@matplotlib.rc_context(STYLE)
def draw_attack(
    images: Tensor,
    attacked: Tensor,
    before: Sequence[tuple[str, bool]],
    after: Sequence[tuple[str, bool]],
    path: Path,
) -> None:
    """Write the picture of an attack as PNG.

    One factor magnifies the perturbations of all images, the largest that fits; gray is no change.

    Args:
        images: `(N, C, H, W)` pixels in [0, 1].
        attacked: the same after the attack.
        before: prediction for each image, and whether it is correct.
        after: prediction for each attacked image, likewise.
        path: of the file.
    """
    change = attacked - images
    factor = 0.5 / max(float(change.abs().max()), 1e-12)
    width = 0.95 * len(images) + 0.9
    figure = Figure(figsize=(width, 3.5), dpi=110)
    grid = figure.subplots(3, len(images), squeeze=False)
    sides: tuple[Sequence[tuple[str, bool]] | None, ...] = (before, None, after)
    pictures = (images, 0.5 + factor * change, attacked)
    for name, pixels, predictions, row in zip(ROWS, pictures, sides, grid, strict=True):
        for number, (axes, image) in enumerate(zip(row, pixels, strict=True)):
            _show(axes, image)
            if predictions is not None:
                text, right = predictions[number]
                axes.set_title(text, fontsize=8, color=GREEN if right else RED, pad=3)
        label = f"{name}\nx {factor:.2g}" if name == "change" else name
        row[0].set_ylabel(label, color=INK, rotation=0, ha="right", va="center", labelpad=8)
    figure.subplots_adjust(left=0.85 / width, right=0.995, top=0.93, bottom=0.01, wspace=0.06, hspace=0.22)
    figure.savefig(path)


@matplotlib.rc_context(STYLE)
def draw_reconstruction(panels: Mapping[str, Tensor], path: Path) -> None:
    """Write images side by side as PNG.

    Args:
        panels: `(C, H, W)` pixels in [0, 1] by their titles; images of any size.
        path: of the file.
    """
    figure = Figure(figsize=(2.6 * len(panels), 2.9), dpi=110)
    for axes, (title, image) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _show(axes, image)
        axes.set_title(title, fontsize=9, color=INK)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.89, bottom=0.02, wspace=0.04)
    figure.savefig(path)


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.clamp(0, 1).movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
