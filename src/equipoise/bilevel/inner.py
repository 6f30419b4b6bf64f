"""Inner problems of bilevel optimization: the state minimizes a loss or is a fixed point."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.core.function_map import DescentMap, FunctionMap
from equipoise.solvers import LBFGS, AdjointBroyden, Solver


class Inner(abc.ABC):
    """An inner problem: a map of the state for each choice of the hyperparameters."""

    # Default solver. It serves any map: the inverse of L-BFGS is symmetric, and that of Broyden's method is poor in the
    # direction of the outer loss.
    solver: ClassVar[Solver] = AdjointBroyden(max_steps=200, memory=240, outer_every=5)
    relative: ClassVar[bool] = False  # tolerances are relative to the state instead of to the first residual

    @abc.abstractmethod
    def map(self, z0: Any, hyper: Sequence[Tensor]) -> FunctionMap:
        """Return the map of states like `z0` whose fixed point is sought; its `params` are the hyperparameters.

        It is not droppable: the user's functions may hold tensors of each row, such as the data of a fold.
        """

    def hessian_change(
        self, f: FunctionMap, z: Tensor, s: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> Tensor | None:
        """Return the products of vectors with the change of $I - J$ between two choices of the hyperparameters.

        Args:
            f: a map of this problem.
            z: `(B, D)` flat state.
            s: `(B, k, D)` vectors.
            before: hyperparameters.
            after: other hyperparameters.

        Returns:
            `(B, k, D)`; None if the change is unknown.
        """
        return None


@dataclasses.dataclass(frozen=True)
class InnerLoss(Inner):
    r"""The state minimizes a loss: $z^*(\theta) = \arg\min_z\ \ell(z) + P(z, \theta)$.

    Args:
        loss: $\ell$, called as `loss(z)`, or as `loss(z, *hyper)` if there is no `penalty`; it returns one number for
            each row of `z`, `(B,)`.
        penalty: $P$, called as `penalty(z, *hyper)`, `(B,)`. With a separate penalty L-BFGS keeps its pairs from step
            to step: only the penalty's Hessian changes with the hyperparameters.

    Raises:
        TypeError: an argument is not a function.
    """

    loss: Callable[..., Tensor]
    penalty: Callable[..., Tensor] | None = None

    solver: ClassVar[Solver] = LBFGS(max_steps=1000, memory=60)

    def __post_init__(self) -> None:
        if not callable(self.loss) or not (self.penalty is None or callable(self.penalty)):
            raise TypeError("InnerLoss(loss, penalty): both must be functions of the state that return (B,)")

    def map(self, z0: Any, hyper: Sequence[Tensor]) -> FunctionMap:
        def objective(z: Any) -> Tensor:
            if self.penalty is None:
                return self.loss(z, *hyper)
            return self.loss(z) + self.penalty(z, *hyper)

        return DescentMap(objective, z0, params=tuple(hyper), droppable=False)

    def hessian_change(
        self, f: FunctionMap, z: Tensor, s: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> Tensor | None:
        if self.penalty is None:
            return None
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            state = f.unpack(leaf)
            change = self.penalty(state, *after).sum() - self.penalty(state, *before).sum()
            gradient = torch.autograd.grad(change, leaf, create_graph=True, materialize_grads=True)[0]
        if not gradient.requires_grad:  # the penalty is linear
            return torch.zeros_like(s)
        columns = [
            torch.autograd.grad(gradient, leaf, column, retain_graph=True, materialize_grads=True)[0]
            for column in s.unbind(dim=1)
        ]
        return torch.stack(columns, dim=1)


@dataclasses.dataclass(frozen=True)
class InnerMap(Inner):
    r"""The state is a fixed point: $z^* = f(z^*, \theta)$.

    Args:
        f: called as `f(z, *hyper)`, it returns a state like `z`.

    Raises:
        TypeError: `f` is not a function.
    """

    f: Callable[..., Any]

    relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise TypeError(f"InnerMap(f={self.f!r}): must be a function f(z, *hyper)")

    def map(self, z0: Any, hyper: Sequence[Tensor]) -> FunctionMap:
        return FunctionMap(lambda z: self.f(z, *hyper), z0, params=tuple(hyper), droppable=False)
