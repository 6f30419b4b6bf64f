"""The fuzzers of `tests/fuzz`, in part; with a guard removed, the generator of misuse finds a wrong answer."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import equipoise as eq
from equipoise.core import function_map
from equipoise.core.function_map import FunctionMap
from equipoise.core.map import Map
from equipoise.gradients import autograd, implicit
from equipoise.solvers import base
from tests.fuzz import misuse, solves


@pytest.mark.slow
def test_misuse() -> None:
    counts = misuse.run(1000, seed=1)
    assert sum(counts.values()) == 1000
    assert {kind for kind, _ in counts} == {kind.__name__ for kind in misuse.KINDS}


@pytest.mark.slow
def test_solves() -> None:
    total = solves.run(250, seed=1)
    assert (total["false"], total["leaks"], total["mates"]) == (0, 0, 0)
    assert total["found"] >= 0.99 * total["within"] > 100


@pytest.mark.parametrize("number", [2712, 5820, 9535])
def test_mates_of_gmres(number: int) -> None:
    """Whether a row is orthogonalized twice depends on that row alone, also where rounding decides."""
    assert solves.case(number)["mates"] == 0


def norms_of_squares(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=1).double()


def lenient(record: Any, point: Any, step: int, observe: Callable[..., None] = base._Record.observe) -> None:
    if step > 1:
        record.bar = torch.full_like(record.bar, torch.inf)
    observe(record, point, step)


# Guard: the names that hold it, and what stands there when it is gone.
GUARDS: dict[str, list[tuple[Any, str, Any]]] = {
    "coupling, two rows": [(base, "refuse_coupling", lambda point, place: True)],
    "coupling, together": [(base._Record, "verified", lambda record, f, solution: solution)],
    "writes": [(function_map, "refuse_writes", lambda before, tensors: None)],
    "inference mode": [(torch, "is_inference_mode_enabled", lambda: False)],
    "random numbers": [
        (base, "refuse_randomness", lambda watch, point: None),
        (base, "refuse_coupling", lambda point, place: True),
    ],
    "changes": [(autograd, "refuse_changes", lambda fz, z, residual, allowed, g: g)],
    "attributes": [
        (FunctionMap, "adopt", lambda f, z: None),
        (autograd, "refuse_foreign", lambda fz, known: None),
    ],
    "power iteration": [(FunctionMap, "keep_buffers", lambda f: None)],
    "squares in the record": [
        (base, "safe_norms", norms_of_squares),
        (base._Record, "unit", lambda record: None),
    ],
    "squares of cotangents": [(implicit, "safe_norms", norms_of_squares)],
    "half precision": [(FunctionMap, "evaluate", Map.evaluate)],
    "residual must fall": [(base._Record, "observe", lenient)],
    "parts": [
        (eq, "fixed_point", lambda *given, per_part=False, solve=eq.fixed_point, **fields: solve(*given, **fields))
    ],
    "adjoint warning": [(implicit, "warn_once", lambda kind, message: True)],
    "tangents": [(function_map, "refuse_tangents", lambda tensors: None)],
}


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS)
def test_without_a_guard(guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator notices within 10,000 cases; kinds that the guard does not concern are skipped."""
    for owner, name, replacement in GUARDS[guard]:
        assert isinstance(getattr(owner, name), types.FunctionType | types.BuiltinFunctionType), (owner, name)
        monkeypatch.setattr(owner, name, replacement)
    torch.set_default_dtype(torch.float64)
    for number in range(10_000):
        try:
            misuse.case(number, seed=2)
        except Exception:
            monkeypatch.undo()
            misuse.case(number, seed=2)
            return
    pytest.fail("nothing wrong was found")
