"""A convolutional equilibrium that reads its puzzle at every step."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.core.checks import check_ranges
from equipoise.core.solution import Solution
from equipoise.gradients import Gradient, Implicit
from equipoise.nn import DEQ
from equipoise.solvers import Picard, Solver
from equipoise.train import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasonerConfig(ModelConfig):
    """Shape of a reasoner over sequences.

    Raises:
        ValueError: a field is out of range.
    """

    input_channels: int = 1
    """Numbers at each place of a puzzle."""
    num_classes: int = 2
    """Answers to choose from at each place."""
    channels: int = 40
    """Numbers at each place of the state."""
    blocks: int = 2
    """Residual blocks of the map; each lets a place see two more on either side."""
    length: int = 32
    """Places of a training puzzle; others may have more or fewer."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "model.",
            **dict.fromkeys(("input_channels", "blocks", "length"), ">= 1"),
            num_classes=">= 2",
            channels=">= 2",
        )

    def build(self, *, solver: Solver = Picard(max_steps=1000), gradient: Gradient = Implicit()) -> "Reasoner":
        return Reasoner(self, solver=solver, gradient=gradient)

    @property
    def state_size(self) -> int:
        return self.channels * self.length


class ReasonerCell(nn.Module):
    r"""A step of reasoning: a convolution over state and puzzle, residual blocks, a normalization of each place.

    $$ h_0 = \sigma(W_0 * [z, x]), \quad h_i = \sigma(h_{i-1} + V_i * \sigma(W_i * h_{i-1})), \quad
       f(z, x) = \mathrm{LayerNorm}(h_m) $$

    Args:
        config: shape of the model.
    """

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        width = config.channels
        self.recall = nn.Conv1d(width + config.input_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1))
            for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = F.relu(self.recall(torch.cat([z, x], dim=1)))
        for block in self.blocks:
            h = F.relu(h + block(h))
        return self.norm(h.transpose(1, 2)).transpose(1, 2)


class Reasoner(nn.Module):
    r"""Solver of puzzles: the answer is read from the equilibrium of a map that sees the puzzle at every step.

    $$ z^* = f(z^*, x), \qquad \mathrm{logits} = \mathrm{head}(z^*) $$

    A larger puzzle takes more steps of the same map, so what was learned on small ones can solve it.

    Args:
        config: shape of the model.
        solver: finds the equilibrium.
        gradient: differentiates it.

    Example:
        >>> import torch
        >>> from equipoise.zoo import Reasoner, ReasonerConfig
        >>> model = Reasoner(ReasonerConfig(channels=8))
        >>> [tuple(model(torch.ones(4, 1, length)).shape) for length in (32, 100)]
        [(4, 2, 32), (4, 2, 100)]

    Source: Anil, Pokle, Liang, Treutlein, Wu, Bai, Kolter and Grosse (2022), Path independent equilibrium models; the
    blocks after Bansal, Schwarzschild, Borgnia, Emam, Huang, Goldblum and Goldstein (2022).
    """

    def __init__(
        self, config: ReasonerConfig, *, solver: Solver = Picard(max_steps=1000), gradient: Gradient = Implicit()
    ) -> None:
        super().__init__()
        self.config = config
        self.deq = DEQ(ReasonerCell(config), init=self.start, solver=solver, gradient=gradient)
        half = config.channels // 2
        self.head = nn.Sequential(
            nn.Conv1d(config.channels, half, 3, padding=1), nn.ReLU(), nn.Conv1d(half, config.num_classes, 3, padding=1)
        )

    def start(self, puzzles: Tensor) -> Tensor:
        """Return the state zero, `(B, channels, n)`."""
        return puzzles.new_zeros(len(puzzles), self.config.channels, puzzles.shape[2])

    def forward(self, puzzles: Tensor) -> Tensor:
        """Solve puzzles.

        Args:
            puzzles: `(B, input_channels, n)`, of any length `n`.

        Returns:
            `(B, num_classes, n)` logits of the answer at each place.

        Raises:
            ValueError: `puzzles` has another shape.
        """
        return self.answer(puzzles)[0]

    def answer(self, puzzles: Tensor, z0: Tensor | None = None) -> tuple[Tensor, Solution[Tensor]]:
        """Solve puzzles, and return the equilibria.

        Args:
            puzzles: as in `forward`.
            z0: start of the solve, `(B, channels, n)`; None: zeros.

        Returns:
            Logits, and the `Solution`, whose residual and status say how sure the answer is.
        """
        if puzzles.ndim != 3 or puzzles.shape[1] != self.config.input_channels:
            raise ValueError(
                f"puzzles must have shape (B, {self.config.input_channels}, n), got {tuple(puzzles.shape)}; build the "
                "model with another input_channels"
            )
        solution = self.deq.solve(puzzles, z0=z0)
        return self.head(solution.value), solution
