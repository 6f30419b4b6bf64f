"""Objectives of linear models: losses of the scores of a design matrix, and penalties."""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from equipoise.estimators.design import Design

__all__ = ["Design", "GroupPenalty", "LogisticLoss", "Loss", "MultinomialLoss", "SigmoidLoss", "SquaredLoss"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loss(abc.ABC):
    """Objective of a `DescentMap`: sum or mean over rows of a loss of scores and targets, `(B, D) -> (B,)`.

    Args:
        design: operator from states to scores.
        target: `(n,)`, one for each row.
        weights: weights of the rows, `(n,)`, or `(B, n)` if each sample of the batch is a fold; None: 1.
        mean: divide by the sum of the weights.

    Raises:
        TypeError: a target of the wrong dtype.
        ValueError: an argument of the wrong shape; targets or weights out of range.
    """

    design: Design
    target: Tensor
    weights: Tensor | None = None
    mean: bool = False
    _factors: Tensor = dataclasses.field(init=False, repr=False)  # weights of the terms

    def __post_init__(self) -> None:
        name, rows = type(self).__name__, self.design.num_rows
        if self.target.shape[-1:] != (rows,) or self.target.ndim > 2:
            raise ValueError(f"{name}: target must have one entry per row, ({rows},), got {tuple(self.target.shape)}")
        if self.weights is None:
            factors = torch.full((rows,), 1 / rows if self.mean else 1.0, dtype=self.design.dtype)
        else:
            factors = self.weights.to(self.design.dtype)
            if factors.ndim not in (1, 2) or factors.shape[-1] != rows:
                raise ValueError(f"{name}: weights must be ({rows},) or (B, {rows}), got {tuple(factors.shape)}")
            total = factors.sum(-1, keepdim=True)
            if not bool((factors >= 0).all()) or not bool((total > 0).all()):
                raise ValueError(f"{name}: weights must be >= 0 and not all zero")
            factors = factors / total if self.mean else factors
        object.__setattr__(self, "_factors", factors)

    @abc.abstractmethod
    def terms(self, scores: Tensor) -> Tensor:
        """Return the loss of each row: `(B, k, n) -> (B, n)`."""

    def __call__(self, z: Tensor) -> Tensor:
        terms = self.terms(self.design.scores(z))
        if self._factors.ndim == 1:
            return terms @ self._factors
        if len(self._factors) != len(z):
            raise ValueError(f"weights are for a batch of {len(self._factors)}, the state has {len(z)} rows")
        return (terms * self._factors).sum(1)

    def _single_output(self) -> None:
        if self.design.outputs != 1 or self.target.ndim != 1:
            raise ValueError(f"{type(self).__name__} takes one score and one target per row; see MultinomialLoss")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LogisticLoss(Loss):
    r"""Binary logistic loss $\sum_i u_i \log(1 + e^{-y_i s_i})$ with targets $y_i = \pm 1$ and weights $u_i$.

    Args:
        design, target, weights, mean: see `Loss`.

    Example:
        >>> import torch
        >>> design = Design(torch.tensor([[1.0], [-2.0]]))
        >>> loss = LogisticLoss(design=design, target=torch.tensor([1, -1]))
        >>> loss(torch.tensor([[0.0], [1e6]]))
        tensor([1.3863, 0.0000])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._single_output()
        if not bool((self.target.abs() == 1).all()):
            raise ValueError("LogisticLoss: targets must be -1 or +1; take 2 * y - 1 of labels 0 and 1")
        object.__setattr__(self, "target", self.target.to(self.design.dtype))

    def terms(self, scores: Tensor) -> Tensor:
        # Not softplus: it is the identity above its threshold, with errors up to 2e-9.
        return -functional.logsigmoid(self.target * scores[:, 0])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MultinomialLoss(Loss):
    r"""Multinomial logistic loss $\sum_i u_i \bigl(\log \sum_c e^{s_{ic}} - s_{i y_i}\bigr)$, targets $0 \dots k - 1$.

    Args:
        design, target, weights, mean: see `Loss`; the targets are integers.

    Example:
        >>> import torch
        >>> design = Design(torch.tensor([[1.0], [-2.0]]), outputs=3)
        >>> loss = MultinomialLoss(design=design, target=torch.tensor([0, 2]), mean=True)
        >>> loss(torch.zeros(1, 3))
        tensor([1.0986])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target.dtype != torch.int64 or self.target.ndim != 1:
            raise TypeError(f"MultinomialLoss: targets must be (n,) int64 class numbers, got {self.target.dtype}")
        if bool(((self.target < 0) | (self.target >= self.design.outputs)).any()):
            raise ValueError(f"MultinomialLoss: targets must lie in 0 .. {self.design.outputs - 1}")

    def terms(self, scores: Tensor) -> Tensor:
        return functional.cross_entropy(scores, self.target.expand(len(scores), -1), reduction="none")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SquaredLoss(Loss):
    r"""Least squares $\tfrac12 \sum_i u_i \sum_c (y_{ic} - s_{ic})^2$.

    Args:
        design, target, weights, mean: see `Loss`; several outputs take targets `(k, n)`.

    Example:
        >>> import torch
        >>> loss = SquaredLoss(design=Design(torch.tensor([[1.0], [-2.0]])), target=torch.tensor([1.0, 0.0]))
        >>> loss(torch.tensor([[2.0]]))
        tensor([8.5000])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, outputs = self.design.num_rows, self.design.outputs
        if self.target.shape != (rows,) * (outputs == 1) and self.target.shape != (outputs, rows):
            raise ValueError(f"SquaredLoss: target must be ({outputs}, {rows}), got {tuple(self.target.shape)}")
        object.__setattr__(self, "target", self.target.to(self.design.dtype).reshape(outputs, rows))

    def terms(self, scores: Tensor) -> Tensor:
        return 0.5 * (self.target - scores).square().sum(1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SigmoidLoss(Loss):
    r"""Nonlinear least squares $\tfrac12 \sum_i u_i \bigl(y_i - (1 + e^{-s_i})^{-1}\bigr)^2$; not convex.

    Args:
        design, target, weights, mean: see `Loss`; targets are 0 and 1, or -1 and 1 as published.

    Example:
        >>> import torch
        >>> loss = SigmoidLoss(design=Design(torch.tensor([[1.0], [-2.0]])), target=torch.tensor([1.0, 0.0]))
        >>> loss(torch.tensor([[0.0]]))
        tensor([0.2500])

    Source: Ramzi et al. (2022), appendix on nonlinear least squares.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._single_output()
        object.__setattr__(self, "target", self.target.to(self.design.dtype))

    def terms(self, scores: Tensor) -> Tensor:
        return 0.5 * (self.target - scores[:, 0].sigmoid()).square()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GroupPenalty:
    r"""Ridge penalty $\tfrac12 \sum_j e^{\lambda_{g(j)}} w_j^2$ of the coefficients, not of the intercepts.

    $w_j = z_j / \sigma_j$ are the coefficients of the original columns, whatever the scale of the design.

    Args:
        design: operator of the loss.
        groups: number of the group of each feature, `(d,)`, or of each coefficient, `(k, d)`; each group has an entry
            of $\lambda$. None: one group.

    Raises:
        ValueError: groups of the wrong shape or below zero.

    Example:
        >>> import torch
        >>> penalty = GroupPenalty(design=Design(torch.ones(4, 2), intercept=True), groups=torch.tensor([0, 1]))
        >>> penalty(torch.tensor([[2.0, 3.0, 7.0]]), torch.tensor([0.0, 1.0]).log1p())
        tensor([11.])
    """

    design: Design
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        if self.groups is None:
            return
        design, shape = self.design, tuple(self.groups.shape)
        allowed = (design.num_features,), (design.outputs, design.num_features)
        if shape not in allowed or bool((self.groups < 0).any()):
            raise ValueError(f"groups must be numbers >= 0, {allowed[0]} or {allowed[1]}, got {shape}")
        groups = self.groups.to(torch.int64).expand(design.outputs, design.num_features).reshape(-1)
        object.__setattr__(self, "groups", groups)

    @classmethod
    def per_class(cls, design: Design) -> GroupPenalty:
        """Return the penalty with one group for each output."""
        return cls(design=design, groups=torch.arange(design.outputs)[:, None].expand(-1, design.num_features))

    @property
    def num_groups(self) -> int:
        """Number of entries of `log_alpha`."""
        return 1 if self.groups is None else int(self.groups.max()) + 1

    def __call__(self, z: Tensor, log_alpha: Tensor) -> Tensor:
        """Return the penalty `(B,)` of `(B, D)` states with `(p,)` logarithms, or `(B, p)` of each sample."""
        if log_alpha.ndim and log_alpha.shape[-1] != self.num_groups:
            shape = tuple(log_alpha.shape)
            raise ValueError(f"log_alpha must be ({self.num_groups},) or (B, {self.num_groups}), got {shape}")
        weights = z[:, : self.design.num_coefficients]
        if self.design.scale is not None:
            weights = weights / self.design.scale.repeat(self.design.outputs)
        squares = weights.square()
        if self.groups is None:
            sums = squares.sum(1, keepdim=True)
        else:
            sums = squares.new_zeros(len(z), self.num_groups).index_add(1, self.groups, squares)
        return 0.5 * (log_alpha.exp() * sums).sum(1)
