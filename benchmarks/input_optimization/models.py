"""Problems of input optimization: a decoder, a classifier and a few-shot regression, trained here, and a slow layer.

Each factory returns a `Problem` of many rows, from a fixed seed; `rows` takes some of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import equipoise as eq
from benchmarks import harness
from equipoise.constraints import Constraint, L2Ball
from equipoise.inputs import Envelope, InputOptimizer

SIZE = 512  # of a state: an evaluation of 64 rows takes a millisecond, several times a solver's bookkeeping
POINTS = 10  # of a few-shot task
EQUILIBRIUM = eq.Anderson(memory=10, max_steps=400, rtol=1e-5)  # judges inputs
ROUNDS = eq.Anderson(memory=5, max_steps=24, rtol=0.0, ridge=1e-3)  # of the joint solves of training
STEP = 0.05
RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Problem:
    """Minimize `cost(z, x, *targets)` over `x`, where `z = cell(z, x, *inputs)`.

    Attributes:
        radius: of an L2 ball around `x0` within the range [0, 1]; None: no constraint.
    """

    cell: nn.Module
    cost: nn.Module
    z0: Tensor
    x0: Tensor
    inputs: tuple[Tensor, ...] = ()
    targets: tuple[Tensor, ...] = ()
    radius: float | None = None

    @property
    def constraint(self) -> Constraint | None:
        return None if self.radius is None else L2Ball(radius=self.radius, center=self.x0, lower=0.0, upper=1.0)

    @property
    def weights(self) -> list[Tensor]:
        return [*self.cell.parameters(), *self.cost.parameters()]

    def frozen(self) -> Problem:
        for weight in self.weights:
            weight.requires_grad_(False)
        return self

    def rows(self, index: slice | Tensor) -> Problem:
        inputs, targets = (tuple(t[index] for t in part) for part in (self.inputs, self.targets))
        return dataclasses.replace(self, z0=self.z0[index], x0=self.x0[index], inputs=inputs, targets=targets)

    def project(self, x: Tensor) -> Tensor:
        return x if self.constraint is None else self.constraint.project(x)

    @torch.no_grad()
    def equilibrium(self, x: Tensor) -> eq.Solution[Tensor]:
        """The state at inputs, solved for from the start."""
        return eq.fixed_point(self.cell, self.z0, x, *self.inputs, solver=EQUILIBRIUM)

    @torch.no_grad()
    def honest(self, x: Tensor) -> Tensor:
        """`(B,)` cost at the equilibrium of each input."""
        cost: Tensor = self.cost(self.equilibrium(x).value, x, *self.targets)
        return cost


class Layer(nn.Module):
    """`tanh(W_2 gelu(W_1 z + a) + U x + b)`; with points, one state for each, which share `x`."""

    def __init__(self, given: int, size: int = SIZE) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size, bias=False)
        self.inject = nn.Linear(given, size)

    def forward(self, z: Tensor, x: Tensor, points: Tensor | None = None) -> Tensor:
        if points is not None:
            x = torch.cat([x[:, None].expand(-1, points.shape[1], -1), points], dim=2)
        return torch.tanh(self.second(F.gelu(self.first(z))) + self.inject(x))


class SlowLayer(nn.Module):
    """`tanh(W z + U x)` with a symmetric random `W`, whose largest eigenvalue is given."""

    def __init__(self, given: int, radius: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(SIZE, SIZE, generator=generator)
        w = w + w.T
        self.w = nn.Parameter(radius * w / torch.linalg.eigvalsh(w).max())
        self.u = nn.Parameter(torch.randn(SIZE, given, generator=generator) * (0.1 / given**0.5))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.w + x @ self.u.T)


class Fit(nn.Module):
    """Squared error of what is read off the state, and `ridge |x|^2`."""

    def __init__(self, wanted: int, ridge: float = 0.0, size: int = SIZE) -> None:
        super().__init__()
        self.head, self.ridge = nn.Linear(size, wanted), ridge

    def forward(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        error: Tensor = self.head(z) - y
        return error.square().flatten(1).sum(1) + self.ridge * x.square().sum(1)


class Margin(nn.Module):
    """Logit of the true class over the soft maximum of the others: its minimum is the worst input.

    It is the negated cross-entropy made nearly linear; that one is concave where the class is certain, so that whatever
    looks for a stationary point of it goes to its maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(SIZE, 10)

    def forward(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits = self.head(z)
        true = F.one_hot(y, 10).bool()
        return logits[true] - torch.logsumexp(logits.masked_fill(true, -torch.inf), dim=1)


def train(
    problem: Problem,
    loss: Callable[[Problem], tuple[Tensor, Tensor, Tensor]],
    steps: int,
    *,
    steady: float,
    rate: float = RATE,
) -> list[float]:
    """Train layer and head by Adam on batches of 64 rows; the loss of each step.

    Args:
        problem: all rows.
        loss: of a batch: the number to minimize, and state and input where the layer is to contract.
        steps: of Adam.
        steady: weight of `|J_z|^2 / n`, without which the layers cease to contract.
        rate: of Adam.
    """
    generator = torch.Generator().manual_seed(0)
    probes = torch.Generator().manual_seed(1)
    rows = len(problem.z0)
    batches = (part for _ in itertools.count() for part in torch.randperm(rows, generator=generator).split(64)[:-1])
    history = []

    def losses() -> Iterator[Tensor]:
        for index in itertools.islice(batches, steps):
            batch = problem.rows(index)
            value, z, x = loss(batch)
            history.append(float(value.detach()))
            z = z.detach().requires_grad_()
            out = problem.cell(z, x.detach(), *batch.inputs)
            probe = torch.randn(out.shape, generator=probes)
            (product,) = torch.autograd.grad(out, z, probe, create_graph=True)
            yield value + steady * product.square().mean()

    harness.descend(torch.optim.Adam(problem.weights, lr=rate), losses())
    return history


def jointly(batch: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The cost at the inputs that are optimized for the batch, as in the paper."""
    solution = eq.optimize_inputs(
        batch.cell,
        z0=batch.z0,
        x0=batch.x0,
        inputs=batch.inputs,
        targets=batch.targets,
        cost=batch.cost,
        optimizer=InputOptimizer(solver=ROUNDS, step_size=STEP, gradient=Envelope(), verify_solver=None),
    )
    z, _, x = solution.value
    return batch.cost(z, x, *batch.targets).mean(), z, x


def classified(batch: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy of inputs as they are."""
    z = eq.fixed_point(batch.cell, batch.z0, batch.x0).value
    return F.softplus(-batch.cost(z, batch.x0, *batch.targets)).mean(), z, batch.x0


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images `(64,)` in [0, 1] and their labels, in a fixed random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.get_default_dtype()).flatten(1) / 16
    return images[order], torch.tensor(data.target)[order]


def generative(*, latents: int = 8, size: int = SIZE) -> Problem:
    """Find the latents of a digit's image."""
    torch.manual_seed(0)
    images, _ = digits()
    rows = len(images)
    cell, cost = Layer(latents, size), Fit(64, size=size)
    return Problem(cell, cost, torch.zeros(rows, size), torch.zeros(rows, latents), targets=(images,))


def adversarial() -> Problem:
    """Find the image within an L2 ball of radius 1 around a digit that is classified worst."""
    torch.manual_seed(0)
    images, labels = digits()
    return Problem(Layer(64), Margin(), torch.zeros(len(images), SIZE), images, targets=(labels,), radius=1.0)


def meta(*, context: int = 16) -> Problem:
    """Find the context of a sinusoid of which ten points are seen; amplitude and phase differ from task to task."""
    torch.manual_seed(0)
    rows = 1800
    amplitude, phase = 0.1 + 4.9 * torch.rand(rows, 1, 1), torch.pi * torch.rand(rows, 1, 1)
    points = 10 * torch.rand(rows, POINTS, 1) - 5
    y = amplitude * torch.sin(points + phase) / 5
    z0, x0 = torch.zeros(rows, POINTS, 128), torch.zeros(rows, context)
    return Problem(Layer(context + 1, 128), Fit(1, ridge=0.01, size=128), z0, x0, inputs=(points,), targets=(y,))


def slow(*, inputs: int = 16, radius: float = 1.03) -> Problem:
    """Find the input of a layer without training by what it does to 32 numbers read off its slow equilibrium."""
    torch.manual_seed(0)
    rows = 1800
    y = torch.randn(rows, 32)
    return Problem(
        SlowLayer(inputs, radius), Fit(32, ridge=0.1), torch.zeros(rows, SIZE), torch.zeros(rows, inputs), targets=(y,)
    )
