"""Readers of IDX files and of single images; damaged files are refused."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from equipoise.files import DataError, data_root

if TYPE_CHECKING:
    from PIL import Image

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def find_idx(root: str | None) -> Path | None:
    """Find the folder of Fashion-MNIST's IDX files; None: there is none in the usual places.

    Args:
        root: the folder itself, or its parent; None: the usual places.

    Raises:
        DataError: `root` is given and holds no IDX files.
    """
    if root is not None:
        candidates = [Path(root), Path(root) / "fashion-mnist", Path(root) / "FashionMNIST" / "raw"]
    else:
        shared = data_root()
        candidates = [*([shared / "fashion-mnist", shared / "FashionMNIST" / "raw"] if shared else []), DEBIAN_FASHION]
    for folder in candidates:
        if _idx_file(folder, "train-images-idx3-ubyte") is not None:
            return folder
    if root is None:
        return None
    raise DataError(
        f"no Fashion-MNIST in {root}: looked for train-images-idx3-ubyte(.gz) in {', '.join(map(str, candidates))}. "
        "Point --data.root at the folder of the four IDX files, or install Debian's dataset-fashion-mnist and omit it"
    )


def read_idx_pair(folder: Path, prefix: str, *, size: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Read images and labels of one split.

    Args:
        folder: of the files.
        prefix: `train` or `t10k`.
        size: side of the images in pixels.
        num_classes: labels must be below it.

    Returns:
        uint8 `(N, 1, H, W)` and int64 `(N,)`.

    Raises:
        DataError: a file is missing, truncated, corrupt, or does not fit the other.
    """
    pair = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        path = _idx_file(folder, f"{prefix}-{kind}")
        if path is None:
            raise DataError(f"{folder / f'{prefix}-{kind}'}(.gz) is missing; download the four IDX files again")
        pair.append(read_idx(path))
    images, labels = pair
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(f"{folder}: {prefix} images {tuple(images.shape)} and labels {tuple(labels.shape)} do not fit")
    if images.shape[1:] != (size, size):
        raise DataError(f"{folder}: {prefix} images have {images.shape[2]}x{images.shape[1]} pixels, not {size}x{size}")
    if int(labels.max()) >= num_classes:
        raise DataError(f"{folder}: {prefix} labels go up to {int(labels.max())}, but there are {num_classes} classes")
    return images[:, None], labels.to(torch.int64)


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or not.

    Raises:
        DataError: it is truncated, corrupt or of another type.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); it is truncated or corrupt: fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path} is not an IDX file of unsigned bytes: its header is {raw[:4].hex() or 'empty'}")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    expected, found = math.prod(shape), len(raw) - 4 - 4 * raw[3]
    if found != expected:
        raise DataError(f"{path} announces {expected} bytes of shape {shape} and holds {found}: fetch it again")
    if found == 0:
        raise DataError(f"{path} holds no data: fetch it again")
    return torch.frombuffer(bytearray(raw[4 + 4 * raw[3] :]), dtype=torch.uint8).view(shape)


def open_image(content: bytes, name: str) -> Image.Image:
    """Decode an image.

    Args:
        content: bytes of a PNG, JPEG or other file.
        name: of the file, for messages.

    Raises:
        DataError: it is empty, no image, truncated, or has too many pixels.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError("reading images needs Pillow: pip install 'equipoise[data]'") from error
    if not content:
        raise DataError(f"{name} is empty")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has too many pixels: {error}") from error
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        raise DataError(f"{name} is a damaged image: {error}") from error
    return image


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to color (3 channels) or grayscale (1); transparent parts become white."""
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        colored = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colored).convert("RGB")
    elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow clips these to 255 instead of scaling them.
        high = np.asarray(image).max()
        scale = 255 / 65535 if image.mode != "F" or high > 1 else 255.0
        image = image.convert("F").point(lambda value: value * scale + 0.0)
    return image.convert("RGB" if channels == 3 else "L")


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an image in mode RGB or L to uint8 `(C, H, W)`."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1).contiguous()


def resize_and_crop(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Resize an image bilinearly to the shorter side `resize`, and cut out the central square of side `size`."""
    from PIL import Image

    short = min(image.size)
    width, height = (max(size, round(side * resize / short)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(image: Image.Image, size: int, source: torch.Generator) -> Image.Image:
    """Cut out a random part, 8 to 100 % of the area with aspect 3/4 to 4/3, and resize it to a square."""
    from PIL import Image

    width, height = image.size
    for _ in range(10):
        area, shape, x, y = torch.rand(4, generator=source, dtype=torch.float64).tolist()
        area = width * height * (0.08 + 0.92 * area)
        aspect = (3 / 4) ** (1 - 2 * shape)  # uniform in its logarithm
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            break
    else:  # the central part of the nearest permitted shape
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
