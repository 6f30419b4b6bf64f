"""Data sources: images by name, from the hub, from folders."""

from equipoise.data.base import Data, Split, Splits, TensorSplit, derive_seed, generator, random_split
from equipoise.data.folders import image_files, read_cropped, read_image
from equipoise.data.hub import HubImages
from equipoise.data.images import ImageData
from equipoise.data.named import MNIST5K, Digits, FashionMNIST
from equipoise.data.photographs import Photographs
from equipoise.files import DataError

__all__ = [
    "MNIST5K",
    "Data",
    "DataError",
    "Digits",
    "FashionMNIST",
    "HubImages",
    "ImageData",
    "Photographs",
    "Split",
    "Splits",
    "TensorSplit",
    "derive_seed",
    "generator",
    "image_files",
    "random_split",
    "read_cropped",
    "read_image",
]
