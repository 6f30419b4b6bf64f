"""Fully connected equilibrium classifier of small images."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.core.checks import check_ranges
from equipoise.gradients import Gradient, Implicit
from equipoise.nn import DEQ
from equipoise.solvers import Anderson, Solver
from equipoise.zoo.classification import ClassifierConfig, EquilibriumClassifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(ClassifierConfig):
    """Shape of a fully connected equilibrium classifier.

    Raises:
        ValueError: a field is out of range.
    """

    width: int = 128
    """Size of the state."""
    cap: float | None = None
    """Largest Lipschitz constant of the map: its matrix is scaled down. Below 1 the map contracts. None: any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "model.", width=">= 1", cap="> 0, or None for no cap")

    def build(self, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> DenseClassifier:
        return DenseClassifier(self, solver=solver, gradient=gradient)

    @property
    def state_size(self) -> int:
        return self.width

    def lipschitz_limit(self, *, training: bool) -> float | None:
        return self.cap


class DenseCell(nn.Module):
    r"""The map $f(z, u) = \mathrm{ReLU}(W z) + \mathrm{ReLU}(U u)$, without biases.

    Its Lipschitz constant is $\|W\|_2$.

    Args:
        width: size of state and injection.
        cap: largest norm of $W$; None: any.

    Source: Pal, Edelman and Rackauckas (2022), MNIST.
    """

    def __init__(self, width: int, cap: float | None = None) -> None:
        super().__init__()
        self.state = nn.Linear(width, width, bias=False)
        if cap is not None:
            parametrize.register_parametrization(self.state, "weight", _Capped(cap))
        self.injection = nn.Linear(width, width, bias=False)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """`(B, width), (B, width) -> (B, width)`."""
        return torch.relu(self.state(z)) + torch.relu(self.injection(u))

    def block_matrix(self, training: bool = False) -> Tensor:
        """Return the Lipschitz constant for `certify`, `(1, 1)`, float64, on the CPU."""
        return torch.linalg.matrix_norm(self.state.weight.detach().double().cpu(), 2)[None, None]


class _Capped(nn.Module):
    """Scales a small matrix down to a spectral norm of at most the cap, by its singular values."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.cap / torch.linalg.matrix_norm(weight, 2).clamp_min(self.cap))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class DenseClassifier(EquilibriumClassifier):
    r"""Classifier of images as vectors: a linear layer and ReLU, the equilibrium, a linear layer.

    $$u = \mathrm{ReLU}(W_1 x + b_1), \quad z^* = \mathrm{ReLU}(W z^*) + \mathrm{ReLU}(U u), \quad
    \mathrm{logits} = W_2 z^* + b_2.$$

    With `config.predictor` the solve begins at $\mathrm{ReLU}(W_g u + b_g)$, otherwise at zeros.

    Args:
        config: shape of the model.
        solver: finds the equilibrium.
        gradient: differentiates it.

    Example:
        >>> import torch, equipoise as eq
        >>> from equipoise.zoo import DenseClassifier, DenseConfig
        >>> config = DenseConfig(image_size=28, image_channels=1, num_classes=10, explicit_steps=1)
        >>> model = DenseClassifier(config, solver=eq.SteadyState())
        >>> model(torch.randn(3, 1, 28, 28)).shape
        torch.Size([3, 10])

    Source: Pal, Edelman and Rackauckas (2022), MNIST.
    """

    def __init__(self, config: DenseConfig, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> None:
        width = config.width
        super().__init__(
            config,
            stem=nn.Sequential(nn.Flatten(), nn.Linear(config.image_channels * config.image_size**2, width), nn.ReLU()),
            deq=DEQ(
                DenseCell(width, config.cap),
                solver=solver,
                gradient=gradient,
                init=nn.Sequential(nn.Linear(width, width), nn.ReLU()) if config.predictor else None,
                explicit_steps=config.explicit_steps,
            ),
            head=nn.Linear(width, config.num_classes),
        )
