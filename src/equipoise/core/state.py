"""States: a tensor, tuple, list or dict of tensors on the outside, one flat `(B, D)` tensor on the inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A tensor, or a tuple, list or dict of tensors, each with a leading batch dimension.
State = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layout of a state with `B` rows in a flat `(B, D)` tensor.

    Attributes:
        kind: `Tensor`, `tuple`, `list` or `dict`: the container that the caller uses.
        keys: names of the parts of a dict, in its order; empty otherwise.
        shapes: shape of each part without the batch dimension.
        sizes: number of elements of each part per row; they add up to `D`.
    """

    kind: type
    keys: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, state: Any, name: str = "z0") -> Layout:
        """Read the layout of a state.

        Args:
            state: tensor, tuple, list or dict of tensors `(B, ...)`.
            name: what to call the state in error messages.

        Raises:
            TypeError: the state is no tensor, tuple, list or dict of floating-point tensors.
            ValueError: it is empty, or its parts differ in batch size, dtype or device.
        """
        kind, keys, parts = _parts(state, name)
        if not parts:
            raise ValueError(f"{name} is an empty {kind.__name__}; pass at least one tensor of shape (B, ...)")
        for part in parts:
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"{name} must be a tensor or a tuple, list or dict of tensors; it contains {type(part).__name__}"
                )
            if not part.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {part.dtype}; convert it with .float()")
            if part.ndim == 0 or part.shape[0] == 0:
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)}; the first dimension is the batch and must not be empty"
                )
            if (part.shape[0], part.dtype, part.device) != (parts[0].shape[0], parts[0].dtype, parts[0].device):
                raise ValueError(
                    f"the parts of {name} must agree in batch size, dtype and device; got "
                    + ", ".join(f"{tuple(p.shape)} {p.dtype} {p.device}" for p in parts)
                )
        shapes = tuple(part.shape[1:] for part in parts)
        return cls(kind, keys, shapes, tuple(shape.numel() for shape in shapes))

    def pack(self, state: Any, name: str, dtype: torch.dtype, cast: bool = False) -> Tensor:
        """Flatten a state of this layout.

        Args:
            state: result of a map, say.
            name: what to call it in error messages.
            dtype: the dtype that the flat tensor must have.
            cast: convert other floating dtypes (under autocast) instead of raising.

        Returns:
            `(B, D)` tensor; a view where the state is one contiguous tensor.

        Raises:
            TypeError: another container or dtype.
            ValueError: another shape, or parts that differ in batch size.
        """
        if self.kind is Tensor and isinstance(state, Tensor):
            parts: Sequence[Tensor] = (state,)
        else:
            kind, keys, parts = _parts(state, name)
            listlike = (tuple, list)
            if kind is not self.kind and not (kind in listlike and self.kind in listlike):
                raise TypeError(f"{name} must be a {self.kind.__name__} like the state, got {kind.__name__}")
            if self.kind is dict:
                if set(keys) != set(self.keys):
                    raise ValueError(f"{name} has keys {sorted(keys)}, the state has {sorted(self.keys)}")
                parts = [state[key] for key in self.keys]
            if len(parts) != len(self.shapes):
                raise ValueError(f"{name} has {len(parts)} parts, the state has {len(self.shapes)}")
        flat = []
        for part, shape in zip(parts, self.shapes, strict=True):
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} contains {type(part).__name__}; every part must be a tensor")
            if part.ndim != len(shape) + 1 or part.shape[1:] != shape:
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)}, the state has ({', '.join(['B', *map(str, shape)])}); "
                    "a map must return the shape of its state"
                )
            if part.dtype != dtype:
                if not (cast and part.is_floating_point()):
                    raise TypeError(f"{name} has dtype {part.dtype}, the state has {dtype}; convert one of them")
                part = part.to(dtype)
            flat.append(part.reshape(part.shape[0], -1))
        if any(part.shape[0] != flat[0].shape[0] for part in flat):
            raise ValueError(f"{name} has parts with {[part.shape[0] for part in flat]} rows; keep the batch dimension")
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def unpack(self, flat: Tensor) -> Any:
        """Restore the structure of a flat `(B, D)` tensor, as views of it."""
        if self.kind is Tensor:
            return flat.view(flat.shape[0], *self.shapes[0])
        parts = [
            part.reshape(flat.shape[0], *shape)
            for part, shape in zip(flat.split(self.sizes, dim=1), self.shapes, strict=True)
        ]
        return dict(zip(self.keys, parts, strict=True)) if self.kind is dict else self.kind(parts)

    def parts(self, state: Any) -> Sequence[Tensor]:
        """List the tensors of a state of this layout."""
        return [state] if self.kind is Tensor else list(state.values()) if self.kind is dict else state


def _parts(state: Any, name: str) -> tuple[type, tuple[str, ...], Sequence[Any]]:
    if isinstance(state, Tensor):
        return Tensor, (), (state,)
    if isinstance(state, Mapping):
        return dict, tuple(state), list(state.values())
    if isinstance(state, (tuple, list)):
        return (list if isinstance(state, list) else tuple), (), state
    raise TypeError(f"{name} must be a tensor or a tuple, list or dict of tensors, got {type(state).__name__}")


