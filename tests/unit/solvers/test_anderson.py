"""Anderson acceleration: against least squares and GMRES in dense algebra, its restart, blocks and units."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import gmres_iterates, inverted, solve_linear, spectral, tanh_map
from torch import Tensor

import equipoise as eq

Field = Callable[[Tensor], Tensor]


def points(f: Field, z0: Tensor, solver: eq.Anderson, **options: Any) -> list[Tensor]:
    """Where the solver evaluates a batch, step by step."""
    seen: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return f(z)

    solver.solve(eq.FunctionMap(watched, z0, **options), z0)
    return seen


def textbook(f: Field, z: Tensor, solver: eq.Anderson, steps: int) -> tuple[list[Tensor], int]:
    """The same for one sample, by dense least squares; and how often it restarted."""
    seen, restarts = [z], 0
    history: list[tuple[Tensor, Tensor] | None] = []  # None: forgotten, though its place is not yet free
    for _ in range(steps - 1):
        history = [*history, (z, f(z[None])[0] - z)][-solver.memory :]
        live = [pair for pair in history if pair is not None]
        best = min(live, key=lambda pair: float(pair[1].norm()))
        # Of two points the newer is the step of the older: to go back there would be to repeat it.
        repeats = len(live) == 2 and solver.memory > 2
        if float(live[-1][1].norm()) > solver.growth * float(best[1].norm()) and not repeats:
            history = [pair if pair is best else None for pair in history]
            live, restarts = [best], restarts + 1
        zs, rs = (torch.stack(column, dim=1) for column in zip(*live, strict=True))  # (d, n)
        n = zs.shape[1]
        alpha = torch.nn.functional.one_hot(torch.tensor(n - 1), n).to(rs.dtype)
        if n > 1:
            # alpha = e_n - N gamma, where the columns of N sum to zero: no constraint is left.
            null = torch.cat([torch.eye(n - 1), -torch.ones(1, n - 1)])
            tall = torch.cat([rs, math.sqrt(solver.ridge) * torch.diag(rs.norm(dim=0))])
            alpha = alpha - null @ torch.linalg.lstsq(tall @ null, tall[:, -1:], driver="gelsd").solution[:, 0]
        z = (zs + solver.mixing * rs) @ alpha
        seen.append(z)
    return seen, restarts


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
@pytest.mark.parametrize("mixing", [1.0, 0.6])
@pytest.mark.parametrize("memory", [2, 3, 5])
def test_dense_least_squares(memory: int, mixing: float, ridge: float) -> None:
    f, z0 = tanh_map(12, 0.95), torch.randn(3, 12)
    steps = 4 * memory if ridge else 2 * memory + 2
    solver = eq.Anderson(memory=memory, mixing=mixing, ridge=ridge, max_steps=steps, rtol=0)
    seen = points(f, z0, solver)
    assert len(seen) == steps
    for row in range(3):
        expected, _ = textbook(f, z0[row], solver, steps)
        for k in range(1, steps):
            # Relative to the step, down to rounding; normal equations square the condition, which a ridge bounds.
            error, step = (expected[k] - z for z in (seen[k][row], expected[k - 1]))
            assert float(error.norm()) < (1e-8 if ridge else 1e-5) * float(step.norm()) + 1e-14, k


@pytest.mark.parametrize("norm", [0.8, 3.0])
def test_gmres(norm: float) -> None:
    """Walker and Ni (2011), theorem 2.2, with the whole history kept; no contraction is needed."""
    d, steps = 8, 6
    a, b = spectral(d, norm, torch.Generator().manual_seed(7)), torch.randn(d)
    solver = eq.Anderson(memory=d + 2, max_steps=steps, rtol=0, growth=math.inf)
    seen = points(lambda z: z @ a.T + b, torch.zeros(1, d), solver)
    iterates = gmres_iterates((torch.eye(d) - a)[None], b[None], torch.zeros(1, d), steps - 2)
    for z, least in zip(seen[1:], iterates, strict=True):
        torch.testing.assert_close(z, least @ a.T + b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("d", [1, 2, 5, 10])
@pytest.mark.parametrize("norm", [0.9, 3.0])
def test_affine_maps_end(d: int, norm: float) -> None:
    a, b = spectral(d, norm, torch.Generator().manual_seed(d)), torch.randn(4, d)
    solver = eq.Anderson(memory=d + 1, max_steps=d + 2, rtol=1e-6, growth=math.inf)
    # The images of d + 1 points span the space; what comes next is the image of the solution.
    solution = solve_linear(a, b, solver).raise_for_status()
    torch.testing.assert_close(solution.value, inverted(a, b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixing", [1.0, 0.4])
def test_memory_of_one(mixing: float) -> None:
    f, z0 = tanh_map(6, 0.9), torch.randn(2, 6)
    solvers = eq.Anderson(memory=1, mixing=mixing, rtol=0), eq.Picard(damping=mixing, rtol=0)
    ours, theirs = (eq.fixed_point(f, z0, solver=solver, trace=True).trace for solver in solvers)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e20])
@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_units(scale: float, ridge: float) -> None:
    f, z0 = tanh_map(8, 0.95), torch.randn(2, 8)
    solver = eq.Anderson(memory=4, ridge=ridge, max_steps=12, rtol=0)
    plain = points(f, z0, solver)
    scaled = points(lambda z: f(z / scale) * scale, z0 * scale, solver)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b / scale, a, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("memory", [2, 3, 4])
def test_restart(memory: int) -> None:
    """A sample whose residual grew too much goes back to its best point and forgets the others."""
    f, z0 = tanh_map(12, 3.0), torch.randn(6, 12)
    solver = eq.Anderson(memory=memory, mixing=0.9, ridge=1e-3, growth=1.2, max_steps=20, rtol=0)
    seen, restarts = points(f, z0, solver), []
    for row in range(6):
        expected, count = textbook(f, z0[row], solver, 20)
        restarts.append(count)
        torch.testing.assert_close(torch.stack([z[row] for z in seen]), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert len(set(restarts)) > 1, "the rows must restart at different steps for this test to say something"


def test_blocks() -> None:
    f, z0, unit = tanh_map(6, 0.95), torch.randn(2, 6), torch.tensor([1.0] * 2 + [1e6] * 4)
    scaled = lambda z: f(z / unit) * unit  # noqa: E731
    solver = eq.Anderson(memory=4, ridge=1e-6, max_steps=10, rtol=0)
    plain = points(f, z0, solver, blocks=(2, 4))
    apart = points(scaled, z0 * unit, solver, blocks=(2, 4))
    together = points(scaled, z0 * unit, solver)
    torch.testing.assert_close(torch.stack(apart) / unit, torch.stack(plain), rtol=1e-7, atol=1e-8)
    assert float((together[5] / unit - plain[5]).norm()) > 1e-3 * float((plain[5] - plain[4]).norm())


def test_overwhelming_ridge() -> None:
    """With an overwhelming ridge the weights are inverse to the squared residuals, and nothing else."""
    f, z0 = tanh_map(6, 0.9), torch.randn(1, 6)
    *before, last = points(f, z0, eq.Anderson(memory=4, ridge=1e8, max_steps=5, rtol=0))
    images = torch.cat([f(z) for z in before])
    weights = (images - torch.cat(before)).square().sum(dim=1).reciprocal()
    torch.testing.assert_close(last[0], weights @ images / weights.sum(), rtol=1e-6, atol=1e-7)


def deceptive(lipschitz: float, seed: int, d: int = 24) -> tuple[Field, Tensor]:
    """A piecewise linear contraction, `L` times a product of orthogonal matrices and absolute values, plus `x`."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.linalg.qr(torch.randn(d, d, generator=generator))[0] for _ in range(2))
    x = torch.randn(1, d, generator=generator)
    return lambda z: lipschitz * ((z @ first.T).abs() @ second.T) + x, x


