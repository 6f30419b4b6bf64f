"""Maps of user functions: the only callers of user code, so they count, check and set modes."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.core.guards import (
    RandomWatch,
    refuse_foreign,
    refuse_tangents,
    refuse_writes,
    sources,
    versions,
    written,
)
from equipoise.core.linalg import can_branch_on
from equipoise.core.map import Map, Point
from equipoise.core.modules import check_modules
from equipoise.core.state import Groups, InputLayout, Layout


class FunctionMap(Map):
    r"""A module or function $f(z, \text{inputs})$ as a map of flat states `(b, D)`.

    Args:
        f: `f(z, *inputs)` returns a state like `z`. A module, or a function.
        z0: a state with the structure and batch that `f` takes.
        inputs: tensors, or tuples, lists or dicts of tensors, whose first dimension is the batch.
        params: tensors that `f` depends on and that are to receive gradients. None: those of the module, or, for a
            function, unknown: it is then treated as a closure, from which no row can be dropped and which has first
            derivatives only. Giving them, even as an empty tuple, promises that all that follows the rows is in
            `inputs`.
        blocks: sizes of consecutive parts of the flat state that must converge separately; None: one block.
        projection: $P$ of a flat `(b, D)` state onto the feasible set, called as `projection(z, *inputs)`. The map is
            then $P \circ f$ and every iterate is projected; None: all states are feasible.
        droppable: False keeps all rows in the batch to the end, for an `f` that holds tensors of each row itself.
        parametrizations: modules inside a function `f` that must not update their buffers in a backward pass, such as
            the power iteration of spectral normalization. Those of a module are found.
        coupled: False: each row is a system of its own. True: the batch is one system. `(B,)` group numbers: rows of
            a group are one system. A flat state then has one row for each system.
        per_part: whether each part of a tuple, list or dict state must meet the tolerance by itself.

    Raises:
        TypeError, ValueError: see `Layout.of` and `InputLayout.flatten`; a cell in training mode with batch
            statistics or ordinary dropout.
    """

    makes_leaves: ClassVar[bool] = False  # whether `f` differentiates inside, so that it tracks leaves of its own

    def __init__(
        self,
        f: Callable[..., Any],
        z0: Any,
        inputs: Sequence[Any] = (),
        *,
        params: Sequence[Tensor] | None = None,
        blocks: Sequence[int] | None = None,
        projection: Callable[..., Tensor] | None = None,
        droppable: bool = True,
        parametrizations: Sequence[nn.Module] = (),
        coupled: bool | Tensor = False,
        per_part: bool = False,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f must be a module or a function f(z, *inputs), got {type(f).__name__}")
        self.layout = Layout.of(z0)
        first = self.layout.parts(z0)[0]
        self.groups = None if coupled is False else Groups.of(coupled, first)
        if per_part:
            blocks = self.layout.sizes
        if blocks is not None and sum(blocks) != sum(self.layout.sizes):
            raise ValueError(f"blocks {tuple(blocks)} must add up to the size of the state, {sum(self.layout.sizes)}")
        self.part_sizes = tuple(blocks) if blocks is not None and len(blocks) > 1 else None
        self.declared = isinstance(f, nn.Module) or params is not None  # False for a closure
        rows = first.shape[0]
        self.tensors, self.input_layout = InputLayout.flatten(inputs, rows if self.groups is None else None)
        super().__init__(
            droppable=droppable
            and self.declared
            and (self.groups is None or all(len(t) == rows for t in self.tensors)),
            blocks=self.part_sizes if self.groups is None else self.groups.sizes(self.part_sizes),
        )
        self.f = f
        self.batch: int = rows if self.groups is None else self.groups.count
        self.device = first.device
        self.state_dtype = first.dtype
        # A solver's sums need more digits than half precision has: only f sees such states.
        self.dtype = torch.float32 if first.dtype in (torch.bfloat16, torch.float16) else first.dtype
        self.owner = f if isinstance(f, nn.Module) and params is None else None  # whose parameters `params` are
        if params is None:
            params = tuple(f.parameters()) if isinstance(f, nn.Module) else ()
        self.owned = self.params = tuple(p for p in params if p.requires_grad)
        self.projection = projection
        self.seeded, found, self.attributes = check_modules(f) if isinstance(f, nn.Module) else ([], [], [])
        self.parametrizations = [*found, *parametrizations]
        self.kept_buffers: list[tuple[nn.Module, str, Tensor]] = []
        self.seeds = torch.randint(2**31, (rows,), device=self.device) if self.seeded else None
        kind = self.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        self.precision = first.dtype if self.autocast is None else self.autocast[1]

    def pack(self, state: Any, name: str = "z0") -> Tensor:
        """Flatten a state to `(b, D)`, in the dtype of the solver."""
        flat = self.layout.pack(state, name, self.dtype, cast=True)
        return flat if self.groups is None else self.groups.join(flat, self.part_sizes)

    def unpack(self, flat: Tensor) -> Any:
        """Restore the structure and dtype of the caller's state."""
        flat = flat if self.groups is None else self.groups.split(flat, self.part_sizes)
        return self.layout.unpack(flat if flat.dtype == self.state_dtype else flat.to(self.state_dtype))

    def select(self, index: Tensor) -> Self:
        batch, groups = int(index.shape[0]), None
        if self.groups is not None:
            groups, index = self.groups.select(index)
        chosen = self.with_inputs([tensor[index] for tensor in self.tensors])
        chosen.batch, chosen.groups = batch, groups
        if self.seeds is not None:
            chosen.seeds = self.seeds[index]
        return chosen

    @property
    def copies_rows(self) -> bool:
        return self.groups is None  # else copies would be in one group

    def with_inputs(self, tensors: Sequence[Tensor]) -> Self:
        """Return the same map with other input tensors, say detached or tracked ones; it shares the counts."""
        chosen = copy.copy(self)
        chosen.tensors = list(tensors)
        return chosen

    def adopt(self, z: Tensor) -> None:
        """Add those tensors to the parameters that a module depends on beside them: buffers, attributes.

        Args:
            z: a flat state at which the map is evaluated, for two rows if it can be, to see them used.
        """
        found = [tensor for tensor in self.attributes if not any(tensor is p for p in self.params)]
        if not found:
            return
        reached = sources(self._tracked_value(z), found)[0]
        self.params = (*self.params, *(tensor for tensor in found if id(tensor) in reached))

    def refuse_foreign(self, z: Tensor) -> None:
        """Raise if a module without parameters depends on other tensors that require gradients."""
        if self.owner is None or self.makes_leaves:
            return
        value = self._tracked_value(z)
        if value.requires_grad:
            refuse_foreign(value, ())

    def _tracked_value(self, z: Tensor) -> Tensor:
        """Evaluate the map, tracked to its parameters alone, for two rows if they can be evaluated apart."""
        with self.uncounted(), self.solve_context(backward=True), torch.enable_grad():
            places = torch.arange(min(2, self.batch), device=self.device)
            try:
                return self.detached().select(places).call(z[places].detach())
            except (IndexError, RuntimeError, TypeError, ValueError):  # an attribute has all rows
                return self.detached().call(z.detach())

    def keep_buffers(self) -> None:
        """Keep the buffers of parametrizations in training mode, which later solves change, for the backward pass."""
        self.kept_buffers = [
            (module, name, buffer.detach().clone())
            for module in self.parametrizations
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def detached(self) -> Self:
        """Return the same map with detached inputs."""
        return self.with_inputs([tensor.detach() for tensor in self.tensors])

    @property
    def projected(self) -> bool:
        return self.projection is not None

    def project(self, z: Tensor) -> Tensor:
        return z if self.projection is None else self.projection(z, *self.input_layout.unflatten(self.tensors))

    def call(self, z: Tensor) -> Tensor:
        """Return `P f(z)`, in the caller's grad mode and the autocast state in which the map was made."""
        out = self._apply(z)
        cast = self.autocast is not None or self.dtype != self.state_dtype
        flat = self.layout.pack(out, "the map's result", self.dtype, cast=cast)
        rows = z.shape[0] if self.groups is None else len(self.groups.place)
        if flat.shape[0] != rows:
            raise ValueError(
                f"the map returned {flat.shape[0]} rows for a state of {rows}; it must keep the batch dimension"
            )
        if self.groups is not None:
            flat = self.groups.join(flat, self.part_sizes)
        refuse_tangents([flat])
        return self.project(flat)

    def call_tracked(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return a new leaf at `z` and the value of the map there, tracked to the leaf."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return leaf, self.call(leaf)

    def call_user(self, function: Callable[..., Any], z: Tensor) -> Any:
        """Call a user function of state and inputs in the map's autocast and dropout state, without counting.

        This is the one place where user code is called.
        """
        for number, layer in enumerate(self.seeded):
            # Layers draw from different streams of each sample's seed; the stride must not be that of the counters
            # within a layer, or one layer's mask would be another's, shifted.
            assert self.seeds is not None
            layer.seeds = self.seeds + 0x85EBCA6B * (number + 1)
        state = self.unpack(z)
        given = [*self.layout.parts(state), *self.tensors]
        before = versions(given)
        try:
            with self._casting():
                out = function(state, *self.input_layout.unflatten(self.tensors))
        except RuntimeError as error:
            if any(words in str(error) for words in ("in-place", "Inplace", "out=...")):
                raise written() from error
            raise
        finally:
            for layer in self.seeded:
                layer.seeds = None
        refuse_writes(before, given)
        return out

    def _apply(self, z: Tensor) -> Any:
        """Call `f` at flat `z` and count it."""
        self.counts.evals += 1
        return self.call_user(self.f, z)

    def _casting(self) -> contextlib.AbstractContextManager[object]:
        """Return the autocast context in which the map was made."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.autocast[0], dtype=self.autocast[1])

    def representable(self, z: Tensor) -> Tensor:
        """Round a flat state to the dtype of the caller's state, whose values are returned."""
        return z if self.dtype == self.state_dtype else z.to(self.state_dtype).to(self.dtype)

    def watch(self) -> RandomWatch:
        return RandomWatch(self.device)

    def evaluate(self, z: Tensor, rows: Tensor, running: Tensor, *, graph: bool = False) -> Point:
        if not graph:
            rounded = z.to(self.state_dtype)
            fz, z = self.call(rounded), rounded.to(self.dtype)
            return Point(z, fz, fz - z, rows, running, self)
        z = self.representable(z)
        leaf, tracked = self.detached().call_tracked(z)
        fz = tracked.detach()
        return Point(z, fz, fz - z, rows, running, self, pullback=functools.partial(self.vjp, tracked, leaf))

    def vjp(self, fz: Tensor, z: Tensor, v: Tensor) -> Tensor:
        """Return `J^T v` on a kept graph from `z` to `fz`; it is counted."""
        self.counts.vjps += 1
        if not fz.requires_grad:  # the map ignores its state
            return torch.zeros_like(z)
        return torch.autograd.grad(fz, z, v, retain_graph=True, materialize_grads=True)[0]

    def loss_gradient(self, loss: Callable[[Any, Tensor], Tensor], z: Tensor, rows: Tensor) -> Tensor:
        """Return the gradient `(b, D)` of an outer loss, `loss(z, rows) -> (b,)`, in the autocast state of `f`.

        Raises:
            ValueError: the loss does not return one number per row.
        """
        with torch.enable_grad(), self._casting():
            leaf = z.detach().requires_grad_()
            value = loss(self.unpack(leaf), rows)
            if not isinstance(value, Tensor) or value.shape != rows.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the outer loss must return one number per row, ({len(rows)},), got {shape}")
            if not value.requires_grad:  # the loss ignores the state
                return torch.zeros_like(z)
            return torch.autograd.grad(value.sum(), leaf, materialize_grads=True)[0]

    @contextlib.contextmanager
    def solve_context(self, *, backward: bool = False) -> Iterator[None]:
        """Context of all evaluations of one solve: weights are computed once, solvers work in full precision.

        Args:
            backward: the map must be that of the forward pass, so parametrizations, such as the power iteration of
                spectral normalization, update nothing.
        """
        if torch.compiler.is_compiling():
            yield
            return
        if backward:
            self._check_parameters()
        kind = self.device.type
        # Weights that were cached untracked must not serve tracked evaluations, nor the other way round. Equilibria may
        # be nested, so the caller's cache is put aside and not only extended.
        outer = parametrize._cache
        parametrize._cache = {}
        # The same holds for autocast's cache of converted weights, which an enabled outer context keeps alive.
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                stack.callback(torch.clear_autocast_cache)
                torch.clear_autocast_cache()
                stack.enter_context(torch.autocast(kind, dtype=self.autocast[1]))
            if self.autocast is not None or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
            frozen = [module for module in self.parametrizations if module.training] if backward else []
            for module in frozen:
                module.training = False
            kept = self.kept_buffers if backward else []
            current = [module._buffers[name] for module, name, _ in kept]
            for module, name, buffer in kept:
                module._buffers[name] = buffer
            try:
                with parametrize.cached():
                    yield
            finally:
                parametrize._cache = outer
                for module in frozen:
                    module.training = True
                for (module, name, _), old in zip(kept, current, strict=True):
                    module._buffers[name] = old

    def _check_parameters(self) -> None:
        """Check that the module still has the parameters of the solve; else their gradients would be zero, silently."""
        current = set() if self.owner is None else {id(p) for p in self.owner.parameters()}
        if self.owner is not None and any(id(p) not in current for p in self.owned):
            raise RuntimeError(
                "the cell's parameters are not those of the solve, say because functional_call put them back; instead, "
                "solve fixed_point(lambda z, x: functional_call(cell, params, (z, x)), z0, x, "
                "params=[*params.values()])"
            )


class DescentMap(FunctionMap):
    r"""The map $z \mapsto z - \nabla h(z)$ of an objective: its fixed points are the stationary points of $h$.

    $I - J$ is the Hessian of $h$, so a solver's inverse estimate is one of the inverse Hessian. A call evaluates
    objective and gradient together and counts as one evaluation.

    Args:
        f: the objective $h$; called as `f(z, *inputs)`, it returns one number per sample, `(B,)`.
        z0: as in `FunctionMap`.
        inputs: as in `FunctionMap`.
        params: as in `FunctionMap`.

    Raises:
        ValueError: the objective does not return one number per sample.
    """

    def call(self, z: Tensor) -> Tensor:
        return z - self._value_and_gradient(z)[1]

    def evaluate(self, z: Tensor, rows: Tensor, running: Tensor, *, graph: bool = False) -> Point:
        if graph:
            return super().evaluate(z, rows, running, graph=True)
        z = self.representable(z)
        value, gradient = self._value_and_gradient(z)
        if not can_branch_on(value) or not bool(value.isfinite().all()):
            # Automatic differentiation follows the formula out of the domain of h: log(-1) is NaN, its slope is not.
            gradient = torch.where(value.isfinite()[:, None], gradient, torch.nan)
        return Point(z, z - gradient, -gradient, rows, running, self, value=value)

    def _value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = z if z.requires_grad else z.detach().requires_grad_()
            value = self._apply(leaf)
            if not isinstance(value, Tensor) or value.shape != z.shape[:1]:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the objective must return one number per sample, ({z.shape[0]},), got {shape}")
            gradient = torch.autograd.grad(value.sum(), leaf, create_graph=higher, materialize_grads=True)[0]
        return (value, gradient) if higher else (value.detach().to(self.dtype), gradient)