@dataclasses.dataclass(frozen=True)
class InputLayout:
    """Layout of the inputs of a map, tensors or containers of tensors, in one list of tensors."""

    forms: tuple[tuple[type, tuple[str, ...], int], ...]

    @classmethod
    def flatten(cls, inputs: Sequence[Any], batch: int | None) -> tuple[list[Tensor], InputLayout]:
        """List the tensors of `inputs`, each of which must have the batch of the state as first dimension, if given.

        Raises:
            TypeError: an input is no tensor, tuple, list or dict of tensors.
            ValueError: an input has another batch size than the state.
        """
        forms: list[tuple[type, tuple[str, ...], int]] = []
        tensors: list[Tensor] = []
        for number, value in enumerate(inputs):
            kind, keys, parts = _parts(value, f"input {number}")
            for part in parts:
                if not isinstance(part, Tensor):
                    raise TypeError(f"input {number} contains {type(part).__name__}; make it an attribute of the map")
                if batch is not None and (part.ndim == 0 or part.shape[0] != batch):
                    raise ValueError(
                        f"input {number} has shape {tuple(part.shape)}, the state has batch {batch}; inputs follow the "
                        "rows of the state: make what all rows share an attribute of the map, or declare coupled=True "
                        "if the rows are one system, such as the nodes of a graph"
                    )
            forms.append((kind, keys, len(parts)))
            tensors.extend(parts)
        return tensors, cls(tuple(forms))

    def unflatten(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Restore the structure of the inputs from their list of tensors."""
        inputs: list[Any] = []
        start = 0
        for kind, keys, count in self.forms:
            parts = tensors[start : start + count]
            start += count
            if kind is Tensor:
                inputs.append(parts[0])
            else:
                inputs.append(dict(zip(keys, parts, strict=True)) if kind is dict else kind(parts))
        return inputs


@dataclasses.dataclass(frozen=True)
class Groups:
    """Rows of a batch that are one system, laid side by side: `(B, D)` on one side, `(G, width * D)` on the other.

    Attributes:
        place: `(B,)` place of each row among `count * width`.
        count: number of groups.
        width: rows of the largest group; smaller ones are filled with zeros.
        number: `(B,)` group of each row, from 0.
    """

    place: Tensor
    count: int
    width: int
    number: Tensor

    @classmethod
    def of(cls, coupled: Any, first: Tensor) -> Groups:
        """Read group numbers, or True for one group.

        Raises:
            TypeError, ValueError: they are no integers `(B,)`.
        """
        rows = first.shape[0]
        if coupled is True:
            coupled = torch.zeros(rows, dtype=torch.int64, device=first.device)
        if not isinstance(coupled, Tensor) or coupled.is_floating_point() or coupled.is_complex():
            got = coupled.dtype if isinstance(coupled, Tensor) else repr(coupled)
            raise TypeError(f"coupled must be False, True or the integer group number of each row, (B,), got {got}")
        if coupled.shape != (rows,):
            raise ValueError(
                f"coupled has shape {tuple(coupled.shape)}, the state has {rows} rows; give each its group"
            )
        number = torch.unique(coupled.to(first.device), return_inverse=True)[1]
        sizes = torch.bincount(number)
        width, order = int(sizes.max()), torch.argsort(number, stable=True)
        rank = torch.arange(rows, device=number.device) - (sizes.cumsum(0) - sizes)[number[order]]
        place = torch.empty_like(number)
        place[order] = number[order] * width + rank
        return cls(place, len(sizes), width, number)

    def sizes(self, parts: Sequence[int] | None) -> tuple[int, ...] | None:
        """Return the sizes of the parts of a joined state."""
        return None if parts is None else tuple(self.width * size for size in parts)

    def join(self, rows: Tensor, parts: Sequence[int] | None) -> Tensor:
        """Lay the rows of each group side by side, each part by itself: `(B, D) -> (G, width * D)`."""
        columns = []
        for column in rows.split(list(parts), dim=1) if parts else (rows,):
            filled = column.new_zeros(self.count * self.width, column.shape[1]).index_copy(0, self.place, column)
            columns.append(filled.view(self.count, -1))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def split(self, joined: Tensor, parts: Sequence[int] | None) -> Tensor:
        """Return the rows in their order: `(G, width * D) -> (B, D)`."""
        columns = joined.split(list(self.sizes(parts) or joined.shape[1:]), dim=1)
        rows = [column.reshape(self.count * self.width, -1)[self.place] for column in columns]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def select(self, index: Tensor) -> tuple[Groups, Tensor]:
        """Return some groups, and the numbers of their rows in the batch."""
        new = torch.full((self.count,), -1, dtype=torch.int64, device=index.device)
        new[index] = torch.arange(len(index), device=index.device)
        rows = (new[self.number] >= 0).nonzero()[:, 0]
        number = new[self.number[rows]]
        return Groups(number * self.width + self.place[rows] % self.width, len(index), self.width, number), rows
