"""Certificates: proofs against searches, dense algebra and simulations; refusals and their messages."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from problems import conv_matrix, spectral
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import equipoise as eq
from equipoise.contraction import CappedConv2d
from equipoise.contraction.certificate import jacobian_norm
from equipoise.zoo import Contraction, MDEQCell, MDEQClassifier, MDEQConfig, ScaledLayers, SLLLayers

State = tuple[Tensor, ...]
SMALL = MDEQConfig(
    image_size=8,
    image_channels=1,
    num_classes=3,
    channels=(4, 8),
    expansion=2,
    num_groups=2,
    head_channels=(2, 2),
    final_channels=4,
)
TINY = dataclasses.replace(SMALL, image_size=4)  # for dense Jacobians
CONTRACTIONS = {"scaled": ScaledLayers(slope=0.6, cap=1.5), "sll": SLLLayers()}
contractions = pytest.mark.parametrize("contraction", CONTRACTIONS.values(), ids=CONTRACTIONS)


def make_model(contraction: Contraction | None, *, trained: int = 0, config: MDEQConfig = SMALL) -> MDEQClassifier:
    """A model in evaluation mode whose kernels reach their caps, after some Adam steps."""
    model = MDEQClassifier(dataclasses.replace(config, contraction=contraction), solver=eq.Picard(max_steps=4))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, CappedConv2d):
                module.parametrizations.weight.original.mul_(4)
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
    for _ in range(trained):
        adam.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        adam.step()
    return model.eval()


@torch.no_grad()
def injection(model: MDEQClassifier, batch: int = 4) -> Tensor | State:
    return model.stem(torch.randn(batch, 1, *model.config.level_shapes[0][1:]))


def states(model: MDEQClassifier, scale: float = 1.0, batch: int = 4) -> State:
    return tuple(scale * torch.randn(batch, *shape) for shape in model.config.level_shapes)


def distances(a: State, b: State) -> Tensor:
    """Norms of the differences, `(levels, B)`."""
    return torch.stack([(x - y).flatten(1).norm(dim=1) for x, y in zip(a, b, strict=True)])


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


# --- bounds ----------------------------------------------------------------------------------------------------------


def check_bounds(certificate: eq.Certificate, before: Tensor, after: Tensor) -> Tensor:
    """Check distances `(levels, B)` before and after the map, and return their Euclidean ratios."""
    weights, ratio = torch.tensor(certificate.weights)[:, None], after.norm(dim=0) / before.norm(dim=0)
    weighted = (weights * after).norm(dim=0) / (weights * before).norm(dim=0)
    assert bool((after <= torch.tensor(certificate.block_matrix) @ before * (1 + 1e-9)).all())
    assert bool((ratio <= certificate.norm * (1 + 1e-9)).all())
    assert bool((weighted <= certificate.radius * (1 + 1e-9)).all())
    return ratio


@contractions
@pytest.mark.parametrize("trained", [0, 4])
@pytest.mark.slow
def test_random_pairs(contraction: Contraction, trained: int) -> None:
    model = make_model(contraction, trained=trained)
    certificate, cell, u, z = eq.certify(model), model.deq.cell, injection(model, 100), states(model, batch=100)
    with torch.no_grad():
        for scale in (1e-3, 1e-1, 1.0, 10.0):
            other = tuple(a + scale * b for a, b in zip(z, states(model, batch=100), strict=True))
            check_bounds(certificate, distances(z, other), distances(cell(z, u), cell(other, u)))


def ascend(model: MDEQClassifier, pairs: int, steps: int) -> Tensor:
    """Ratios found by gradient ascent on pairs of states, `(steps, pairs)`."""
    certificate, cell, u, ratios = eq.certify(model), model.deq.cell, injection(model, pairs), []
    z = [level.requires_grad_() for level in states(model, 0.3, batch=pairs)]
    d = [level.requires_grad_() for level in states(model, 0.1, batch=pairs)]
    adam = torch.optim.Adam([*z, *d], lr=0.02)
    for _ in range(steps):
        other = tuple(a + b for a, b in zip(z, d, strict=True))
        ratio = check_bounds(certificate, distances(tuple(z), other), distances(cell(tuple(z), u), cell(other, u)))
        ratios.append(ratio.detach())
        adam.zero_grad()
        (-ratio.log().sum()).backward()
        adam.step()
    return torch.stack(ratios)


@contractions
@pytest.mark.slow
def test_searched_pairs(contraction: Contraction) -> None:
    found = ascend(make_model(contraction, trained=5), pairs=8, steps=15)
    assert float(found.amax(dim=0).mean()) > 1.1 * float(found[0].mean())


@pytest.mark.extended
@pytest.mark.timeout(1800)
@contractions
def test_ten_thousand_searched_pairs(contraction: Contraction) -> None:
    model = make_model(contraction, trained=10)
    for _ in range(20):
        ascend(model, pairs=500, steps=8)


def dense_jacobian(solution: eq.Solution) -> Tensor:
    """`(B, D, D)`."""
    f = solution.map
    whole = torch.autograd.functional.jacobian(f.call, f.pack(solution.value).detach())
    return whole.diagonal(dim1=0, dim2=2).movedim(-1, 0)


@contractions
@pytest.mark.slow
def test_measured_norm(contraction: Contraction) -> None:
    model = make_model(contraction, config=TINY)
    with torch.no_grad():
        solution = model.deq.solve(injection(model, 2))
    found, expected = jacobian_norm(solution, 200), torch.linalg.matrix_norm(dense_jacobian(solution), ord=2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)
    assert bool((found <= expected * (1 + 1e-9)).all())
    certificate = eq.certify(model, solution=solution)
    assert certificate.measured == pytest.approx(float(found.max()), rel=0.05)
    assert certificate.tightness == pytest.approx(certificate.measured / certificate.norm)
    assert certificate.tightness <= 1


@contractions
def test_certify_changes_nothing(contraction: Contraction) -> None:
    model = make_model(contraction)
    before = {name: value.clone() for name, value in model.deq.cell.named_buffers()}
    assert eq.certify(model) == eq.certify(model)
    assert all(value.equal(before[name]) or value.isnan().any() for name, value in model.deq.cell.named_buffers())


def test_sll_layers_are_tight_from_the_start() -> None:
    model = MDEQClassifier(dataclasses.replace(SMALL, contraction=SLLLayers())).eval()
    with torch.no_grad():
        solution = model.deq.solve(injection(model))
    certificate = eq.certify(model, solution=solution)
    assert certificate.norm <= 0.9 * 0.8 * (1 + 1e-6)
    assert 0.5 <= certificate.tightness <= 1


# --- negative controls -----------------------------------------------------------------------------------------------


def reshaped_cap(conv: CappedConv2d, cap: float) -> CappedConv2d:
    """A layer with a cap on the norm of the reshaped kernel, as in the released code."""
    outs, ins, k, _ = conv.weight.shape
    capped, kernel = (
        CappedConv2d(ins, outs, k, stride=conv.stride[0], cap=1e9, size=conv.size),
        torch.rand(conv.weight.shape),
    )
    capped.parametrizations.weight.original.data = kernel * cap / norm(kernel.flatten(1))
    return capped


def test_cap_of_the_reshaped_kernel() -> None:
    levels = {"image_size": 16, "channels": (4, 8, 8), "head_channels": (2, 2, 2)}
    cell = MDEQClassifier(dataclasses.replace(SMALL, **levels, contraction=ScaledLayers())).deq.cell
    assert eq.certify(cell.eval()).contracts
    for module in list(cell.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, CappedConv2d):
                setattr(module, name, reshaped_cap(child, 2.0))
    convolutions = [module for module in cell.modules() if isinstance(module, CappedConv2d)]
    assert max(norm(conv.weight.detach().flatten(1)) for conv in convolutions) <= 2 * (1 + 1e-9)
    certificate = eq.certify(cell.eval())
    assert min(certificate.radius, certificate.norm) > 1
    assert not certificate.contracts
    for use in (certificate.require, certificate.solver, lambda: certificate.evaluations(1e-3)):
        with pytest.raises(eq.CertificateError, match=r"not proved to contract: the block matrix has radius \d"):
            use()


@pytest.mark.parametrize("contraction", [*CONTRACTIONS.values(), None], ids=[*CONTRACTIONS, "published"])
@pytest.mark.slow
def test_uniqueness_from_two_starts(contraction: Contraction | None) -> None:
    model, solver = make_model(contraction), eq.Picard(max_steps=80, rtol=0, atol=1e-300)
    cell, u = model.deq.cell, injection(model, 2)
    with torch.no_grad():
        a, b = (eq.fixed_point(cell, z0, u, solver=solver).value for z0 in (cell.zeros(u), states(model, 10.0, 2)))
    distance = distances(a, b).norm(dim=0)
    if contraction is not None:
        assert float(distance.max()) < 1e-9
        return
    assert float(distance.min()) > 1e-2
    with pytest.raises(eq.CertificateError, match=r"^deq\.cell\."):
        eq.certify(model)


# --- rates and counts ------------------------------------------------------------------------------------------------


@contractions
@pytest.mark.slow
def test_rate_forward_and_backward(contraction: Contraction) -> None:
    model, observed = make_model(contraction, trained=3), []
    certificate, u = eq.certify(model), injection(model)
    proved = certificate.evaluations(1e-6)
    solver = eq.Picard(max_steps=proved, rtol=1e-6)
    for part in [u] if isinstance(u, Tensor) else u:
        part.requires_grad_()
    with model.deq.using(solver=solver, gradient=eq.Implicit(solver=solver, observe=observed.append)):
        solution = model.deq.solve(u, trace=True).raise_for_status()
        sum((level * torch.randn_like(level)).sum() for level in solution.value).backward()
    ratios = solution.trace[1:] / solution.trace[:-1]
    assert bool((ratios[~ratios.isnan()] <= certificate.norm * (1 + 1e-9)).all())
    (adjoint,) = observed
    forward, backward = (int(found.raise_for_status().num_steps.max()) for found in (solution, adjoint))
    assert 2 < min(forward, backward) <= max(forward, backward) <= proved
    assert abs(forward - backward) <= proved / 2


@contractions
def test_error_bounds_of_picard(contraction: Contraction) -> None:
    model = make_model(contraction)
    certificate, cell, u = eq.certify(model), model.deq.cell, injection(model)
    rate, rho, weights = certificate.norm, certificate.radius, torch.tensor(certificate.weights)[:, None]
    with torch.no_grad():
        exact = eq.fixed_point(cell, cell.zeros(u), u, solver=eq.Picard(max_steps=400, rtol=1e-14)).value
        iterates = [cell.zeros(u)]
        for k in range(1, 16):
            iterates.append(cell(iterates[-1], u))
            error, step = distances(iterates[-1], exact), distances(iterates[-1], iterates[-2])
            first = distances(iterates[1], iterates[0])
            for found, bound in (
                (error, rate / (1 - rate) * step.norm(dim=0)),
                (error, rate**k / (1 - rate) * first.norm(dim=0)),
                (weights * error, rho / (1 - rho) * (weights * step).norm(dim=0)),
            ):
                assert bool((found.norm(dim=0) <= bound * (1 + 1e-9) + 1e-12).all())


@contractions
def test_error_bounds_of_neumann_series(contraction: Contraction) -> None:
    model = make_model(contraction, config=TINY)
    rate = eq.certify(model).norm
    with torch.no_grad():
        (j,) = dense_jacobian(model.deq.solve(injection(model, 1)))
    g = torch.randn(len(j))
    exact = torch.linalg.solve(torch.eye(len(g)) - j.T, g)
    assert float(exact.norm()) <= float(g.norm()) / (1 - rate)
    w = torch.zeros_like(g)
    for k in range(1, 20):
        w = j.T @ w + g
        assert float((w - exact).norm()) <= rate**k / (1 - rate) * float(g.norm()) * (1 + 1e-9)


def hand_made(lipschitz: float, condition: float = 1.0) -> eq.Certificate:
    """A certificate of the Euclidean norm, or, with a condition above 1, of a weighted norm alone."""
    euclidean, weights = lipschitz if condition == 1 else 2.0, (1.0, 1 / condition)
    return eq.Certificate(
        block_matrix=((lipschitz,),), training=False, norm=euclidean, radius=lipschitz, weights=weights
    )


def count(a: Tensor, x: Tensor, rtol: float) -> int:
    """Evaluations of Picard iteration on `a @ z + x` from zero."""
    z, k = torch.zeros_like(x), 0
    while True:
        k, image = k + 1, a @ z + x
        if float((image - z).norm()) <= rtol * float(image.norm()):
            return k
        z = image


@pytest.mark.parametrize("rtol", [0.3, 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("lipschitz", [0.0, 0.1, 0.5, 0.73, 0.9, 0.97])
def test_evaluations_of_the_worst_maps(lipschitz: float, rtol: float) -> None:
    """Rotations of the plane: the half turn needs the most evaluations, up to the parity of the last step."""
    predicted = hand_made(lipschitz).evaluations(rtol)
    turns = torch.polar(torch.full((5,), lipschitz), torch.linspace(0, math.pi, 5))[:, None, None]
    counts = [count(turn, torch.ones(1, dtype=torch.complex128), rtol) for turn in turns]
    assert max(counts) <= predicted
    if rtol <= 1e-2:  # a coarser tolerance is met at an even step, where |f(z)| is larger
        assert predicted <= counts[-1] + 1


@pytest.mark.parametrize("condition", [1.0, 4.0, 100.0])
def test_evaluations_in_a_weighted_norm(condition: float) -> None:
    """D^-1 S D with |S| = 0.8 contracts in the norm of D alone."""
    predicted, d = hand_made(0.8, condition).evaluations(1e-4), torch.tensor([1.0, 1 / condition])
    for seed in range(40):
        a = spectral(2, 0.8, torch.Generator().manual_seed(seed)) * d / d[:, None]
        assert max(count(a, x, 1e-4) for x in torch.eye(2)) <= predicted


@pytest.mark.parametrize(("lipschitz", "expected"), [(0.5, 11), (0.73, 27), (0.8, 39), (0.9, 88), (0.95, 194)])
def test_evaluations_for_an_error(lipschitz: float, expected: int) -> None:
    """The textbook count from |z1 - z0| / (eps (1 - L)); ours is relative to f(z)."""
    assert math.ceil(math.log(1 / (1e-3 * (1 - lipschitz))) / -math.log(lipschitz)) == expected
    more = 1 + math.log(2) / -math.log(lipschitz)
    assert hand_made(lipschitz).evaluations(1e-3, lipschitz=lipschitz) <= expected + more


def test_evaluations_near_a_rate_of_one() -> None:
    assert hand_made(1 - 1e-9).evaluations(1e-3) == pytest.approx(math.log(2e3) * 1e9, rel=1e-3)


@pytest.mark.parametrize("rtol", [0.0, -1.0, math.nan])
def test_evaluations_need_a_positive_tolerance(rtol: float) -> None:
    with pytest.raises(ValueError, match=r"rtol=.*: must be > 0"):
        hand_made(0.5).evaluations(rtol)


def test_a_false_constant_promises_no_count() -> None:
    assert hand_made(0.5).evaluations_of(eq.Anderson(lipschitz=0.01)) is None
    assert hand_made(0.5).evaluations_of(eq.Anderson(lipschitz=0.5)) is not None


@pytest.mark.parametrize(
    ("lipschitz", "condition", "kind"),
    [(0.3, 1, eq.Picard), (0.6, 1, eq.Picard), (0.7, 1, eq.Anderson), (0.95, 1, eq.Anderson), (0.8, 10, eq.Picard)],
)
def test_solver_bounds_the_error(lipschitz: float, condition: float, kind: type) -> None:
    solver, size = hand_made(lipschitz, condition).solver(rtol=1e-3), 6 if condition == 1 else 2
    assert isinstance(solver, kind)
    d = torch.tensor([1.0, 1 / condition]) if condition > 1 else torch.ones(size)
    for seed in range(5):
        a = spectral(size, lipschitz, torch.Generator().manual_seed(seed)) if seed else -lipschitz * torch.eye(size)
        a, x = a * d / d[:, None], torch.randn(4, size)
        exact = torch.linalg.solve(torch.eye(size) - a, x.T).T
        solution = eq.fixed_point(lambda z, x, a=a: z @ a.T + x, 0 * x, x, solver=solver, params=()).raise_for_status()
        image = solution.value @ a.T + x
        assert bool(((solution.value - exact).norm(dim=1) <= 1e-3 * image.norm(dim=1)).all())


def bounded(matrix: Tensor) -> nn.Module:
    """A cell with a given block matrix."""
    return type("Bounded", (nn.Module,), {"block_matrix": lambda self, training: matrix})()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_perron_radius_and_weights(n: int) -> None:
    matrix = torch.rand(n, n)
    certificate = eq.certify(bounded(matrix))
    weights = torch.tensor(certificate.weights)
    assert certificate.norm == pytest.approx(norm(matrix))
    assert certificate.radius == pytest.approx(float(torch.linalg.eigvals(matrix).abs().max()))
    assert norm(weights[:, None] * matrix / weights) == pytest.approx(certificate.radius)
    assert certificate.condition == pytest.approx(float(weights.max() / weights.min()))


def test_triangular_block_matrix() -> None:
    certificate = eq.certify(bounded(torch.tensor([[0.5, 3.0], [0.0, 0.5]])))
    assert certificate.norm > 1
    assert certificate.contracts
    assert certificate.radius == pytest.approx(0.5, abs=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_weights(value: float) -> None:
    certificate = eq.certify(bounded(torch.tensor([[0.5, value], [0.1, 0.5]])))
    assert not certificate.contracts
    with pytest.raises(eq.CertificateError, match="not proved to contract"):
        certificate.require()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.__setitem__(1, nn.BatchNorm2d(4)), r"1 \(BatchNorm2d: batch statistics"),
        (lambda path: path.__setitem__(1, nn.GroupNorm(2, 4)), r"1 \(GroupNorm: a division"),
        (lambda path: path.__setitem__(1, nn.SiLU()), r"1 \(SiLU: no Lipschitz constant is known"),
        (
            lambda path: parametrizations.weight_norm(path[0]),
            r"0 \(CappedConv2d: another parametrization, such as weight_n",
        ),
    ],
    ids=["BatchNorm", "GroupNorm", "unknown", "weight norm"],
)
def test_path_of_an_unknown_layer(change: Callable[[nn.Sequential], object], message: str) -> None:
    model = make_model(ScaledLayers())
    change(model.deq.cell.fusion.paths["1_to_0"])
    with pytest.raises(eq.CertificateError, match=rf"^deq\.cell\.fusion\.paths\.1_to_0\.{message}"):
        eq.certify(model)


class Skipping(MDEQCell):
    def forward(self, z: State, u: Tensor | State) -> State:
        return tuple(a + b for a, b in zip(z, super().forward(z, u), strict=True))


def test_overridden_forward_pass() -> None:
    model = make_model(SLLLayers())
    model.deq.cell = Skipping(model.config).eval()
    with pytest.raises(eq.CertificateError, match=r"^deq\.cell \(Skipping: it overrides forward and inherits block_m"):
        eq.certify(model)


@pytest.mark.slow
def test_compiled_cell() -> None:
    model = make_model(SLLLayers())
    assert eq.certify(torch.compile(model.deq.cell)) == eq.certify(model)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize(("share", "refused"), [(0.9, True), (1.0, False), (1.2, False)])
def test_claimed_constant(forward: bool, share: float, refused: bool) -> None:
    model = make_model(SLLLayers())
    solver = eq.Picard(lipschitz=share * eq.certify(model).norm)
    with model.deq.using(**{"solver": solver} if forward else {"gradient": eq.Implicit(solver=solver)}):
        if not refused:
            eq.certify(model)
            return
        with pytest.raises(eq.CertificateError, match=r"was given lipschitz=0\.6\d+, and the weights prove 0\.7"):
            eq.certify(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (eq.nn.DEQ(nn.Linear(2, 2)), r"Linear has no method block_matrix\(training\)"),
        (bounded(torch.tensor([[0.7, -0.7], [0.7, 0.7]])), "square matrix of bounds >= 0"),
        (bounded(torch.zeros(2, 3)), "square matrix of bounds >= 0"),
    ],
)
def test_block_matrix_messages(model: nn.Module, message: str) -> None:
    with pytest.raises(eq.CertificateError, match=message):
        eq.certify(model)


# --- modes and forms -------------------------------------------------------------------------------------------------


def test_dropout_and_modes() -> None:
    model = make_model(ScaledLayers(), config=dataclasses.replace(SMALL, dropout=0.3))
    evaluation, training = eq.certify(model), eq.certify(model, training=True)
    assert (evaluation.training, training.training) == (False, True)
    assert training.norm > 1.05 * evaluation.norm
    assert norm(conv_matrix(model.deq.cell.blocks[0].conv2.weight.detach(), (8, 8), 1, 1)) <= 2
    by_mode = eq.certify(model.train())
    assert by_mode == eq.certify(model, training=True)
    assert by_mode.norm > eq.certify(model, training=False).norm


def test_plain_data() -> None:
    data = hand_made(0.5).as_dict()
    assert (data["contracts"], data["tightness"], data["radius"]) == (True, None, 0.5)


def test_map_without_its_state() -> None:
    certificate = eq.certify(bounded(torch.zeros(2, 2, dtype=torch.float32)))
    assert certificate.contracts
    assert certificate.norm == 0
    assert dataclasses.replace(certificate, measured=0.0).as_dict()["tightness"] is None
