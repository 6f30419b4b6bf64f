"""States: laying flat and giving the structure back are inverse to each other; what does not fit is named."""

import functools
import math
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.core.function_map import FunctionMap
from equipoise.core.state import InputLayout, Layout

zeros = functools.partial(torch.zeros, dtype=torch.float64)  # parameters are made before the default is set
BATCHES = st.integers(1, 4)
FORMATS = ["contiguous", "channels_last", "transposed", "sliced", "expanded", "offset"]


def tensor(shape: tuple[int, ...], how: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers of a shape, lying in memory as asked, as far as the shape allows it."""
    x = torch.randn(shape, dtype=dtype)
    made = {
        "contiguous": lambda: x,
        "channels_last": lambda: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
        "transposed": lambda: torch.randn(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape)))),
        "sliced": lambda: torch.randn((2 * shape[0], *shape[1:]), dtype=dtype)[::2],
        "expanded": lambda: torch.randn((shape[0], *(1,) * (len(shape) - 1)), dtype=dtype).expand(shape),
        "offset": lambda: torch.randn(math.prod(shape) + 3, dtype=dtype)[3:].view(shape),
    }
    return made[how]()


@st.composite
def states(draw: st.DrawFn, batches: st.SearchStrategy[int] = BATCHES) -> Any:
    """A tensor, tuple, list or dict of 1 to 3 tensors of random shapes with a common batch."""
    batch = draw(batches)
    shapes = st.lists(st.integers(0, 4), max_size=3).map(lambda rest: (batch, *rest))
    part = st.builds(tensor, shapes, st.sampled_from(FORMATS))
    parts = st.lists(part, min_size=1, max_size=3)
    keyed = st.dictionaries(st.text(max_size=3), part, min_size=1, max_size=3)
    return draw(st.one_of(part, parts, parts.map(tuple), keyed))


def parts_of(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state.values()) if isinstance(state, dict) else list(state)


def assert_same(actual: Any, expected: Any) -> None:
    """Same container, same keys in the same order, same shapes and bits."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
    for a, b in zip(parts_of(actual), parts_of(expected), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


fixed = settings(deadline=None, derandomize=True, max_examples=25)


@fixed
@given(states(), st.data())
def test_round_trip(state: Any, data: st.DataObject) -> None:
    """Unpacking undoes packing, of rows as well; row i of the flat state is row i of every part, in order."""
    layout = Layout.of(state)
    flat = layout.pack(state, "z0", torch.float64)
    rows = [torch.cat([part[i].reshape(-1) for part in parts_of(state)]) for i in range(len(flat))]
    assert torch.equal(flat, torch.stack(rows))
    assert_same(layout.unpack(flat), state)
    assert torch.equal(layout.pack(layout.unpack(flat), "z", torch.float64), flat)
    index = data.draw(st.lists(st.integers(0, len(flat) - 1), min_size=1, max_size=5))
    assert all(map(torch.equal, parts_of(layout.unpack(flat[index])), (part[index] for part in parts_of(state))))


@fixed
@given(st.lists(states(st.just(2)), max_size=3))
def test_inputs(inputs: list[Any]) -> None:
    """They come back as they were given."""
    tensors, layout = InputLayout.flatten(inputs, 2)
    assert len(tensors) == sum(len(parts_of(value)) for value in inputs)
    for a, b in zip(layout.unflatten(tensors), inputs, strict=True):
        assert_same(a, b)


def test_no_copy() -> None:
    """Of one contiguous tensor."""
    z = torch.randn(3, 2, 4)
    flat = Layout.of(z).pack(z, "z0", z.dtype)
    assert flat.data_ptr() == Layout.of(z).unpack(flat).data_ptr() == z.data_ptr()


def test_other_containers() -> None:
    """A result may order its keys otherwise and be a list for a tuple; any mapping is a state."""
    a, b = torch.randn(2, 3), torch.randn(2)
    expected = torch.cat([a, b[:, None]], dim=1)
    assert torch.equal(Layout.of({"a": a, "b": b}).pack({"b": b, "a": a}, "z", a.dtype), expected)
    assert torch.equal(Layout.of((a, b)).pack([a, b], "z", a.dtype), expected)
    state = types.MappingProxyType({"a": a, "b": b})
    f = FunctionMap(lambda z: z, state)
    assert f.batch == 2
    assert_same(f.unpack(f.pack(state)), dict(state))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half: torch.dtype) -> None:
    """Such states are flat in float32 and come back as they were."""
    state = (tensor((2, 3, 4, 5), "channels_last", half), tensor((2, 3), "transposed", half))
    f = FunctionMap(lambda z: z, state)
    assert f.pack(state).dtype == torch.float32
    assert_same(f.unpack(f.pack(state)), state)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ((), ValueError, r"z0 is an empty tuple; pass at least one tensor"),
        ({}, ValueError, r"z0 is an empty dict"),
        (zeros(0, 3), ValueError, r"z0 has shape \(0, 3\).*first dimension is the batch"),
        ((zeros(2, 3), zeros(())), ValueError, r"z0 has shape \(\).*first dimension is the batch"),
        (
            (zeros(2, 3), zeros(3, 3)),
            ValueError,
            r"must agree in batch size.*\(2, 3\) torch.float64 cpu, \(3, 3\) torch.float64 cpu",
        ),
        ({"a": zeros(2), "b": zeros(2, dtype=torch.float32)}, ValueError, "torch.float64.*torch.float32"),
        ((zeros(2), zeros(2, device="meta")), ValueError, "cpu.*meta"),
        (zeros(2, 3, dtype=torch.int64), TypeError, r"floating point, got torch.int64; convert it with .float"),
        (zeros(2, 3, dtype=torch.complex128), TypeError, "floating point, got torch.complex128"),
        ([zeros(2), 1.0], TypeError, "z0 must be a tensor or .*; it contains float"),
        ((zeros(2), (zeros(2),)), TypeError, "it contains tuple"),
        (3.0, TypeError, "z0 must be a tensor or a tuple, list or dict of tensors, got float"),
        ("zeros", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_bad_start(state: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FunctionMap(lambda z: z, state)


PAIR = (zeros(3, 2), zeros(3, 4))


@pytest.mark.parametrize(
    ("z0", "returned", "error", "message"),
    [
        (zeros(3, 2), zeros(3, 5), ValueError, r"has shape \(3, 5\), the state has \(B, 2\)"),
        (zeros(3, 2), zeros(3), ValueError, r"has shape \(3,\), the state has \(B, 2\)"),
        (zeros(3), zeros(3, 1), ValueError, r"has shape \(3, 1\), the state has \(B\)"),
        (zeros(3), zeros(()), ValueError, r"has shape \(\), the state has \(B\)"),
        (zeros(3, 2), zeros(1, 2), ValueError, "returned 1 rows for a state of 3; .*keep the batch"),
        (PAIR, (zeros(3, 2), zeros(1, 4)), ValueError, r"has parts with \[3, 1\] rows.*keep the batch"),
        (PAIR, PAIR[:1], ValueError, "has 1 parts, the state has 2"),
        (PAIR, PAIR[0], TypeError, "must be a tuple like the state, got Tensor"),
        (PAIR, (PAIR[0], None), TypeError, "contains NoneType"),
        (PAIR[0], PAIR, TypeError, "must be a Tensor like the state, got tuple"),
        (PAIR[0], None, TypeError, "must be a tensor or .* got NoneType"),
        ({"a": PAIR[0]}, {"b": PAIR[0]}, ValueError, r"has keys \['b'\], the state has \['a'\]"),
        (
            zeros(3, 2),
            zeros(3, 2, dtype=torch.float32),
            TypeError,
            "has dtype torch.float32, the state has torch.float64",
        ),
        (zeros(3, 2, dtype=torch.bfloat16), zeros(3, 2, dtype=torch.int64), TypeError, "has dtype torch.int64"),
        (zeros(3, 2, dtype=torch.float16), zeros(3, 2, dtype=torch.complex64), TypeError, "has dtype torch.complex64"),
    ],
)
def test_bad_result(z0: Any, returned: Any, error: type[Exception], message: str) -> None:
    f = FunctionMap(lambda z: returned, z0)
    with pytest.raises(error, match=f"the map('s result)? {message}"):
        f.call(f.pack(z0))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (zeros(2, 3), ValueError, r"input 1 has shape \(2, 3\), the state has batch 3"),
        (zeros(()), ValueError, r"input 1 has shape \(\)"),
        ((zeros(3), zeros(1, 3)), ValueError, r"input 1 has shape \(1, 3\)"),
        (0.5, TypeError, "input 1 must be a tensor or a tuple, list or dict of tensors, got float"),
        ({"mask": None}, TypeError, "input 1 contains NoneType; make it an attribute of the map"),
    ],
)
def test_bad_input(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FunctionMap(lambda z, x, y: z, zeros(3, 2), (zeros(3), value))
