"""Curvature of the reduced cost: the cost at the equilibrium, as a function of the input alone."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.core.map import Map
from equipoise.inputs.joint import JointMap
from equipoise.inputs.schemes import FixedInput, GaussSeidel, Joint, Nested
from equipoise.solvers import Anderson

PROBE_LENGTH = 1e-2  # length of a probing step of the input, relative to 1 + |x|
MAX_STEP = 100.0  # longest measured first step of the input, relative to 1 + |x|
# The curvature at the start counts only the response of state and adjoint within three steps. The first steps of the
# input do not meet the slower rest, so this is cheaper, and no worse, than the curvature at the equilibrium.
QUICK_RESPONSE = Nested(steps=3)
FULL_RESPONSE = Anderson(memory=10, max_steps=40, rtol=0.03)  # solver of the response at the equilibrium
ARNOLDI_STEPS = 12  # evaluations, and products, of the search for negative curvature
ARNOLDI_STEP = 0.75  # step of the input times the curvature in that search; longer ones miss more saddles
ARNOLDI_LENGTH = 1e-3  # length of its probing steps, relative to 1 + |x|


def measure_at_start(f: JointMap, v: Tensor) -> tuple[Tensor, Tensor]:
    """Advance state and adjoint by a few steps, and measure the curvature along the gradient.

    The curvature is a difference of the gradients at the input and a short step away. Both begin at the same state and
    adjoint, so their residuals cancel.

    Args:
        f: the joint map.
        v: `(b, D)` start.

    Returns:
        The start with these steps done, and the inverse curvature, `(b, 1)`.
    """
    f, size, x, scale = f.with_scheme(QUICK_RESPONSE), f.size, v[:, -f.size :], _scale(f, v)
    advanced = f.advance(v)
    gradient = advanced[:, -size:]
    probe = torch.cat([v[:, :-size], x + PROBE_LENGTH * scale * _unit(gradient)], dim=1)
    change = (f.advance(probe) - advanced)[:, -size:]
    curvature = torch.linalg.vector_norm(change, dim=1, keepdim=True) / (PROBE_LENGTH * scale)
    settled = torch.cat([advanced[:, :-size], x], dim=1)
    finite = settled.isfinite().all(dim=1, keepdim=True)
    return torch.where(finite, settled, v), _inverse(curvature, gradient, scale)


def inverse_curvature(f: JointMap, v: Tensor, direction: Tensor) -> Tensor:
    """Return the inverse of the larger curvature in two steps of power iteration on the reduced Hessian, `(b, 1)`.

    A product with the Hessian is a difference of gradients over a short step, to which state and adjoint respond by
    their own equations, so their residuals cancel.

    Args:
        f: the joint map.
        v: `(b, D)` joint state near an equilibrium.
        direction: `(b, p)` start of the power iteration.
    """
    joint, size, length = f.with_scheme(Joint()), f.size, PROBE_LENGTH * _scale(f, v)
    advanced = joint.advance(v)
    response = _Response(f.with_scheme(FixedInput()), v, torch.cat([advanced[:, :-size], v[:, -size:]], dim=1))
    curvature = torch.zeros_like(length)
    for _ in range(2):
        start = torch.zeros_like(v)
        start[:, -size:] = length * _unit(direction)
        change = FULL_RESPONSE.solve(response, start).value
        direction = (joint.advance(v + change) - advanced)[:, -size:] / length
        curvature = torch.maximum(curvature, torch.linalg.vector_norm(direction, dim=1, keepdim=True))
    return _inverse(curvature, advanced[:, -size:], _scale(f, v))


def negative_curvature(f: JointMap, v: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the most negative curvature of the reduced cost over the largest, and its direction.

    A perturbation of the input along an eigenvector of the reduced Hessian, with the response of state and adjoint, is
    multiplied by about $1 - \alpha \lambda$ in a round. Arnoldi iteration finds the largest such factor. A round ends
    with the projection or the proximal operator, so directions that leave an active constraint vanish, and the
    curvature of its border counts. An evaluation of the round costs one of the cell and one product.

    Args:
        f: the joint map.
        v: `(b, D)` joint state near a fixed point.
        inverse: `(b, 1)` inverse of the largest curvature.

    Returns:
        The relative curvature, `(b,)`, and a direction, `(b, D)`, whose input has norm 1. Positive curvatures are not
        exact.
    """
    joint = f.with_step(ARNOLDI_STEP * inverse).with_scheme(GaussSeidel())
    size, states = f.size, (v.shape[1] - f.size) // 2
    unit = (ARNOLDI_LENGTH * _scale(f, v)).repeat(1, v.shape[1])
    unit[:, states : 2 * states] /= inverse  # the adjoint has the unit of a curvature
    there, start = joint.call(v), torch.zeros_like(v)
    start[:, -size:] = torch.arange(size, device=v.device).square().to(v).cos()  # no symmetry of the problem
    basis, products = [_unit(start)], v.new_zeros(len(v), ARNOLDI_STEPS + 1, ARNOLDI_STEPS)
    for k in range(ARNOLDI_STEPS):
        image = (joint.call(v + unit * basis[k]) - there) / unit
        for _ in range(2):  # a second pass removes the rounding errors of the first
            for i, q in enumerate(basis):
                overlap = (q * image).sum(1)
                products[:, i, k] += overlap
                image = image - overlap[:, None] * q
        products[:, k + 1, k] = torch.linalg.vector_norm(image, dim=1)
        basis.append(_unit(image))
    finite = products.isfinite().all(dim=2).all(dim=1)[:, None]
    values, vectors = torch.linalg.eig(torch.where(finite[:, None], products[:, :-1], 0.0))
    factor, index = values.real.max(dim=1)
    weights = vectors.real.gather(2, index[:, None, None].expand(-1, ARNOLDI_STEPS, 1))
    direction = (torch.stack(basis[:-1], dim=2) @ weights)[:, :, 0] * unit
    norm = torch.linalg.vector_norm(direction[:, -size:], dim=1, keepdim=True)
    return (1 - factor) / ARNOLDI_STEP, torch.where(finite & (norm > 0), direction / norm, 0.0)


class _Response(Map):
    r"""The map $\delta \mapsto F(v + \delta) - F(v)$: the response of state and adjoint to a step of the input."""

    def __init__(self, f: Map, v: Tensor, fv: Tensor) -> None:
        super().__init__(f.counts, droppable=f.droppable, blocks=f.blocks)
        self.forward_map, self.v, self.fv = f, v, fv

    def select(self, index: Tensor) -> _Response:
        return _Response(self.forward_map.select(index), self.v[index], self.fv[index])

    def call(self, z: Tensor) -> Tensor:
        return self.forward_map.call(self.v + z) - self.fv


def _scale(f: JointMap, v: Tensor) -> Tensor:
    """Return `1 + |x|`, `(b, 1)`."""
    return 1 + torch.linalg.vector_norm(v[:, -f.size :], dim=1, keepdim=True)


def _unit(direction: Tensor) -> Tensor:
    """Return unit vectors along `direction`, and zeros for zeros."""
    norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return torch.where(norm > 0, direction / torch.where(norm > 0, norm, 1.0), 0.0)


def _inverse(curvature: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
    """Return the inverse curvature; if the curvature is negligible, a step of `MAX_STEP * scale`."""
    steepness = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    step = 1 / torch.maximum(curvature, steepness / (MAX_STEP * scale))
    return torch.where(step.isfinite(), step, 1.0)
