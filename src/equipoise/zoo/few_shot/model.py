"""Few-shot learner: context and linear head of a task are optimized inputs of its equilibrium."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.core.checks import check_ranges
from equipoise.core.solution import Solution
from equipoise.gradients import Gradient, Implicit
from equipoise.inputs import InputOptimizer, InputSolution, Joint, optimize_inputs
from equipoise.nn import DEQ
from equipoise.solvers import GMRES, Anderson, Solver
from equipoise.zoo.base import ImageModelConfig

ADAPT = InputOptimizer(
    solver=Anderson(memory=10, max_steps=100, rtol=1e-3, ridge=1e-3),
    scheme=Joint(),
    step_size=1.0,
    gradient=Implicit(solver=GMRES(max_steps=40, rtol=0.0, atol=1e-2)),
    verify_solver=None,
)
"""Default method of `FewShotLearner.adapt`; vary it with `dataclasses.replace`."""

Adapted = dict[str, Tensor]  # optimized inputs of a task: "context" (B, context) and "head" (B, ways, width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotConfig(ImageModelConfig):
    """Shape of a few-shot learner.

    Raises:
        ValueError: a field is out of range.
    """

    channels: int = 32
    """Channels of each of the four convolutions of the encoder."""
    num_groups: int = 4
    """Groups of its GroupNorms."""
    width: int = 64
    """Size of the state of an image."""
    context: int = 32
    """Size of the context of a task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            "model.",
            **dict.fromkeys(("channels", "num_groups", "width", "context"), ">= 1"),
            image_size=">= 16, because the encoder halves it four times",
        )
        if self.channels % self.num_groups:
            raise ValueError(f"channels={self.channels} must be a multiple of num_groups={self.num_groups}")

    def build(self, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> FewShotLearner:
        return FewShotLearner(self, solver=solver, gradient=gradient)

    @property
    def state_size(self) -> int:
        return self.width


class Encoder(nn.Sequential):
    """Four stride-2 convolutions, each with GroupNorm and ReLU, and a linear layer: `(B, C, H, W) -> (B, width)`."""

    def __init__(self, config: FewShotConfig) -> None:
        layers: list[nn.Module] = []
        channels, side = config.image_channels, config.image_size
        for _ in range(4):
            layers += [
                nn.Conv2d(channels, config.channels, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(config.num_groups, config.channels),
                nn.ReLU(),
            ]
            channels, side = config.channels, (side + 1) // 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * side**2, config.width))


class FewShotCell(nn.Module):
    r"""The map $f(z, x, u) = \tanh(\gamma(v) \odot W z + u + \beta(v))$, the same for all images of a task.

    The context $v$ of the task scales and shifts it: $(\gamma - 1, \beta)$ are linear in $v$.

    Args:
        config: shape of the model.
    """

    def __init__(self, config: FewShotConfig) -> None:
        super().__init__()
        self.state = nn.Linear(config.width, config.width, bias=False)
        self.film = nn.Linear(config.context, 2 * config.width, bias=False)
        nn.init.orthogonal_(self.state.weight, 0.5)
        nn.init.normal_(self.film.weight, std=0.1)

    def forward(self, z: Tensor, x: Adapted, u: Tensor) -> Tensor:
        """State `(B, n, width)`, optimized inputs and injection `(B, n, width)` to `(B, n, width)`."""
        scale, shift = self.film(x["context"])[:, None].chunk(2, dim=-1)
        return torch.tanh((1 + scale) * self.state(z) + u + shift)


class SupportCost(nn.Module):
    """Sum of the cross-entropies of a task's support images, `(B,)`."""

    def forward(self, z: Tensor, x: Adapted, labels: Tensor) -> Tensor:
        """States `(B, n, width)`, optimized inputs and labels `(B, n)` to costs `(B,)`."""
        return F.cross_entropy(scores(z, x).transpose(1, 2), labels, reduction="none").sum(1)


class Decay(nn.Module):
    """Half the squared norms of context and head, `(B,)`, each with a learned weight."""

    def __init__(self) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.tensor([0.5, 0.015]).log())

    def forward(self, x: Adapted) -> Tensor:
        squares = torch.stack([x[name].square().flatten(1).sum(1) for name in ("context", "head")], dim=1)
        return 0.5 * squares @ self.log_weight.exp()


class FewShotLearner(nn.Module):
    r"""Few-shot learner of image classes, by optimized inputs of an equilibrium.

    $$ u = \mathrm{encoder}(\text{image}), \quad z^* = \tanh(\gamma(v) \odot W z^* + u + \beta(v)), \quad
       \mathrm{logits} = H z^* / \sqrt{d} $$

    $$ (v, H) = \arg\min \sum_{\text{support}} \mathrm{CE} + \tfrac12 \rho_v |v|^2 + \tfrac12 \rho_H |H|^2 $$

    A task determines the context $v$ and the head $H$, a row for each class, from zeros: one model serves tasks of any
    number of classes, in any order. All tasks share everything else, the weights $\rho$ too.

    Args:
        config: shape of the model.
        solver: finds the equilibrium of given inputs.
        gradient: differentiates it.

    Example:
        >>> import torch
        >>> from equipoise.zoo import FewShotConfig, FewShotLearner
        >>> model = FewShotLearner(FewShotConfig(image_size=28, image_channels=1))
        >>> support, labels = torch.randn(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5)
        >>> found = model.adapt(support, labels, ways=5)
        >>> logits, solution = model.classify(torch.randn(2, 8, 1, 28, 28), found.value[2])
        >>> logits.shape
        torch.Size([2, 8, 5])

    Source: Gurumurthy, Bai, Manchester and Kolter (2021), meta-learning, where the context is the whole input and the
    head has a fixed number of classes and is shared.
    """

    def __init__(self, config: FewShotConfig, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> None:
        super().__init__()
        self.config = config
        self.stem = Encoder(config)
        self.deq = DEQ(FewShotCell(config), solver=solver, gradient=gradient, init=_zeros)
        self.cost = SupportCost()
        self.decay = Decay()

    def adapt(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        ways: int,
        optimizer: InputOptimizer = ADAPT,
    ) -> InputSolution:
        """Find context and head of each task, the last part of the solution's `value`.

        Args:
            images: `(B, S, image_channels, image_size, image_size)` support.
            labels: int64 `(B, S)`, below `ways`.
            ways: classes of a task.
            optimizer: method of the optimization.

        Raises:
            ValueError: `images` has another shape.
        """
        u = self.encode(images)
        x0 = {
            "context": u.new_zeros(len(u), self.config.context),
            "head": u.new_zeros(len(u), ways, self.config.width),
        }
        return optimize_inputs(
            self.deq.cell,
            z0=torch.zeros_like(u),
            x0=x0,
            cost=self.cost,
            inputs=(u,),
            targets=(labels,),
            regularizer=self.decay,
            optimizer=optimizer,
        )

    def classify(self, images: Tensor, x: Adapted) -> tuple[Tensor, Solution[Tensor]]:
        """Return logits `(B, n, ways)` of further images of tasks, and the equilibria.

        Args:
            images: `(B, n, image_channels, image_size, image_size)`.
            x: context and head, from `adapt`.

        Raises:
            ValueError: `images` has another shape.
        """
        solution = self.deq.solve(x, self.encode(images))
        return scores(solution.value, x), solution

    def encode(self, images: Tensor) -> Tensor:
        """Return injections `(B, n, width)` of images `(B, n, C, H, W)`."""
        expected = self.config.image_shape
        if images.ndim != 5 or images.shape[2:] != expected:
            raise ValueError(
                f"images must have shape (B, n, {', '.join(map(str, expected))}), n images of each of B tasks, got "
                f"{tuple(images.shape)}"
            )
        flat: Tensor = self.stem(images.flatten(0, 1))
        return flat.unflatten(0, images.shape[:2])


def scores(z: Tensor, x: Adapted) -> Tensor:
    """Return logits `(B, n, ways)` of states `(B, n, width)` by the heads of their tasks."""
    return z @ x["head"].transpose(1, 2) / z.shape[2] ** 0.5


def _zeros(x: Adapted, u: Tensor) -> Tensor:
    return torch.zeros_like(u)
