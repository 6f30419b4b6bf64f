"""Guards against maps that break the rules of a fixed point: refusals, and the checks that lead to them."""

import random
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from equipoise.core.linalg import can_branch_on
from equipoise.core.map import Point
from equipoise.core.solution import ConvergenceWarning

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
MADE_INSIDE = 3  # references to a leaf that nothing but the graph, a list and a variable hold
WARNED: set[tuple[str, str, int]] = set()


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
        # Inside a transformation of torch.func a state cannot be read.
        self.reads = not torch._C._are_functorch_transforms_active()
        self.before = self._state() if self.reads else ()

    def _state(self) -> tuple[Any, ...]:
        generators = [torch.default_generator]
        if self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            generators.append(torch.cuda.default_generators[index])
        return random.getstate(), *(generator.get_state().numpy().tobytes() for generator in generators)

    @property
    def advanced(self) -> bool:
        """Whether a generator has advanced since the watch began; another thread may have done that."""
        return self.reads and self._state() != self.before


def evaluate_apart(point: Point, places: Tensor) -> Tensor | None:
    """Evaluate the map of a point again for some of its rows alone, without the others.

    Args:
        point: an evaluated point.
        places: `(k,)` places of the rows in it.

    Returns:
        Their values `(k, D)`; None if the map cannot be evaluated for them alone.
    """
    try:
        with point.map.uncounted():
            return point.map.select(places).call(point.z[places])
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None  # say, an attribute of the map has all rows


def refuse_coupling(point: Point, place: Tensor) -> bool:
    """Raise if a row of a point has another value beside a copy of itself than among its batch mates.

    Args:
        point: an evaluated point of several rows.
        place: that of the row, `()`; a group of rows is evaluated alone.

    Returns:
        Whether rows can be evaluated apart.

    Raises:
        ValueError: rows depend on each other, or on random numbers.
    """
    # Beside a copy any mate is missed, also one that is alone with it in a pair.
    places = place.expand(2 if point.map.copies_rows else 1)
    again = evaluate_apart(point, places)
    if again is not None and differ(point, places, again):
        raise refusal(point, places, again)
    return again is not None


def differ(point: Point, places: Tensor, again: Tensor) -> bool:
    """Return whether rows have other values than at a point, beyond rounding."""
    fz, z = point.fz[places], point.z[places]
    allowed = point.map.rounding(z.dtype) * (torch.linalg.vector_norm(fz, dim=1) + torch.linalg.vector_norm(z, dim=1))
    return bool((~(torch.linalg.vector_norm(again - fz, dim=1) <= allowed) & fz.isfinite().all(dim=1)).any())


def refusal(point: Point, places: Tensor, again: Tensor) -> ValueError:
    """Return the refusal of a map whose rows have other values when they are evaluated apart."""
    once_more = evaluate_apart(point, places)
    return ValueError(COUPLED if once_more is not None and torch.equal(once_more, again) else RANDOM)


def refuse_randomness(watch: RandomWatch, point: Point) -> None:
    """Raise if a generator has advanced and two rows have other values at the same point.

    Args:
        watch: begun before the solve.
        point: last point of the solve.
    """
    if not watch.advanced:
        return
    places = torch.arange(2, device=point.z.device) % len(point.z)
    with point.map.uncounted():
        again = evaluate_apart(point, places) if point.map.droppable else point.map.call(point.z)[places]
    if again is not None and differ(point, places, again):
        raise refusal(point, places, again) if point.map.droppable else ValueError(RANDOM)


def refuse_changes(fz: Tensor, z: Tensor, residual: Tensor, allowed: float, g: Tensor) -> Tensor:
    """Compare the value of a map in the backward pass with that of the solve, by the recorded residual `(b,)`.

    Returns:
        The cotangent `g`; on a device, NaN where the map has changed, since the host does not wait for it.

    Raises:
        RuntimeError: the map has changed.
    """
    size = torch.linalg.vector_norm(fz, dim=1) + torch.linalg.vector_norm(z, dim=1)
    changed = (torch.linalg.vector_norm(fz - z, dim=1) - residual).abs() > allowed * size  # False at NaN
    if not can_branch_on(z):
        return torch.where(changed[:, None], torch.nan, g)
    if bool(changed.any()):
        raise RuntimeError(CHANGED)
    return g


def sources(fz: Tensor, known: Sequence[Tensor]) -> tuple[set[int], list[Tensor]]:
    """Walk the graph of a value back to the tensors that it depends on.

    Args:
        fz: a tracked value.
        known: tensors behind which the walk does not go.

    Returns:
        Identities of the known tensors that were reached, and the leaves that are not known.
    """
    nodes = {tensor.grad_fn: id(tensor) for tensor in known if tensor.grad_fn is not None}
    leaves = {id(tensor) for tensor in known}
    reached: set[int] = set()
    others: list[Tensor] = []
    seen, stack = set(), [fz.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes:
            reached.add(nodes[node])
            continue
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in leaves:
            reached.add(id(variable))
        elif variable is not None:
            others.append(variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return reached, others


def refuse_foreign(fz: Tensor, known: Sequence[Tensor]) -> None:
    """Raise if a value depends on tensors that need gradients and would not get them."""
    # A leaf that only the graph holds was made inside the map; nobody waits for its gradient.
    for tensor in sources(fz, known)[1]:
        if sys.getrefcount(tensor) > MADE_INSIDE:
            raise RuntimeError(
                f"the map depends on a tensor of shape {tuple(tensor.shape)} that requires a gradient but is no "
                "parameter, buffer, attribute or input of it, so its gradient would be missing: give it to "
                "fixed_point(..., params=[...]), or make it an attribute of the module before the call"
            )


def warn_once(kind: str, message: Callable[[], str]) -> None:
    """Issue a `ConvergenceWarning` at the line of the user's code that is running, once for each kind and line."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("equipoise", "torch"):
        frame = frame.f_back
    name, line = ("<backward>", 1) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
    if (kind, name, line) not in WARNED:
        WARNED.add((kind, name, line))
        warnings.warn_explicit(message(), ConvergenceWarning, name, line)
