"""Penalties and probes of the Jacobian at an equilibrium."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.map import Map
from equipoise.solution import Solution


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
    f = _map(solution)
    with f.session(backward=True), torch.enable_grad():
        z = f.pack(solution.value).detach().requires_grad_()
        fz = f.call(z)
        total = z.new_zeros(())
        if not fz.requires_grad:  # the map ignores its state, and so does all that it depends on
            return total
        for _ in range(num_probes):
            probe = torch.randn_like(fz)
            (product,) = torch.autograd.grad(fz, z, probe, create_graph=True, materialize_grads=True)
            f.counts.vjps += 1
            total = total + product.square().mean()
    return total / num_probes


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
    f = _map(solution)
    with f.session(backward=True):
        with torch.enable_grad():
            z = f.pack(solution.value).detach().requires_grad_()
            fz = f.on([t.detach() for t in f.tensors]).call(z)
        v = torch.randn_like(z.detach())
        growth = torch.zeros(z.shape[0], dtype=torch.float64, device=z.device)
        for number in range(num_iterations):
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
            v = f.pull(fz, z, v)
            if number >= num_iterations // 2:
                growth += torch.linalg.vector_norm(v, dim=1).to(torch.float64).log()
    return (growth / (num_iterations - num_iterations // 2)).exp().to(z.dtype)


def _map(solution: Solution) -> Map:
    if not isinstance(solution.map, Map):
        raise ValueError("the solution carries no map; take it from DEQ.solve or fixed_point, not from a bare solver")
    return solution.map
