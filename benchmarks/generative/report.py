"""Table of the generative benchmark, and image grids."""

import pathlib
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import harness

TASKS = ("deblur", "superres")


def table(content: dict[str, Any]) -> str:
    """All figures."""
    figures, spreads = content["figures"], content["spread"]
    rows = [[key, harness.cell(figures[key], ".4g"), harness.cell(spreads.get(key), ".2g", missing="")]
            for key in sorted(figures)]  # fmt: skip
    return harness.table(("figure", "mean", "spread"), rows)


def draw(pictures: dict[str, Tensor], folder: pathlib.Path) -> None:
    """Image grids: reconstructions, samples, and both tasks."""
    names = {"reconstructions": ("truth", "jiio", "vae"), "samples": ("jiio samples", "vae samples")}
    names |= {task: tuple(f"{task} {kind}" for kind in ("input", "adam", "jiio", "truth")) for task in TASKS}
    for name, kinds in names.items():
        starts = (0, 12) if name == "samples" else (0,)
        rows = [pictures[kind][start : start + 12] for kind in kinds for start in starts]
        grid(rows, folder / f"generative-{name}.png")


def grid(rows: list[Tensor], path: pathlib.Path, scale: int = 3) -> None:
    """Rows of images, light marks on dark ground, as a PNG file."""
    framed = [torch.nn.functional.pad(row[:, 0].clamp(0, 1), (1, 1, 1, 1), value=0.5) for row in rows]
    pixels = (torch.cat([torch.cat(list(row), dim=1) for row in framed], dim=0) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)
