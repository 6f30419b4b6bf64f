"""Certificates: proofs from the weights that the map of a model contracts, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.contraction.bounds import UnknownConstant, require_own
from equipoise.core.function_map import Map
from equipoise.core.solution import Solution
from equipoise.nn import DEQ
from equipoise.solvers import Anderson, Picard, Solver

PICARD_UP_TO = 0.6  # a contraction this strong gains nothing from acceleration
ROUNDING = 1e-5  # relative, of weights that were divided by their norms in 32-bit arithmetic


class CertificateError(ValueError):
    """A model whose contraction cannot be proved; the message names the module and the reason."""


class UnprovedConstant(CertificateError):
    """A solver that was given a Lipschitz constant which the weights do not prove."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    r"""What the weights of a model prove about its map.

    The blocks of the state obey $\|f_i(z) - f_i(z')\| \le \sum_j M_{ij} \|z_j - z'_j\|$. So $f$ contracts in the
    Euclidean norm if $\|M\|_2 < 1$, and in some norm that weights the blocks if the Perron radius $\rho(M) < 1$; the
    latter is the sharpest statement that $M$ allows. Then there is one equilibrium for every input, Picard iteration
    reaches it from every start, and the adjoint system is solved as fast.

    Args:
        block_matrix: $M$, row by row.
        training: whether dropout is counted.
        norm: $\|M\|_2$.
        radius: $\rho(M)$.
        weights: $d > 0$ with $\|D M D^{-1}\|_2 = \rho(M)$: the Euclidean norm of $(d_i z_i)$ contracts by $\rho$.
        measured: largest norm of the Jacobian found at samples; None: none were looked at.

    Source: standard arguments of Banach and Perron; see `docs/math.md`.
    """

    block_matrix: tuple[tuple[float, ...], ...]
    training: bool
    norm: float
    radius: float
    weights: tuple[float, ...]
    measured: float | None = None

    @property
    def contracts(self) -> bool:
        """Whether the map is proved to contract, in the weighted norm at least."""
        return self.radius < 1

    @property
    def lipschitz(self) -> float | None:
        """The constant that is proved: in the Euclidean norm, or, where that is 1 or more, in the weighted one."""
        return None if not self.contracts else self.norm if self.norm < 1 else self.radius

    @property
    def tightness(self) -> float | None:
        """Share of the Euclidean bound that was found at samples."""
        return None if self.measured is None or self.norm == 0 else self.measured / self.norm

    @property
    def condition(self) -> float:
        """Ratio of the largest to the smallest weight: what the weighted norm costs in the Euclidean one."""
        return max(self.weights) / min(self.weights)

    def evaluations(self, rtol: float, *, lipschitz: float | None = None) -> int:
        r"""Evaluations after which Picard iteration from zero has stopped, for every input, forward and backward.

        A sample stops when $|f(z) - z| \le \mathrm{rtol}\,|f(z)|$. With the constant $L$ in a norm of condition
        $\kappa$ this holds after $k + 1$ evaluations if $\kappa L^k (1 + L) \le \mathrm{rtol}\,(1 - L^{k+1})$: the
        least over both norms. Evaluations in practice are fewer, by the tightness of the bound.

        Args:
            rtol: of the solver.
            lipschitz: the constant that the solver was given, if it bounds the error: it then asks for the residual
                $(1 - L)\,\mathrm{rtol}\,|f(z)|$.

        Returns:
            The number of evaluations.

        Raises:
            CertificateError: the map is not proved to contract.
            ValueError: `rtol` is not positive.

        Example:
            >>> from equipoise import Certificate
            >>> half = Certificate(block_matrix=((0.5,),), training=False, norm=0.5, radius=0.5, weights=(1.0,))
            >>> half.evaluations(1e-3)
            12
        """
        if not rtol > 0:
            raise ValueError(f"rtol={rtol!r}: must be > 0")
        self.require()
        wanted = rtol if lipschitz is None else rtol * (1 - lipschitz)
        found = [_evaluations(self.radius, self.condition, wanted)]
        if self.norm < 1:
            found.append(_evaluations(self.norm, 1.0, wanted))
        return min(found)

    def evaluations_of(self, solver: Solver) -> int | None:
        """Evaluations after which a solver has stopped if its `max_steps` let it, for every input.

        Args:
            solver: any.

        Returns:
            The number; None where nothing is proved: the map, or this kind of solver, which need not converge.
        """
        told = getattr(solver, "lipschitz", None)
        if not self.contracts or solver.rtol == 0 or (told is not None and self.norm > told * (1 + ROUNDING)):
            return None
        if isinstance(solver, Picard) and solver.step == 1:
            return self.evaluations(solver.rtol, lipschitz=solver.lipschitz)
        if isinstance(solver, Anderson) and solver.lipschitz is not None:
            return _accelerated(solver.lipschitz, solver.rtol)
        return None

    def solver(self, *, rtol: float = 1e-3) -> Solver:
        r"""A solver that reaches the equilibrium of every input, with a proof: that of `contraction_solver`.

        Where only the weighted norm contracts, Picard iteration on the residual.

        Args:
            rtol: relative error.

        Returns:
            The solver; its `max_steps` is what the proof needs.

        Raises:
            CertificateError: the map is not proved to contract.
        """
        self.require()
        if self.norm >= 1:
            wanted = rtol * (1 - self.radius) / self.condition
            return Picard(rtol=wanted, max_steps=self.evaluations(wanted))
        return contraction_solver(self.norm, rtol=rtol)

    def require(self) -> Certificate:
        """This certificate, if the map contracts.

        Raises:
            CertificateError: it is not proved to.
        """
        if not self.contracts:
            raise CertificateError(
                f"the map is not proved to contract: the block matrix has radius {self.radius:.3f} >= 1; lower the "
                "constants of its layers (of an MDEQ: slope, cap, dropout or exchange)"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for files."""
        return {**dataclasses.asdict(self), "contracts": self.contracts, "tightness": self.tightness}


def contraction_solver(lipschitz: float, *, rtol: float = 1e-3, max_steps: int | None = None) -> Solver:
    r"""The solver for a map with a Lipschitz constant $L < 1$, forward and, as $J^T$ has the same, backward.

    Up to $L = 0.6$ Picard iteration, above it Anderson acceleration that goes back to Picard's step wherever it
    contracts less than $L$ promises. Both bound the error by `rtol`, $\|f(z) - z\| / (1 - L) \le
    \mathrm{rtol}\,\|f(z)\|$.

    Args:
        lipschitz: $L$: a certificate's `norm`, or before training what the layers allow, `Contraction.constant`.
        rtol: relative error.
        max_steps: most evaluations; None: as many as the proof needs.

    Returns:
        The solver.

    Raises:
        ValueError: `lipschitz` is outside [0, 1), or `rtol` is not positive.

    Example:
        >>> import equipoise as eq
        >>> eq.contraction_solver(0.5).max_steps
        13
    """
    if not 0 <= lipschitz < 1:
        raise ValueError(f"lipschitz={lipschitz!r}: must lie in [0, 1); only a contraction has such a solver")
    if not rtol > 0:
        raise ValueError(f"rtol={rtol!r}: must be > 0")
    picard = lipschitz <= PICARD_UP_TO
    needed = _evaluations(lipschitz, 1.0, rtol * (1 - lipschitz)) if picard else _accelerated(lipschitz, rtol)
    family = Picard if picard else Anderson
    return family(rtol=rtol, lipschitz=lipschitz, max_steps=needed if max_steps is None else min(needed, max_steps))


def certify(model: nn.Module, *, training: bool | None = None, solution: Solution | None = None) -> Certificate:
    r"""Prove from the present weights how much a model's map contracts.

    Args:
        model: a `DEQ`, or a model with one in `model.deq`, whose cell has a method `block_matrix(training)`; or such
            a cell.
        training: count dropout as it is in training; None: as in the model's mode. The weights are those of the
            model's mode in either case: steered by power iteration in training, proved to obey caps in evaluation.
        solution: of a solve of the model; the norm of the Jacobian is measured at each of its samples, from below.

    Returns:
        The certificate, whether the map contracts or not.

    Raises:
        CertificateError: a layer inside the map has no known constant, and is named; or the solver was given a
            constant that the weights do not prove.

    Example:
        >>> import dataclasses, equipoise as eq
        >>> from equipoise.models import MDEQClassifier, MDEQConfig, SLLLayers
        >>> config = dataclasses.replace(MDEQConfig.digits(), dropout=0.0, contraction=SLLLayers(ceiling=0.5))
        >>> certificate = eq.certify(MDEQClassifier(config).eval())
        >>> certificate.contracts, certificate.norm <= 0.5, certificate.evaluations(1e-3) <= 12
        (True, True, True)
    """
    deq = model if isinstance(model, DEQ) else getattr(model, "deq", None)
    cell: Any = deq.cell if isinstance(deq, DEQ) else model
    if not hasattr(cell, "block_matrix"):
        raise CertificateError(
            f"{type(cell).__name__} has no method block_matrix(training) that bounds it; see docs/extending.md"
        )
    for name, value in cell.named_parameters():
        if value.is_floating_point() and value.dtype.itemsize < 4:
            raise CertificateError(f"{name} is {value.dtype}, which rounds more than a proof allows; use model.float()")
    training = model.training if training is None else training
    try:
        require_own(cell, "block_matrix")
        matrix = cell.block_matrix(training).detach().double().cpu()
    except UnknownConstant as error:
        name = next((name for name, module in model.named_modules() if module is error.module), "") or "the map"
        raise CertificateError(f"{name} ({error})") from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or bool((matrix < 0).any()):
        raise CertificateError(
            f"{type(cell).__name__}.block_matrix must return a square matrix of bounds >= 0, got {matrix.tolist()}"
        )
    finite = bool(matrix.isfinite().all())
    norm = float(torch.linalg.matrix_norm(matrix, ord=2)) if finite else math.inf
    radius, weights = _perron(matrix)
    measured = None if solution is None else float(jacobian_norm(solution).amax())
    certificate = Certificate(
        block_matrix=tuple(map(tuple, matrix.tolist())),
        training=training,
        norm=norm,
        radius=radius,
        weights=weights,
        measured=measured,
    )
    for owner in (deq, deq.gradient) if isinstance(deq, DEQ) else ():
        claimed = getattr(getattr(owner, "solver", None), "lipschitz", None)
        if claimed is not None and norm > claimed * (1 + ROUNDING):
            mode = "in training, " if training else ""
            raise UnprovedConstant(
                f"the solver of the {type(owner).__name__} was given lipschitz={claimed}, and {mode}the weights prove "
                f"{norm:.4f} only; give it certify(model).solver(), or a constant above the bound of the layers"
            )
    return certificate


def jacobian_norm(solution: Solution, num_iterations: int = 30) -> Tensor:
    r"""Norm of the Jacobian $\|J\|_2$ at each sample's equilibrium, by power iteration on $J^T J$.

    Args:
        solution: of a solve.
        num_iterations: products with $J$ and $J^T$.

    Returns:
        `(B,)` lower bounds.

    Raises:
        ValueError: a solution without its map, or fewer than one iteration.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations!r}: must be >= 1")
    f = solution.map
    if not isinstance(f, Map):
        raise ValueError("the solution carries no map; take it from DEQ.solve or fixed_point, not from a bare solver")
    with f.session(backward=True), torch.enable_grad():
        z = f.pack(solution.value).detach().requires_grad_()
        fz = f.on([t.detach() for t in f.tensors]).call(z)
        if not fz.requires_grad:  # the map ignores its state
            return torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
        # J v is the derivative of J^T w by w.
        w = torch.zeros_like(fz, requires_grad=True)
        (back,) = torch.autograd.grad(fz, z, w, create_graph=True, materialize_grads=True)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
        for _ in range(num_iterations):
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
            (forward,) = torch.autograd.grad(back, w, v, retain_graph=True, materialize_grads=True)
            (v,) = torch.autograd.grad(fz, z, forward, retain_graph=True, materialize_grads=True)
    return torch.linalg.vector_norm(forward, dim=1)


def _evaluations(lipschitz: float, condition: float, rtol: float) -> int:
    # The inequality is one of the power L^k alone.
    return _steps(lipschitz, rtol / (condition * (1 + lipschitz) + rtol * lipschitz)) + 1


def _accelerated(lipschitz: float, rtol: float) -> int:
    """Evaluations after which safeguarded Anderson acceleration from zero has stopped.

    A step that is taken back costs an evaluation, and the Picard step after it contracts: after $2 k + 1$ evaluations
    $|r| \\le L^k |r_0|$. And $|f(z)| \\ge |z^*| - L |z - z^*| \\ge |r_0| / (1 + L) - L |r| / (1 - L)$.
    """
    return 2 * _steps(lipschitz, rtol * (1 - lipschitz) / ((1 + rtol * lipschitz) * (1 + lipschitz))) + 1


def _steps(lipschitz: float, power: float) -> int:
    """The least k with L^k at most as large as a power."""
    if power >= 1:
        return 0
    k = 1 if lipschitz == 0 else math.ceil(math.log(power) / math.log(lipschitz))
    return k + (lipschitz**k > power)  # logarithms are rounded


def _perron(matrix: Tensor) -> tuple[float, tuple[float, ...]]:
    """Radius of a nonnegative matrix, and weights in whose Euclidean norm it is that large."""
    if not bool(matrix.isfinite().all()):
        return math.inf, (1.0,) * len(matrix)
    # Positive entries make both vectors positive, and a matrix that is larger has a larger radius: still a bound.
    positive = matrix + 1e-12 * matrix.amax().clamp_min(1e-300)
    right, left = _leading(positive), _leading(positive.T)
    d = (left / right).sqrt()
    scaled = d[:, None] * positive / d
    return float(torch.linalg.matrix_norm(scaled, ord=2)), tuple((d / d.amax()).tolist())


def _leading(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eig(matrix)
    return vectors[:, values.real.argmax()].real.abs().clamp_min(1e-150)
