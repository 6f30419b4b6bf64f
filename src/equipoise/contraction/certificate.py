"""Certificates: proofs from the weights that the map of a model contracts, with rates and step counts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.contraction.bounds import UnknownConstant, require_own
from equipoise.core.solution import Solution
from equipoise.nn import DEQ
from equipoise.nn.penalties import solved_map
from equipoise.solvers import Anderson, Picard, Solver

PICARD_UP_TO = 0.6  # Lipschitz constant up to which acceleration saves no evaluations
ROUNDING = 1e-5  # relative rounding error of weights normalized in 32-bit arithmetic


class CertificateError(ValueError):
    """Error for a model without a proof of contraction; the message names the module and the reason."""


class UnprovedConstant(CertificateError):
    """Error for a solver with a Lipschitz constant that the weights do not prove."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    r"""Lipschitz bounds of a map, proved from the weights of its model.

    The blocks of the state obey $\|f_i(z) - f_i(z')\| \le \sum_j M_{ij} \|z_j - z'_j\|$. So $f$ contracts in the
    Euclidean norm if $\|M\|_2 < 1$, and in a norm with weights on the blocks if the Perron radius $\rho(M) < 1$; the
    latter is the sharpest statement that $M$ allows. Then every input has one equilibrium, Picard iteration converges
    to it from every start, and the adjoint system is solved at the same rate.

    Args:
        block_matrix: $M$, row by row.
        training: whether the bounds count dropout.
        norm: $\|M\|_2$.
        radius: $\rho(M)$.
        weights: $d > 0$ with $\|D M D^{-1}\|_2 = \rho(M)$: the Euclidean norm of $(d_i z_i)$ contracts by $\rho$.
        measured: largest norm of the Jacobian at samples; None: not measured.

    Source: standard arguments of Banach and Perron; see `docs/theory`.
    """

    block_matrix: tuple[tuple[float, ...], ...]
    training: bool
    norm: float
    radius: float
    weights: tuple[float, ...]
    measured: float | None = None

    @property
    def contracts(self) -> bool:
        """Whether the map is proved to contract, at least in the weighted norm."""
        return self.radius < 1

    @property
    def lipschitz(self) -> float | None:
        """The proved constant: in the Euclidean norm, or in the weighted one if the Euclidean is 1 or more."""
        return None if not self.contracts else self.norm if self.norm < 1 else self.radius

    @property
    def tightness(self) -> float | None:
        """Ratio of the measured norm to the Euclidean bound."""
        return None if self.measured is None or self.norm == 0 else self.measured / self.norm

    @property
    def condition(self) -> float:
        """Ratio of the largest to the smallest weight, the condition number of the weighted norm."""
        return max(self.weights) / min(self.weights)

    def evaluations(self, rtol: float, *, lipschitz: float | None = None) -> int:
        r"""Bound the evaluations of Picard iteration from zero, for every input, forward and backward.

        A sample stops when $|f(z) - z| \le \mathrm{rtol}\,|f(z)|$. With the constant $L$ in a norm of condition
        $\kappa$ this holds after $k + 1$ evaluations if $\kappa L^k (1 + L) \le \mathrm{rtol}\,(1 - L^{k+1})$; the
        result is the smaller count of both norms. In practice a solve takes fewer, as the bound is not tight.

        Args:
            rtol: relative tolerance of the solver.
            lipschitz: constant $L$ of a solver that bounds the error, which lowers the tolerance to
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
        rates = ((self.radius, self.condition), (self.norm, 1.0))
        return min(_evaluations(rate, condition, wanted) for rate, condition in rates if rate < 1)

    def evaluations_of(self, solver: Solver) -> int | None:
        """Bound the evaluations of a solver whose `max_steps` is large enough, for every input.

        Args:
            solver: any solver.

        Returns:
            The number of evaluations; None without a proof that the map contracts or that the solver converges.
        """
        claimed = getattr(solver, "lipschitz", None)
        if not self.contracts or solver.rtol == 0 or (claimed is not None and self.norm > claimed * (1 + ROUNDING)):
            return None
        if isinstance(solver, Picard) and solver.step == 1:
            return self.evaluations(solver.rtol, lipschitz=solver.lipschitz)
        if isinstance(solver, Anderson) and solver.lipschitz is not None:
            return _accelerated(solver.lipschitz, solver.rtol)
        return None

    def solver(self, *, rtol: float = 1e-3) -> Solver:
        r"""Return a solver that provably converges for every input: `contraction_solver` at the proved norm.

        If only the weighted norm contracts, the solver is Picard iteration with a tolerance of the residual.

        Args:
            rtol: relative error.

        Returns:
            The solver, with the `max_steps` that the proof requires.

        Raises:
            CertificateError: the map is not proved to contract.
        """
        self.require()
        if self.norm >= 1:
            wanted = rtol * (1 - self.radius) / self.condition
            return Picard(rtol=wanted, max_steps=self.evaluations(wanted))
        return contraction_solver(self.norm, rtol=rtol)

    def require(self) -> Certificate:
        """Return this certificate if it proves that the map contracts.

        Raises:
            CertificateError: there is no proof.
        """
        if not self.contracts:
            raise CertificateError(
                f"the map is not proved to contract: the block matrix has radius {self.radius:.3f} >= 1; lower the "
                "constants of its layers (of an MDEQ: slope, cap, dropout or exchange)"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the certificate as plain data."""
        return {**dataclasses.asdict(self), "contracts": self.contracts, "tightness": self.tightness}


def contraction_solver(lipschitz: float, *, rtol: float = 1e-3, max_steps: int | None = None) -> Solver:
    r"""Return the solver for a map with a Lipschitz constant $L < 1$, forward and backward.

    Up to $L = 0.6$ it is Picard iteration, above that Anderson acceleration with Picard's step as a safeguard: it
    replaces a step that contracts less than by $L$. Both bound the error by `rtol`, $\|f(z) - z\| / (1 - L) \le
    \mathrm{rtol}\,\|f(z)\|$. The backward solve has the same constant, as $\|J^T\| = \|J\|$.

    Args:
        lipschitz: $L$: a certificate's `norm`, or before training the bound of the layers, `Contraction.constant`.
        rtol: relative error.
        max_steps: largest number of evaluations; None: the number that the proof requires.

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
        raise ValueError(f"lipschitz={lipschitz!r}: must lie in [0, 1); lower the constants of the layers")
    if not rtol > 0:
        raise ValueError(f"rtol={rtol!r}: must be > 0")
    picard = lipschitz <= PICARD_UP_TO
    needed = _evaluations(lipschitz, 1.0, rtol * (1 - lipschitz)) if picard else _accelerated(lipschitz, rtol)
    family = Picard if picard else Anderson
    return family(rtol=rtol, lipschitz=lipschitz, max_steps=needed if max_steps is None else min(needed, max_steps))


def certify(model: nn.Module, *, training: bool | None = None, solution: Solution | None = None) -> Certificate:
    r"""Bound the Lipschitz constant of a model's map from its present weights.

    Args:
        model: a cell with a method `block_matrix(training)`, a `DEQ` of such a cell, or a model with such a `DEQ` in
            `model.deq`.
        training: count dropout as in training; None: as in the model's mode. The weights are those of the model's
            mode in either case: power iteration scales them in training, a proved bound in evaluation.
        solution: solution of the model, at whose samples the norm of the Jacobian is measured.

    Returns:
        The certificate, whether the map contracts or not.

    Raises:
        CertificateError: a layer of the map has no known constant, or a solver of the model has a constant that the
            weights do not prove.

    Example:
        >>> import dataclasses, equipoise as eq
        >>> from equipoise.zoo import MDEQClassifier, MDEQConfig, SLLLayers
        >>> config = dataclasses.replace(MDEQConfig.digits(), dropout=0.0, contraction=SLLLayers(ceiling=0.5))
        >>> certificate = eq.certify(MDEQClassifier(config).eval())
        >>> certificate.contracts, certificate.norm <= 0.5, certificate.evaluations(1e-3) <= 12
        (True, True, True)
    """
    deq = model if isinstance(model, DEQ) else getattr(model, "deq", None)
    cell: Any = deq.cell if isinstance(deq, DEQ) else model
    if not hasattr(cell, "block_matrix"):
        raise CertificateError(f"{type(cell).__name__} has no method block_matrix(training) that bounds it; define one")
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
    r"""Bound the norm of the Jacobian at each sample's equilibrium from below, by power iteration on $J^T J$.

    Args:
        solution: solution of `DEQ.solve` or `fixed_point`.
        num_iterations: number of products with $J$ and with $J^T$.

    Returns:
        Lower bounds of $\|J\|_2$, `(B,)`.

    Raises:
        ValueError: the solution has no map, or `num_iterations` is below 1.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations!r}: must be >= 1")
    f = solved_map(solution)
    with f.solve_context(backward=True), torch.enable_grad():
        z, fz = f.detached().call_tracked(f.pack(solution.value))
        if not fz.requires_grad:  # the map ignores its state
            return torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
        # J v is the derivative of J^T w in w.
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
    """Solve the inequality of `Certificate.evaluations` for the power L^k, and count the steps."""
    return _steps(lipschitz, rtol / (condition * (1 + lipschitz) + rtol * lipschitz)) + 1


def _accelerated(lipschitz: float, rtol: float) -> int:
    r"""Bound the evaluations of safeguarded Anderson acceleration from zero.

    A rejected step costs an evaluation, and the Picard step after it contracts: after $2 k + 1$ evaluations
    $|r| \le L^k |r_0|$. And $|f(z)| \ge |z^*| - L |z - z^*| \ge |r_0| / (1 + L) - L |r| / (1 - L)$.
    """
    return 2 * _steps(lipschitz, rtol * (1 - lipschitz) / ((1 + rtol * lipschitz) * (1 + lipschitz))) + 1


def _steps(lipschitz: float, power: float) -> int:
    """Return the least k with L^k <= power."""
    if power >= 1:
        return 0
    k = 1 if lipschitz == 0 else math.ceil(math.log(power) / math.log(lipschitz))
    return k + (lipschitz**k > power)  # corrects the rounding of the logarithms


def _perron(matrix: Tensor) -> tuple[float, tuple[float, ...]]:
    """Return the Perron radius of a nonnegative matrix, and the weights of a norm that attains it."""
    if not bool(matrix.isfinite().all()):
        return math.inf, (1.0,) * len(matrix)
    # Positive entries make both vectors positive; they increase the radius, which stays a bound.
    positive = matrix + 1e-12 * matrix.amax().clamp_min(1e-300)
    right, left = _leading(positive), _leading(positive.T)
    d = (left / right).sqrt()
    scaled = d[:, None] * positive / d
    return float(torch.linalg.matrix_norm(scaled, ord=2)), tuple((d / d.amax()).tolist())


def _leading(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eig(matrix)
    return vectors[:, values.real.argmax()].real.abs().clamp_min(1e-150)
