"""Letters of many scripts, rendered from fonts and distorted as if drawn by hand: classes for few-shot training.

They are no handwriting: never report them as Omniglot.
"""

import dataclasses
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.data import generator
from equipoise.files import DataError
from equipoise.zoo import Omniglot

# Scripts of Omniglot's evaluation alphabets, of those held out of its background by default, and their next of kin.
HELD_OUT = (
    *("Avst", "Bali", "Beng", "Cyrl", "Deva", "Ethi", "Glag", "Guru", "Knda", "Mlym", "Mong", "Mtei", "Orya", "Phag"),
    *("Phli", "Phlp", "Prti", "Sylo", "Syrc", "Syrn", "Tglg", "Tibt"),
)
TOO_LARGE = ("Cans", "Hang", "Hani", "Nshu", "Tang", "Vaii", "Yiii", "Zyyy", "Zinh")  # or no script
PER_SCRIPT = 8  # letters at most, that none outweighs the others
DRAWINGS = 20  # of each letter, as in Omniglot
CANVAS = 64  # pixels, before a drawing is shrunk
FACE = 48  # longer side of a letter on it
SEED = 20_210_602


@dataclasses.dataclass(frozen=True, kw_only=True)
class OmniglotAndLetters(Omniglot):
    """Omniglot, with letters of fonts among the classes for training."""

    fonts: str = "/usr/share/fonts/truetype/noto"
    """Folder of fonts, such as that of Debian's `fonts-noto-core`."""

    def more_classes(self) -> list[Tensor]:
        return render(Path(self.fonts), self.shape[1])


def render(folder: Path, side: int) -> list[Tensor]:
    """Drawings of every letter that the upright fonts of a folder have, but of scripts that are for evaluation.

    Args:
        folder: of `.ttf` and `.otf` files.
        side: of the drawings in pixels.

    Returns:
        uint8 `(20, 1, side, side)` for each letter, ink 255.

    Raises:
        DataError: there are no fonts, or fontTools or Pillow are missing.
    """
    faces = _faces(folder)
    source = generator(SEED)
    classes = []
    for letter in sorted(faces):
        images = [image for path in faces[letter] if (image := _glyph(path, letter)) is not None]
        if images:
            classes.append(_drawn(torch.stack(images), side, source))
    return classes


def _faces(folder: Path) -> dict[str, list[Path]]:
    """The fonts that have each letter."""
    try:
        from fontTools import unicodedata as scripts
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError as error:
        raise DataError("reading fonts needs fontTools: pip install 'equipoise[data]'") from error
    paths = sorted(
        path for path in folder.glob("*.[to]tf") if not any(word in path.stem for word in ("Italic", "Slanted"))
    )
    if not paths:
        raise DataError(f"{folder} has no fonts (.ttf, .otf); install Debian's fonts-noto-core, or name another folder")
    faces: defaultdict[str, list[Path]] = defaultdict(list)
    letters: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        try:
            with path.open("rb") as file, TTFont(file, lazy=True) as font:
                points = sorted(font.getBestCmap() or {})
        except (TTLibError, OSError, AssertionError) as error:
            raise DataError(f"{path} is a damaged font: {error}") from error
        for letter in map(chr, points):
            script = scripts.script(letter)
            if unicodedata.category(letter)[0] != "L" or script in HELD_OUT or script in TOO_LARGE:
                continue
            if unicodedata.decomposition(letter):  # an accented or otherwise dressed form of another letter
                continue
            if letter in letters[script] or len(letters[script]) < PER_SCRIPT:
                letters[script].add(letter)
                faces[letter].append(path)
    return faces


def _glyph(path: Path, letter: str) -> Tensor | None:
    """The letter in the middle of a canvas, `(1, CANVAS, CANVAS)` in [0, 1]; None if it is blank, or a long stroke."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(path, FACE, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(letter)
    width, height = right - left, bottom - top
    if min(width, height) < max(width, height) / 8 or max(width, height) > 4 * FACE:
        return None
    image = Image.new("L", (int(width), int(height)))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=font)
    scale = FACE / max(width, height)
    fitted = image.resize((max(1, round(scale * width)), max(1, round(scale * height))), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(fitted, ((CANVAS - fitted.width) // 2, (CANVAS - fitted.height) // 2))
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)[None]


def _drawn(images: Tensor, side: int, source: torch.Generator) -> Tensor:
    """Drawings of a letter: each from one of its faces, turned, sheared, scaled, shifted and warped."""
    face = torch.arange(DRAWINGS) % len(images)
    turn, shear, shift_x, shift_y, wide, tall = (
        2 * torch.rand(6, DRAWINGS, generator=source, dtype=torch.float32) - 1
    ).unbind()
    angle = turn * 0.2
    cos, sin = angle.cos(), angle.sin()
    wide, tall = ((0.2 * spread).exp() for spread in (wide, tall))
    theta = torch.stack(
        [
            torch.stack([wide * cos, wide * (0.25 * shear * cos - sin), 0.12 * shift_x], 1),
            torch.stack([tall * sin, tall * (0.25 * shear * sin + cos), 0.12 * shift_y], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [DRAWINGS, 1, CANVAS, CANVAS], align_corners=False)
    field = 0.1 * torch.randn(DRAWINGS, 2, 5, 5, generator=source, dtype=torch.float32)
    warp = F.interpolate(field, size=(CANVAS, CANVAS), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    ink = F.grid_sample(images[face], grid + warp, mode="bilinear", align_corners=False)
    small = F.interpolate(ink, size=(side, side), mode="area")
    return ((1.5 * small).clamp(0, 1) * 255).round().to(torch.uint8)
