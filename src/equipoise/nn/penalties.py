"""Penalties and probes of the Jacobian at an equilibrium."""

import torch
from torch import Tensor

from equipoise.core.function_map import FunctionMap
from equipoise.core.solution import Solution


def jacobian_penalty(solution: Solution, num_probes: int = 1) -> Tensor:
    r"""Hutchinson estimate of the mean squared Frobenius norm of the Jacobian, differentiable in the parameters.

    $$ \frac{1}{M B D} \sum_{m=1}^{M} \|\epsilon_m^\top J(z^*)\|^2, \qquad \epsilon_m \sim \mathcal N(0, I) $$

    Its expectation is $\|J\|_F^2 / D$, averaged over the batch. The gradient does not pass through $z^*$.

    Args:
        solution: of a solve; its map is evaluated once more at its value, with the same dropout masks and weights.
        num_probes: $M$.

    Returns:
        Scalar.

    Raises:
        ValueError: fewer than one probe, or a solution without its map.

    Source: Bai, Koltun and Kolter (2021), section 4.2.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes={num_probes!r}: must be >= 1")
    f = solved_map(solution)
    with f.solve_context(backward=True), torch.enable_grad():
        z, fz = f.call_tracked(f.pack(solution.value))
        total = z.new_zeros(())
        if not fz.requires_grad:  # the map ignores its state
            return total
        for _ in range(num_probes):
            probe = torch.randn_like(fz)
            (product,) = torch.autograd.grad(fz, z, probe, create_graph=True, materialize_grads=True)
            f.counts.vjps += 1
            total = total + product.square().mean()
    return total / num_probes


def skip_penalty(solution: Solution, *, per_scale: bool = True, detach_target: bool = False) -> Tensor:
    r"""Mean distance of an equilibrium from the start of its solve, made by a predictor or an explicit step.

    $$ \sum_i \operatorname{mean} |z^*_i - z_{0,i}|, \qquad z_0 = g_\varphi(x) \text{ (Skip) or } f(0, x)
       \text{ (Skip Reg)} $$

    It draws the start to the equilibrium and the equilibrium to the start; the second makes the map easier to solve,
    forward and backward. One adjoint solve serves the cotangents of penalty and task.

    Args:
        solution: of `DEQ.solve` with `init` or `explicit_steps`.
        per_scale: sum the means of the parts of the state, so that a coarse scale counts as much as the finest; else
            take the mean over all numbers of the state.
        detach_target: train the predictor alone, without effect on the equilibrium.

    Returns:
        Scalar.

    Raises:
        ValueError: the solution has no start.

    Example:
        >>> import torch, equipoise as eq
        >>> cell = torch.nn.Bilinear(4, 4, 4)
        >>> layer = eq.nn.DEQ(cell, init=torch.nn.Linear(4, 4))
        >>> solution = layer.solve(torch.ones(2, 4))
        >>> loss = solution.value.square().mean() + 0.1 * eq.nn.skip_penalty(solution)
        >>> loss.backward()

    Source: Pal, Edelman and Rackauckas (2022), Skip DEQ and Skip Reg DEQ; the norm is that of the released code.
    """
    if solution.start is None:
        raise ValueError("the solution has no start; take it from DEQ.solve, not from a bare solver")
    f = solved_map(solution)
    target = f.pack(solution.value)
    gap = ((target.detach() if detach_target else target) - f.pack(solution.start)).abs()
    if not per_scale:
        return gap.mean()
    return torch.stack([part.mean() for part in gap.split(f.layout.sizes, dim=1)]).sum()


def spectral_radius(solution: Solution, num_iterations: int = 100) -> Tensor:
    r"""Spectral radius of the Jacobian at each sample's equilibrium, by power iteration on $J^\top$.

    The estimate is the geometric mean growth of a vector over the second half of the iterations, which also
    converges where the leading eigenvalues are a complex pair.

    Args:
        solution: of a solve.
        num_iterations: products with $J^\top$.

    Returns:
        `(B,)` estimates.

    Raises:
        ValueError: fewer than two iterations, or a solution without its map.
    """
    if num_iterations < 2:
        raise ValueError(f"num_iterations={num_iterations!r}: must be >= 2")
    f = solved_map(solution)
    with f.solve_context(backward=True):
        z, fz = f.detached().call_tracked(f.pack(solution.value))
        v = torch.randn_like(z.detach())
        growth = torch.zeros(z.shape[0], dtype=torch.float64, device=z.device)
        for number in range(num_iterations):
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
            v = f.vjp(fz, z, v)
            if number >= num_iterations // 2:
                growth += torch.linalg.vector_norm(v, dim=1).to(torch.float64).log()
    return (growth / (num_iterations - num_iterations // 2)).exp().to(z.dtype)


def solved_map(solution: Solution) -> FunctionMap:
    """Return the map of a solution.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(solution.map, FunctionMap):
        raise ValueError("the solution carries no map; take it from DEQ.solve or fixed_point, not from a bare solver")
    return solution.map
