"""Picture of a reconstruction: observation, reconstruction, and the truth where it is known."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from equipoise.report.figures import INK, STYLE


@matplotlib.rc_context(STYLE)
def draw(panels: Mapping[str, Tensor], path: Path) -> None:
    """Write images side by side as PNG.

    Args:
        panels: `(C, H, W)` pixels in [0, 1] by their titles; images of any size.
        path: of the file.
    """
    figure = Figure(figsize=(2.6 * len(panels), 2.9), dpi=110)
    for axes, (title, image) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.imshow(image.clamp(0, 1).movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=9, color=INK)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.89, bottom=0.02, wspace=0.04)
    figure.savefig(path)
