"""Puzzles from seeded generators, with one solution each."""

import dataclasses

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.data import Data, Splits
from equipoise.data.base import TEST_SEED, TensorSplit, generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixSums(Data):
    r"""Strings of random bits $b$; the answer to place $i$ is the parity of the bits up to it.

    $$ y_i = (b_1 + \dots + b_i) \bmod 2 $$

    A sample has the numbers -1 and 1. Training and validation strings differ from each other, and those of the test
    split are longer than both.

    Raises:
        ValueError: a field is out of range, or there are not that many strings.
    """

    length: int = 32
    """Bits of a training string."""
    test_length: int = 512
    """Bits of a test string."""
    num_train: int = 50_000
    """Training strings."""
    num_validation: int = 500
    """Validation strings; 0: none."""
    num_test: int = 500
    """Test strings."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "data.", length=">= 1", num_train=">= 1", num_validation=">= 0", test_length=">= 1", num_test=">= 1"
        )
        if self.num_train + self.num_validation > 2**self.length:
            raise ValueError(
                f"data.num_train={self.num_train} and data.num_validation={self.num_validation} are more than the "
                f"2^{self.length} strings of data.length={self.length} bits; lower them, or take longer strings"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.length)

    def load(self) -> Splits:
        bits = _distinct(self.num_train + self.num_validation, self.length, generator(TEST_SEED, 1, self.length))
        test = _distinct(self.num_test, self.test_length, generator(TEST_SEED, 2, self.test_length))
        validation = _solved(bits[self.num_train :]) if self.num_validation else None
        return Splits(_solved(bits[: self.num_train]), validation, _solved(test), ("0", "1"))

    def prepare(self, samples: Tensor, augment: torch.Generator | None = None) -> Tensor:
        return samples.float() * 2 - 1


def _distinct(count: int, length: int, source: torch.Generator) -> Tensor:
    """Return different strings of bits, uint8 `(count, length)`, in random order."""
    if length <= 20:  # few strings: draw their numbers without replacement
        numbers = torch.randperm(2**length, generator=source)[:count]
        return (numbers[:, None] >> torch.arange(length) & 1).to(torch.uint8)
    bits = torch.randint(2, (count, length), generator=source, dtype=torch.uint8)
    while len(unique := bits.unique(dim=0)) < count:
        bits = torch.cat([unique, torch.randint(2, (count - len(unique), length), generator=source, dtype=torch.uint8)])
    return bits[torch.randperm(count, generator=source)]


def _solved(bits: Tensor) -> TensorSplit:
    return TensorSplit(bits[:, None], bits.long().cumsum(1) % 2)
