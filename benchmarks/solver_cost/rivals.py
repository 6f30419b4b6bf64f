"""torchdeq 0.1.0, with the configurations of its solvers that are measured."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torchdeq
from torch import Tensor


class CountedVjp(torch.autograd.Function):
    """The identity; counts the products that pass backward through it."""

    count = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        CountedVjp.count += 1
        return g


@dataclasses.dataclass
class Rival:
    """torchdeq with one of its solvers; `calls` counts evaluations of `f`."""

    solver: str
    options: dict[str, Any]
    calls: int = 0

    def solve(self, f: Callable[..., Any], z0: Any, u: Any, rtol: float, *, grad: bool = False) -> Any:
        """Return the last state, with gradients if they are wanted."""
        deq = torchdeq.get_deq(
            f_solver=self.solver, f_max_iter=100, f_tol=rtol, f_stop_mode="rel", b_solver="anderson", b_max_iter=100,
            b_tol=rtol, b_stop_mode="rel", ift=True,
        )  # fmt: skip

        def call(*z: Tensor) -> Any:
            self.calls += 1
            out = f(z[0] if len(z) == 1 else z, u)
            return out if isinstance(out, Tensor) else list(out)

        deq.train(grad)
        out, _ = deq(call, z0 if isinstance(z0, Tensor) else list(z0), solver_kwargs=dict(self.options))
        return out[-1] if isinstance(out[-1], Tensor) else tuple(out[-1])


RIVALS = {
    "torchdeq-picard": [Rival("fixed_point_iter", {})],
    "torchdeq-anderson": [Rival("anderson", {}), Rival("anderson", {"m": 5, "lam": 1e-8})],
    "torchdeq-broyden": [Rival("broyden", {})],
}
