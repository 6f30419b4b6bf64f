"""The Neural ODE to which a continuous DEQ is compared: the same map, followed for a time of one.

Source: Pal, Edelman and Rackauckas (2022), whose baseline this is; integrated by torchdiffeq.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

import equipoise as eq
from equipoise.core.function_map import FunctionMap

METHODS: dict[str, dict[str, Any]] = {
    f"{method}, {way}": {"method": method, "adjoint": way == "adjoint"}
    for method in ("dopri5", "bosh3")
    for way in ("adjoint", "backpropagation")
}


class NeuralODE(eq.nn.DEQ):
    r"""A layer in the place of a `DEQ`, with its cell and start, that follows the map instead of solving it.

    $$ \frac{dz}{dt} = f(z, x), \quad z(0) = z_0, \quad t \in [0, 1], \qquad \text{output } f(z(1), x) $$

    The flow has no $-z$, as published. Gradients are those of the flow, to parameters and inputs. With the gradient
    `Unrolled`, of the fixed-depth steps with which training begins, this is the layer that it replaces.

    Args:
        cell: module `f(z, *inputs) -> z`.
        init: `(*inputs) -> z0`; None: zeros like the first input.
        method: a method of torchdiffeq with adaptive steps.
        adjoint: integrate the adjoint equation backward, with parameters and inputs left out of its error control;
            otherwise the steps are differentiated by backpropagation.
        rtol: relative tolerance of a step, on the root mean square over the batch.
        atol: absolute tolerance.
        first_step: of the flow, and of its adjoint; None: torchdiffeq's choice, which is tiny where `z0` is zero.

    Raises:
        TypeError: an argument is of another kind.
    """

    def __init__(
        self,
        cell: torch.nn.Module,
        *,
        init: Callable[..., Any] | None = None,
        method: str = "dopri5",
        adjoint: bool = False,
        rtol: float = 5e-2,
        atol: float = 5e-2,
        first_step: float | None = None,
    ) -> None:
        super().__init__(cell, init=init)
        self.method, self.adjoint, self.rtol, self.atol = method, adjoint, rtol, atol
        self.first_step = first_step

    def solve(self, *inputs: Any, z0: Any = None, trace: bool = False) -> eq.Solution[Any]:
        """The output, and the evaluations that it took; all samples take as many, and none has a residual.

        Args:
            inputs: as in `DEQ.solve`.
            z0: as in `DEQ.solve`.
            trace: must be False.

        Returns:
            `Solution`: `num_steps` are the evaluations of the integration, without the final application. The
            `num_vjps` of its map's counts are, after a backward pass, the products with the transposed Jacobian that
            the integration took.

        Raises:
            ValueError: a trace is asked for, which only a solve has.
        """
        if trace:
            raise ValueError("NeuralODE.solve(trace=True): a flow of finite time has no residuals")
        if isinstance(self.gradient, eq.Unrolled):
            return super().solve(*inputs, z0=z0)
        if z0 is None:
            z0 = torch.zeros_like(inputs[0]) if self.init is None else self.init(*inputs)
        f = FunctionMap(self.cell, z0, inputs)
        z, evals = self._flow(f, f.pack(z0))
        with f.solve_context():
            value = f.call(z)
        rows = torch.zeros(f.batch, dtype=torch.int64, device=f.device)
        return eq.Solution(
            value=f.unpack(value),
            status=rows + eq.Status.CONVERGED,
            residual=value.new_full((f.batch,), torch.nan),
            num_steps=rows + evals,
            num_evals=f.counts.evals,
            num_vjps=f.counts.vjps,
            map=f,
        )

    def _flow(self, f: FunctionMap, start: Tensor) -> tuple[Tensor, int]:
        """The state at the time one, and the evaluations on the way there."""

        def count(gradient: Tensor) -> None:
            f.counts.vjps += 1

        def field(t: Tensor, z: Tensor) -> Tensor:
            fz = f.call(z)
            if fz.requires_grad:
                fz.register_hook(count)
            return fz

        times = torch.tensor([0.0, 1.0], dtype=start.dtype, device=start.device)
        options = {} if self.first_step is None else {"first_step": self.first_step}
        # The last step ends at the end: beyond it torchdiffeq would interpolate.
        common: dict[str, Any] = {"method": self.method, "rtol": self.rtol, "atol": self.atol}
        common["options"] = {**options, "step_t": times[1:]}
        if self.adjoint and torch.is_grad_enabled():
            # Inputs are parameters of the flow, too: torchdiffeq gives gradients to nothing that is not named.
            wanted = [tensor for tensor in (*f.params, *f.tensors) if tensor.requires_grad]
            states = odeint_adjoint(
                field,
                start,
                times,
                **common,
                adjoint_options={**options, "step_t": times[:1], "norm": "seminorm"},
                adjoint_params=wanted,
            )
        else:
            with f.solve_context():  # weights are computed once
                states = odeint(field, start, times, **common)
        return states[-1], f.counts.evals
