"""Guards against maps that break the rules of a fixed point: refusals, and the checks that lead to them."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from equipoise.core.map import Point

COUPLED = (
    "rows of the batch depend on each other: a row evaluated without the others has another value, so rows cannot "
    "converge one by one; make the map act on each row alone, or declare coupled=True if the batch is one system, or "
    "coupled=GROUPS with the group number of each row, (B,), if it holds several (a batch of graphs)"
)
RANDOM = (
    "the map draws random numbers: it has another value each time it is evaluated at the same point, so it has no "
    "equilibrium; use equipoise.nn.VariationalDropout, whose mask is fixed during a solve, or call .eval()"
)
CHANGED = (
    "the map has changed since the solve: its value at the equilibrium in the backward pass is another one, so the "
    "gradient would be that of another map; change its buffers, attributes and mode after the backward pass"
)


def versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the version counter of each tensor, which every write into it raises."""
    return tuple(tensor._version for tensor in tensors if not tensor.is_inference())


def refuse_writes(before: tuple[int, ...], tensors: Sequence[Tensor]) -> None:
    """Raise if one of the tensors was written to since its version was read."""
    if versions(tensors) != before:
        raise written()


def written() -> ValueError:
    """Return the refusal of a map that writes into its arguments."""
    return ValueError(
        "the map writes into its argument, which the solver and the caller still need; write out of place: z * 0.5 for "
        "z.mul_(0.5), relu(z) for relu_(z), a new tensor for out=z or z[:] = ..."
    )


def refuse_tangents(tensors: Sequence[Tensor]) -> None:
    """Raise if forward-mode automatic differentiation is on and a tensor has a tangent."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "a solve has no forward-mode derivative (torch.func.jvp, jacfwd, dual numbers): use reverse mode, "
            "torch.func.vjp or jacrev, or .backward()"
        )


class RandomWatch:
    """State of the random generators that a map may draw from without being given one: torch's and Python's.

    Args:
        device: of the state, whose generator is watched beside that of the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._state()

    def _state(self) -> tuple[Any, ...]:
        generators = [torch.default_generator]
        if self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            generators.append(torch.cuda.default_generators[index])
        return random.getstate(), *(generator.get_state().numpy().tobytes() for generator in generators)

    @property
    def advanced(self) -> bool:
        """Whether a generator has advanced since the watch began; another thread may have done that."""
        return self._state() != self.before


def evaluate_apart(point: Point, places: Tensor) -> Tensor | None:
    """Evaluate the map of a point again for some of its rows alone, without the others.

    Args:
        point: an evaluated point.
        places: `(k,)` places of the rows in it.

    Returns:
        Their values `(k, D)`; None if the map cannot be evaluated for them alone.
    """
    try:
        with point.map.counts.paused():
            return point.map.select(places).call(point.z[places])
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None  # say, an attribute of the map has all rows


def differ(fz: Tensor, again: Tensor, z: Tensor, allowed: float) -> Tensor:
    """Return `(k,)` booleans: rows whose two values differ by more than an allowed part of their size."""
    size = torch.linalg.vector_norm(fz, dim=1) + torch.linalg.vector_norm(z, dim=1)
    return ~(torch.linalg.vector_norm(again - fz, dim=1) <= allowed * size) & fz.isfinite().all(dim=1)


def depend_on_mates(point: Point, finished: Tensor, running: Tensor) -> Tensor | None:
    """Return whether rows of a point have other values without their batch mates, `()`; None if that cannot be seen.

    Args:
        point: an evaluated point of several rows.
        finished: place of a row that has stopped, `()`.
        running: places in order of preference, of a row that has not, `()`.
    """
    # In a batch of two, each row beside a copy of itself; else in the other order, for sums over the rows before.
    places = torch.stack([torch.maximum(finished, running), torch.minimum(finished, running)])
    if len(point.z) == 2:
        places = running.expand(2)
    again = evaluate_apart(point, places)
    if again is None:
        return None
    return differ(point.fz[places], again, point.z[places], point.map.rounding(point.z.dtype)).any()


def refuse_randomness(watch: RandomWatch, point: Point) -> None:
    """Raise if a generator has advanced and two rows have other values at the same point.

    Args:
        watch: begun before the solve.
        point: last point of the solve.
    """
    if not watch.advanced:
        return
    places = torch.arange(min(2, len(point.z)), device=point.z.device)
    with point.map.counts.paused():
        again = evaluate_apart(point, places) if point.map.droppable else point.map.call(point.z)[places]
    if again is not None and bool(
        differ(point.fz[places], again, point.z[places], point.map.rounding(point.z.dtype)).any()
    ):
        raise ValueError(RANDOM)
