"""Readers of image files and folders of them."""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from equipoise.data.images import ImageData
from equipoise.data.readers import open_image, resize_and_crop, to_mode, to_tensor
from equipoise.files import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")  # in a folder; a file may have any


def image_files(names: list[str]) -> list[Path]:
    """List files, and the files with the suffix of an image in folders.

    Raises:
        DataError: a folder has none.
    """
    found: list[Path] = []
    for path in map(Path, names):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        images = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
        if path.is_dir() and not images:
            raise DataError(f"{path} holds no image files ({', '.join(IMAGE_SUFFIXES)})")
        found += images if path.is_dir() else inside
    return list(dict.fromkeys(found))


def read_image(path: Path, data: ImageData, invert: bool, *, side: int | None = None) -> tuple[Tensor, str]:
    """Read an image in the size and mode of a data source.

    Args:
        path: of the file.
        data: has the size and the number of channels.
        invert: whether dark and light are swapped.
        side: replaces the size of the data.

    Returns:
        uint8 `(C, side, side)`, and a note on the conversion.

    Raises:
        DataError: the file cannot be read.
    """
    image = _opened(path)
    channels, size, _ = data.shape
    converted = to_mode(image, channels)
    resize = getattr(data, "resize", None) or size
    if side is not None:
        size = resize = side
    if converted.size != (size, size):
        converted = resize_and_crop(converted, resize, size)
    note = _note(image, converted.size, channels, "converted")
    if image.width != image.height:
        note += " (the central square)"
    pixels = to_tensor(converted)
    if invert:
        pixels = 255 - pixels
    elif channels == 1 and note and float(pixels.float().mean()) > 160:
        note += "; it is mostly light, and the model was trained on light marks on dark ground: try --invert"
    return pixels, note


def read_cropped(path: Path, channels: int, invert: bool, *, multiple: int) -> tuple[Tensor, str]:
    """Read an image in its own size, cut to multiples of a number of pixels.

    Args:
        path: of the file.
        channels: 3 for color, 1 for grayscale.
        invert: whether dark and light are swapped.
        multiple: divides both sides.

    Returns:
        uint8 `(channels, H, W)`, and a note on the conversion.

    Raises:
        DataError: the file cannot be read, or is too small.
    """
    image = _opened(path)
    pixels = to_tensor(to_mode(image, channels))
    height, width = (side - side % multiple for side in pixels.shape[1:])
    if not height or not width:
        raise DataError(f"{path} has {image.width}x{image.height} pixels, and each side must be at least {multiple}")
    pixels = pixels[:, :height, :width]
    return 255 - pixels if invert else pixels, _note(image, (width, height), channels, "cut")


def _note(image: Any, size: tuple[int, int], channels: int, verb: str) -> str:
    """Describe the conversion of an image; empty if its size and mode stay."""
    mode, kind = ("RGB", "color") if channels == 3 else ("L", "grayscale")
    if image.size == size and image.mode == mode:
        return ""
    return f"{image.width}x{image.height} {image.mode} was {verb} to {size[0]}x{size[1]} {kind}"


def _opened(path: Path) -> Any:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    with warnings.catch_warnings():
        # Pillow warns of large images, which are fine here, and refuses huge ones.
        warnings.filterwarnings("ignore", ".*could be decompression bomb")
        return open_image(content, str(path))