@pytest.mark.parametrize("lipschitz", [0.5, 0.9])
@pytest.mark.parametrize("memory", [2, 5])
def test_lost_evaluations(lipschitz: float, memory: int) -> None:
    """After 2 k + 1 evaluations the least residual is at most L^k times the first: half of Picard's proved pace."""
    solver = eq.Anderson(lipschitz=lipschitz, memory=memory, max_steps=60, rtol=0)
    lost = 0
    for seed in range(5):
        f, x = deceptive(lipschitz, seed)
        trace = eq.fixed_point(f, torch.zeros_like(x), solver=solver, params=(), trace=True).trace
        assert trace is not None
        sizes, least = trace[:, 0].tolist(), math.inf
        taken_back = False
        for k, size in enumerate(sizes):
            if size < 1e-5 * sizes[0]:  # rounding shows from here on
                break
            now = k > 0 and size > lipschitz * least * (1 + 1e-8)
            assert not (now and taken_back), "the step after one that was taken back is Picard's"
            taken_back = now
            lost += now
            least = min(least, size)
            assert least <= lipschitz ** (k // 2) * sizes[0] * (1 + 1e-9)
    if lipschitz == 0.9:
        assert lost > 0, "some step must be taken back for this test to say something"


def test_deceptive_slopes() -> None:
    """Slopes that vary with the logarithm of the state: what the last points say of them is wrong at every scale."""
    lipschitz, waves = 0.8, 2.0

    def f(z: Tensor) -> Tensor:
        # The slope of z sin(c log z) is sin + c cos, at most sqrt(1 + c^2).
        return lipschitz / math.sqrt(1 + waves**2) * z * torch.sin(waves * z.abs().clamp_min(1e-300).log())

    z0 = torch.linspace(0.5, 1.0, 5)[None]
    tolerance: dict[str, Any] = {"rtol": 0.0, "atol": 1e-6, "max_steps": 300}
    counts = [
        int(eq.fixed_point(f, z0, solver=solver, params=()).raise_for_status().num_steps)
        for solver in (
            eq.Picard(**tolerance, lipschitz=lipschitz),
            eq.Anderson(**tolerance),
            eq.Anderson(**tolerance, growth=math.inf),
            eq.Anderson(**tolerance, lipschitz=lipschitz),
        )
    ]
    picard, plain, unguarded, safe = counts
    first = float((f(z0) - z0).norm())
    proved = math.ceil(math.log(1e-6 * (1 - lipschitz) / first) / math.log(lipschitz))
    assert min(plain, unguarded) > 2 * picard
    assert picard <= 1 + proved
    assert safe <= min(1 + 2 * proved, 2 * picard)


def test_memory_not_reserved() -> None:
    """A memory longer than the solve takes no more room than the solve needs."""
    f, z0 = eq.FunctionMap(torch.cos, torch.zeros(2, 3)), torch.zeros(2, 3)
    point = f.evaluate(z0, torch.arange(2), torch.ones(2, dtype=torch.bool))
    assert eq.Anderson(memory=10**9, max_steps=5).init(point).images.shape == (2, 5, 3)
    assert eq.Anderson(memory=4, max_steps=5).init(point).images.shape == (2, 4, 3)


def test_promised_rate() -> None:
    slopes, x = torch.linspace(0.85, 0.9, 4), torch.randn(3, 4)  # plain steps are hardly better than promised
    f = eq.FunctionMap(lambda z, x: slopes * z + x, 0 * x, [x], params=())
    solution = eq.Anderson(lipschitz=0.9, max_steps=400, rtol=1e-6).solve(f, 0 * x, trace=True).raise_for_status()
    best = solution.trace.cummin(dim=0).values
    k = torch.arange(len(best)) // 2  # every other evaluation may be lost
    assert bool(((best <= best[0] * 0.9 ** k[:, None] * (1 + 1e-12)) | best.isnan()).all())
    picard = eq.Picard(lipschitz=0.9, max_steps=400, rtol=1e-6).solve(f, 0 * x)
    assert bool((solution.num_steps < 0.5 * picard.raise_for_status().num_steps).all())


def test_constant_with_blocks() -> None:
    z0 = torch.zeros(1, 4)
    with pytest.raises(
        ValueError,
        match=r"Anderson\(lipschitz=0.5\): the proof .*blocks that converge separately; leave it out, or use Picard",
    ):
        eq.Anderson(lipschitz=0.5).solve(eq.FunctionMap(lambda z: 0.5 * z + 1, z0, blocks=(2, 2)), z0)
