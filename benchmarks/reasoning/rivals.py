"""Rivals of equal size: a plain network, a recurrent one, and a weight-tied one of fixed depth."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.zoo import Reasoner, ReasonerConfig


class Plain(nn.Module):
    """A feed-forward network of residual blocks with dilated convolutions, which see the whole training string.

    Args:
        width: channels.
        blocks: number of blocks; the dilation doubles from one to the next, up to 16.
    """

    def __init__(self, width: int = 27, blocks: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 3, padding=1)
        dilations = [min(2**i, 16) for i in range(blocks)]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, width, 3, padding=d, dilation=d), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1)
            )
            for d in dilations
        )
        self.head = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        for block in self.blocks:
            h = F.relu(h + block(h))
        return self.head(h)


class Tied(nn.Module):
    """The reasoner's own map, applied a fixed number of times and trained with the progressive loss of its authors.

    Source: Bansal et al. (2022): the mean of the loss at full depth and of that after free steps and a few with
    gradient.
    """

    depth = 30

    def __init__(self) -> None:
        super().__init__()
        self.body = Reasoner(ReasonerConfig())

    def forward(self, x: Tensor, steps: int = depth, free: int = 0) -> Tensor:
        z = self.body.start(x)
        with torch.no_grad():
            for _ in range(free):
                z = self.body.deq.cell(z, x)
        for _ in range(steps):
            z = self.body.deq.cell(z, x)
        return self.body.head(z)

    def loss(self, x: Tensor, y: Tensor, source: torch.Generator) -> Tensor:
        """Return the progressive loss, with weights one half."""
        free = int(torch.randint(0, self.depth, (), generator=source))
        steps = int(torch.randint(1, self.depth - free + 1, (), generator=source))
        full, part = self(x), self(x, steps=steps, free=free)
        return 0.5 * (F.cross_entropy(full, y) + F.cross_entropy(part, y))


class Recurrent(nn.Module):
    """A recurrent network with gates that reads the string from left to right: the order is built in.

    Args:
        width: numbers of its memory.
    """

    def __init__(self, width: int = 93) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(1, width, batch_first=True), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.mT)[0]).mT


RIVALS: dict[str, Callable[[], nn.Module]] = {"tied": Tied, "plain": Plain, "recurrent": Recurrent}
