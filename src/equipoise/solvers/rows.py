"""Rows of a batch: their norms, and their parting as some of them stop."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def block_norms(x: Tensor, blocks: tuple[int, ...] | None, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the norm of each row, `(b,)`, or of each of its `k` blocks, `(b, k)`."""
    if blocks is not None:
        return torch.stack([block_norms(part, None, norm) for part in x.split(blocks, dim=1)], dim=1)
    return torch.linalg.vector_norm(x, dim=1) if norm is None else norm(x).to(x.dtype)


def split_rows(memory: Any, keep: Tensor, gone: Tensor) -> tuple[Any, Any]:
    """Split a solver's memory into that of the rows that stay and of those that leave.

    Every tensor in it is split along its first dimension, also in nested dataclasses and tuples. Histories
    `(b, m, ...)` are sorted in place and split into views, so that they are never held twice.
    """
    if isinstance(memory, Tensor):
        if memory.ndim < 3:
            return memory[keep], memory[gone]
        order = torch.cat([keep, gone])
        for column in memory.unbind(dim=1):
            column.copy_(column[order])
        return memory[: len(keep)], memory[len(keep) :]
    if isinstance(memory, (tuple, list)):
        pairs = [split_rows(part, keep, gone) for part in memory]
        return type(memory)(stay for stay, _ in pairs), type(memory)(go for _, go in pairs)
    if dataclasses.is_dataclass(memory) and not isinstance(memory, type):
        names = [field.name for field in dataclasses.fields(memory)]
        pairs = [split_rows(getattr(memory, name), keep, gone) for name in names]
        return (
            dataclasses.replace(memory, **{name: stay for name, (stay, _) in zip(names, pairs, strict=True)}),
            dataclasses.replace(memory, **{name: go for name, (_, go) in zip(names, pairs, strict=True)}),
        )
    return memory, memory
