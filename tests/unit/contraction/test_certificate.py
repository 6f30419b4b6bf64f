"""Certificates: proofs against searches, dense algebra and simulations; what they refuse, and whom they name."""

from __future__ import annotations

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
from equipoise.models import Contraction, MDEQCell, MDEQClassifier, MDEQConfig, ScaledLayers, SLLLayers

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


def injection(model: MDEQClassifier, batch: int = 4) -> Tensor | State:
    with torch.no_grad():
        return model.stem(torch.randn(batch, 1, 8, 8))


def states(model: MDEQClassifier, scale: float | Tensor = 1.0, batch: int = 4) -> State:
    return tuple(scale * torch.randn(batch, *shape) for shape in model.config.level_shapes)


def sizes(difference: State) -> Tensor:
    """`(levels, B)` norms."""
    return torch.stack([level.flatten(1).norm(dim=1) for level in difference])


def minus(a: State, b: State) -> State:
    return tuple(x - y for x, y in zip(a, b, strict=True))


# --- bounds are never exceeded ---------------------------------------------------------------------------------------


@contractions
@pytest.mark.parametrize("trained", [0, 8])
def test_a_thousand_random_pairs_obey_the_block_matrix_and_both_norms(contraction: Contraction, trained: int) -> None:
    model = make_model(contraction, trained=trained)
    certificate, cell = eq.certify(model), model.deq.cell
    matrix, weights = torch.tensor(certificate.block_matrix), torch.tensor(certificate.weights)[:, None]
    u = injection(model, 250)
    with torch.no_grad():
        for scale in (1e-3, 1e-1, 1.0, 10.0):
            z = states(model, batch=250)
            other = tuple(a + scale * b for a, b in zip(z, states(model, batch=250), strict=True))
            before, after = sizes(minus(z, other)), sizes(minus(cell(z, u), cell(other, u)))
            slack = 1 + 1e-6
            assert bool((after <= matrix @ before * slack).all())
            assert bool((after.norm(dim=0) <= certificate.norm * before.norm(dim=0) * slack).all())
            scaled = (weights * after).norm(dim=0) / (weights * before).norm(dim=0)
            assert bool((scaled <= certificate.radius * slack).all())


def ascend(model: MDEQClassifier, pairs: int, steps: int) -> tuple[Tensor, Tensor]:
    """Ratios found by gradient ascent on pairs of states, Euclidean and in the weighted norm."""
    cell, u = model.deq.cell, injection(model, pairs)
    weights = torch.tensor(eq.certify(model).weights)[:, None]
    z = [level.requires_grad_() for level in states(model, 0.3, batch=pairs)]
    d = [level.requires_grad_() for level in states(model, 0.1, batch=pairs)]
    adam = torch.optim.Adam([*z, *d], lr=0.02)
    best, best_weighted = torch.zeros(pairs), torch.zeros(pairs)
    for _ in range(steps):
        other = tuple(a + b for a, b in zip(z, d, strict=True))
        before, after = sizes(tuple(d)), sizes(minus(cell(tuple(z), u), cell(other, u)))
        ratio = after.norm(dim=0) / before.norm(dim=0)
        weighted = (weights * after).norm(dim=0) / (weights * before).norm(dim=0)
        best = torch.maximum(best, ratio.detach())
        best_weighted = torch.maximum(best_weighted, weighted.detach())
        adam.zero_grad()
        (-ratio.log().sum()).backward()
        adam.step()
    return best, best_weighted


@contractions
def test_searched_pairs_stay_below_the_bound_and_come_nearer_to_it(contraction: Contraction) -> None:
    model = make_model(contraction, trained=5)
    certificate = eq.certify(model)
    found, weighted = ascend(model, 32, 25)
    start, _ = ascend(model, 32, 1)
    assert float(found.max()) <= certificate.norm * (1 + 1e-9)
    assert float(weighted.max()) <= certificate.radius * (1 + 1e-9)
    assert float(found.mean()) > 1.1 * float(start.mean())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@contractions
def test_ten_thousand_searched_pairs_stay_below_the_bound(contraction: Contraction) -> None:
    model = make_model(contraction, trained=10)
    certificate = eq.certify(model)
    for _ in range(20):
        found, weighted = ascend(model, 500, 8)
        assert float(found.max()) <= certificate.norm * (1 + 1e-9)
        assert float(weighted.max()) <= certificate.radius * (1 + 1e-9)


@contractions
def test_the_measured_norm_is_that_of_the_dense_jacobian(contraction: Contraction) -> None:
    model = make_model(contraction)
    u = injection(model, 2)
    with torch.no_grad():
        solution = model.deq.solve(u)
    found = jacobian_norm(solution, 200)
    f = solution.map
    z = f.pack(solution.value).detach()
    dense = torch.autograd.functional.jacobian(f.call, z)
    for row in range(2):
        expected = float(torch.linalg.matrix_norm(dense[row, :, row], ord=2))
        assert float(found[row]) == pytest.approx(expected, rel=1e-3)
        assert float(found[row]) <= expected * (1 + 1e-9)
    certificate = eq.certify(model, solution=solution)
    assert certificate.measured == pytest.approx(float(found.max()), rel=0.05)
    assert certificate.tightness == pytest.approx(certificate.measured / certificate.norm)
    assert certificate.tightness <= 1


@contractions
def test_a_certificate_changes_nothing_and_says_the_same_again(contraction: Contraction) -> None:
    model = make_model(contraction)
    before = {name: value.clone() for name, value in model.deq.cell.named_buffers()}
    first, second = eq.certify(model), eq.certify(model)
    assert first == second
    assert all(value.equal(before[name]) or value.isnan().any() for name, value in model.deq.cell.named_buffers())


def test_residual_layers_are_tight_from_the_start() -> None:
    model = MDEQClassifier(dataclasses.replace(SMALL, contraction=SLLLayers())).eval()
    with torch.no_grad():
        solution = model.deq.solve(injection(model))
    certificate = eq.certify(model, solution=solution)
    assert certificate.norm <= 0.9 * 0.8 * (1 + 1e-6)
    assert certificate.tightness is not None
    assert 0.5 <= certificate.tightness <= 1


# --- negative controls -----------------------------------------------------------------------------------------------


class ReshapedCap(CappedConv2d):
    """Caps the norm of the reshaped kernel, as the released code does; its constant is still that of the operator."""

    def __init__(self, conv: CappedConv2d, cap: float) -> None:
        outs, ins, k, _ = conv.weight.shape
        super().__init__(ins, outs, k, stride=conv.stride[0], cap=1e9, size=conv.size)
        with torch.no_grad():
            kernel = torch.rand(outs, ins, k, k)
            self.parametrizations.weight.original.copy_(
                kernel * cap / torch.linalg.matrix_norm(kernel.flatten(1), ord=2)
            )


def test_a_cap_on_the_reshaped_kernel_only_is_not_certified() -> None:
    config = dataclasses.replace(
        SMALL, image_size=16, channels=(4, 8, 8), head_channels=(2, 2, 2), contraction=ScaledLayers()
    )
    cell = MDEQCell(config)
    assert eq.certify(cell.eval()).contracts
    for module in list(cell.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, CappedConv2d):
                setattr(module, name, ReshapedCap(child, 2.0))
    for module in cell.modules():
        if isinstance(module, CappedConv2d):
            assert float(torch.linalg.matrix_norm(module.weight.detach().flatten(1), ord=2)) <= 2 * (1 + 1e-9)
    certificate = eq.certify(cell.eval())
    assert certificate.radius > 1
    assert certificate.norm > 1
    assert not certificate.contracts
    for use in (certificate.require, certificate.solver, lambda: certificate.evaluations(1e-3)):
        with pytest.raises(eq.CertificateError, match=r"not proved to contract: the block matrix has radius \d"):
            use()


def two_starts(model: MDEQClassifier, steps: int) -> tuple[Tensor, list[float]]:
    """Distance of the ends of Picard iteration from zero and from far away, and its residuals."""
    u = injection(model, 2)
    cell, far = model.deq.cell, states(model, 10.0, batch=2)
    with torch.no_grad():
        solver = eq.Picard(max_steps=steps, rtol=0, atol=1e-300)
        a = eq.fixed_point(cell, cell.zeros(u), u, solver=solver, trace=True)
        b = eq.fixed_point(cell, far, u, solver=solver)
        assert a.trace is not None
        return sizes(minus(a.value, b.value)).norm(dim=0), a.trace.norm(dim=1).tolist()


@contractions
def test_two_starts_find_the_same_equilibrium(contraction: Contraction) -> None:
    distance, _ = two_starts(make_model(contraction), 160)
    assert float(distance.max()) < 1e-9


def test_the_published_mdeq_fails_the_test_of_uniqueness_and_is_not_certified() -> None:
    config = dataclasses.replace(SMALL, image_size=16, channels=(8, 16, 16), head_channels=(2, 2, 2), expansion=3)
    model = MDEQClassifier(config).eval()
    with torch.no_grad():
        u = model.stem(torch.randn(2, 1, 16, 16))
        cell = model.deq.cell
        solver = eq.Picard(max_steps=160, rtol=0, atol=1e-300)
        starts = (cell.zeros(u), states(model, 10.0, batch=2))
        a, b = (eq.fixed_point(cell, z0, u, solver=solver).value for z0 in starts)
    assert float(sizes(minus(a, b)).norm(dim=0).min()) > 1e-2
    with pytest.raises(eq.CertificateError, match=r"^deq\.cell\."):
        eq.certify(model)


# --- rates and counts ------------------------------------------------------------------------------------------------


@contractions
def test_convergence_is_no_slower_than_proved_forward_and_backward(contraction: Contraction) -> None:
    model = make_model(contraction, trained=3)
    certificate, observed = eq.certify(model), []
    proved = certificate.evaluations(1e-6)
    solver = eq.Picard(max_steps=proved, rtol=1e-6)
    gradient = eq.Implicit(solver=solver, observe=observed.append)
    u = injection(model)
    u = u.requires_grad_() if isinstance(u, Tensor) else tuple(t.requires_grad_() for t in u)
    with model.deq.using(solver=solver, gradient=gradient):
        solution = model.deq.solve(u, trace=True).raise_for_status()
        sum((level * torch.randn_like(level)).sum() for level in solution.value).backward()
    assert solution.trace is not None
    ratios = solution.trace[1:] / solution.trace[:-1]
    assert bool((ratios[~ratios.isnan()] <= certificate.norm * (1 + 1e-9)).all())
    (adjoint,) = observed
    adjoint.raise_for_status()
    assert 2 < int(solution.num_steps.max()) <= proved
    assert 2 < int(adjoint.num_steps.max()) <= proved
    assert abs(int(solution.num_steps.max()) - int(adjoint.num_steps.max())) <= proved / 2


@contractions
def test_the_error_is_bounded_after_the_fact_at_every_step(contraction: Contraction) -> None:
    model = make_model(contraction)
    certificate, cell, u = eq.certify(model), model.deq.cell, injection(model)
    rate = certificate.norm
    weights = torch.tensor(certificate.weights)[:, None]
    with torch.no_grad():
        exact = eq.fixed_point(cell, cell.zeros(u), u, solver=eq.Picard(max_steps=400, rtol=1e-14)).value
        z, first = cell.zeros(u), None
        for k in range(1, 16):
            following = cell(z, u)
            error, step = sizes(minus(following, exact)), sizes(minus(following, z))
            first = step if first is None else first
            assert bool((error.norm(dim=0) <= rate / (1 - rate) * step.norm(dim=0) * (1 + 1e-9) + 1e-12).all())
            assert bool((error.norm(dim=0) <= rate**k / (1 - rate) * first.norm(dim=0) * (1 + 1e-9) + 1e-12).all())
            rho = certificate.radius
            last = (weights * step).norm(dim=0)
            assert bool(((weights * error).norm(dim=0) <= rho / (1 - rho) * last * (1 + 1e-9) + 1e-12).all())
            z = following


@contractions
def test_the_error_of_neumann_series_is_bounded_against_a_dense_solve(contraction: Contraction) -> None:
    model = make_model(contraction)
    rate, u = eq.certify(model).norm, injection(model, 1)
    with torch.no_grad():
        solution = model.deq.solve(u)
    f = solution.map
    z = f.pack(solution.value).detach()
    j = torch.autograd.functional.jacobian(f.call, z)[0, :, 0]
    g = torch.randn(z.shape[1])
    exact = torch.linalg.solve(torch.eye(len(g)) - j.T, g)
    assert float(exact.norm()) <= float(g.norm()) / (1 - rate)
    w = torch.zeros_like(g)
    for k in range(1, 20):
        w = j.T @ w + g
        assert float((w - exact).norm()) <= rate**k / (1 - rate) * float(g.norm()) * (1 + 1e-9)


def hand_made(lipschitz: float, condition: float = 1.0) -> eq.Certificate:
    norm = lipschitz if condition == 1 else 2.0
    return eq.Certificate(
        block_matrix=((lipschitz,),), training=False, norm=norm, radius=lipschitz, weights=(1.0, 1 / condition)
    )


@pytest.mark.parametrize("rtol", [0.3, 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("lipschitz", [0.0, 0.1, 0.5, 0.73, 0.9, 0.97])
def test_predicted_evaluations_are_those_of_the_worst_maps(lipschitz: float, rtol: float) -> None:
    """Iterates of z -> a z + 1, counted; the alternating one needs the most, and never more than is predicted."""
    predicted = hand_made(lipschitz).evaluations(rtol)

    def count(a: complex) -> int:
        z, k = 0j, 0
        while True:
            k, image = k + 1, a * z + 1
            if abs(image - z) <= rtol * abs(image):
                return k
            z = image

    worst = max(count(lipschitz * complex(math.cos(t), math.sin(t))) for t in torch.linspace(0, math.pi, 9).tolist())
    assert worst <= predicted
    if rtol <= 1e-2:  # a coarser tolerance is met at an even step, where |f(z)| is larger
        assert predicted <= count(-lipschitz) + 1, "attained, but for the parity of the last step"


@pytest.mark.parametrize("condition", [1.0, 4.0, 100.0])
def test_predicted_evaluations_hold_where_only_a_weighted_norm_contracts(condition: float) -> None:
    """D^-1 S D with |S| = 0.8 contracts in the norm of D alone; some start comes near to what is predicted."""
    predicted, worst = hand_made(0.8, condition).evaluations(1e-4), 0
    d = torch.tensor([1.0, 1 / condition])
    for seed in range(40):
        s = spectral(2, 0.8, torch.Generator().manual_seed(seed))
        a = s * d[None, :] / d[:, None]
        for x in torch.eye(2):
            z, k = torch.zeros(2), 0
            while True:
                k, image = k + 1, a @ z + x
                if float((image - z).norm()) <= 1e-4 * float(image.norm()):
                    break
                z = image
            worst = max(worst, k)
    assert worst <= predicted


@pytest.mark.parametrize(("lipschitz", "expected"), [(0.5, 11), (0.73, 27), (0.8, 39), (0.9, 88), (0.95, 194)])
def test_predictions_are_near_those_of_the_specification(lipschitz: float, expected: int) -> None:
    """There from |z1 - z0| / (eps (1 - L)), an error; here the residual relative to f(z)."""
    assert math.ceil(math.log(1 / (1e-3 * (1 - lipschitz))) / -math.log(lipschitz)) == expected
    assert hand_made(lipschitz).evaluations(1e-3, lipschitz=lipschitz) <= expected + 1 + math.log(2) / -math.log(
        lipschitz
    )


def test_a_rate_next_to_one_is_predicted_at_once() -> None:
    assert hand_made(1 - 1e-9).evaluations(1e-3) == pytest.approx(math.log(2e3) * 1e9, rel=1e-3)


@pytest.mark.parametrize("lipschitz", [0.3, 0.6, 0.7, 0.95])
def test_the_solver_of_a_certificate_bounds_the_error_and_has_the_steps_it_needs(lipschitz: float) -> None:
    solver = hand_made(lipschitz).solver(rtol=1e-3)
    assert isinstance(solver, eq.Picard if lipschitz <= 0.6 else eq.Anderson)
    for seed in range(5):
        a = spectral(6, lipschitz, torch.Generator().manual_seed(seed))
        a = a if seed else -lipschitz * torch.eye(6)
        x = torch.randn(4, 6)
        exact = torch.linalg.solve(torch.eye(6) - a, x.T).T
        solution = eq.fixed_point(lambda z, x, a=a: z @ a.T + x, 0 * x, x, solver=solver, params=()).raise_for_status()
        image = solution.value @ a.T + x
        assert bool(((solution.value - exact).norm(dim=1) <= 1e-3 * image.norm(dim=1)).all())


def test_the_solver_of_a_weighted_norm_bounds_the_euclidean_error() -> None:
    certificate = hand_made(0.8, 10.0)
    solver, d = certificate.solver(rtol=1e-3), torch.tensor([1.0, 0.1])
    a = spectral(2, 0.8, torch.Generator().manual_seed(1)) * d[None, :] / d[:, None]
    x = torch.randn(6, 2)
    exact = torch.linalg.solve(torch.eye(2) - a, x.T).T
    solution = eq.fixed_point(lambda z, x: z @ a.T + x, 0 * x, x, solver=solver, params=()).raise_for_status()
    assert bool(((solution.value - exact).norm(dim=1) <= 1e-3 * (solution.value @ a.T + x).norm(dim=1)).all())


@dataclasses.dataclass(eq=False)
class _Bounded(nn.Module):
    """A cell of which only the block matrix matters."""

    matrix: Tensor

    def __post_init__(self) -> None:
        super().__init__()

    def block_matrix(self, training: bool) -> Tensor:
        return self.matrix


@pytest.mark.parametrize("n", [1, 2, 4])
def test_radius_and_weights_are_those_of_perron(n: int) -> None:
    matrix = torch.rand(n, n)
    certificate = eq.certify(_Bounded(matrix))
    weights = torch.tensor(certificate.weights)
    assert certificate.norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, ord=2)))
    assert certificate.radius == pytest.approx(float(torch.linalg.eigvals(matrix).abs().max()))
    scaled = weights[:, None] * matrix / weights
    assert float(torch.linalg.matrix_norm(scaled, ord=2)) == pytest.approx(certificate.radius)
    assert certificate.condition == pytest.approx(float(weights.max() / weights.min()))


def test_a_chain_of_levels_contracts_in_a_weighted_norm_only() -> None:
    certificate = eq.certify(_Bounded(torch.tensor([[0.5, 3.0], [0.0, 0.5]])))
    assert certificate.norm > 1
    assert certificate.contracts
    assert certificate.radius == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_certified(value: float) -> None:
    certificate = eq.certify(_Bounded(torch.tensor([[0.5, value], [0.1, 0.5]])))
    assert not certificate.contracts
    with pytest.raises(eq.CertificateError, match="not proved to contract"):
        certificate.require()


# --- what is refused, and whom the error names -----------------------------------------------------------------------


def _other(layer: Callable[[], nn.Module]) -> Callable[[MDEQCell], None]:
    def change(cell: MDEQCell) -> None:
        cell.fusion.paths["1_to_0"][1] = layer()

    return change


def _weight_normed(cell: MDEQCell) -> None:
    parametrizations.weight_norm(cell.fusion.paths["1_to_0"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other(lambda: nn.BatchNorm2d(4)), r"^deq\.cell\.fusion\.paths\.1_to_0\.1 \(BatchNorm2d: batch statistics"),
        (_other(lambda: nn.GroupNorm(2, 4)), r"^deq\.cell\.fusion\.paths\.1_to_0\.1 \(GroupNorm: a division"),
        (_other(nn.SiLU), r"^deq\.cell\.fusion\.paths\.1_to_0\.1 \(SiLU: no Lipschitz constant is known"),
        (
            _weight_normed,
            r"^deq\.cell\.fusion\.paths\.1_to_0\.0 \(CappedConv2d: another parametrization, such as weight_n",
        ),
    ],
    ids=["BatchNorm", "GroupNorm", "unknown", "weight norm"],
)
def test_a_layer_without_a_constant_is_named_by_its_path(change: Callable[[MDEQCell], None], message: str) -> None:
    model = make_model(ScaledLayers())
    change(model.deq.cell)
    with pytest.raises(eq.CertificateError, match=message):
        eq.certify(model)


def test_a_map_with_a_forward_pass_of_its_own_needs_a_bound_of_its_own() -> None:
    class Skipping(MDEQCell):
        def forward(self, z: State, u: Tensor | State) -> State:
            return tuple(a + b for a, b in zip(z, super().forward(z, u), strict=True))

    model = make_model(SLLLayers())
    wrapped = eq.certify(torch.compile(model.deq.cell))
    assert wrapped == eq.certify(model)
    model.deq.cell = Skipping(model.config).eval()
    with pytest.raises(eq.CertificateError, match=r"^deq\.cell \(Skipping: it overrides forward and inherits block_m"):
        eq.certify(model)


def test_a_module_without_a_block_matrix_is_told_what_it_needs() -> None:
    with pytest.raises(eq.CertificateError, match=r"Linear has no method block_matrix\(training\)"):
        eq.certify(eq.nn.DEQ(nn.Linear(2, 2)))


@pytest.mark.parametrize("forward", [True, False])
def test_a_solver_that_claims_more_than_is_proved_is_refused(forward: bool) -> None:
    model = make_model(SLLLayers())
    proved = eq.certify(model).norm
    for claimed, refused in ((0.9 * proved, True), (proved, False), (0.95, False)):
        solver = eq.Picard(lipschitz=claimed)
        choice = {"solver": solver} if forward else {"gradient": eq.Implicit(solver=solver)}
        with model.deq.using(**choice):
            if not refused:
                eq.certify(model)
                continue
            with pytest.raises(eq.CertificateError, match=r"was given lipschitz=0\.6\d+, and the weights prove 0\.7"):
                eq.certify(model)


@pytest.mark.parametrize("rtol", [0.0, -1.0, math.nan])
def test_tolerances_must_be_positive(rtol: float) -> None:
    with pytest.raises(ValueError, match=r"rtol=.*: must be > 0"):
        hand_made(0.5).evaluations(rtol)


def test_dropout_counts_in_training_only() -> None:
    model = make_model(ScaledLayers(), config=dataclasses.replace(SMALL, dropout=0.3))
    evaluation, training = eq.certify(model), eq.certify(model, training=True)
    assert not evaluation.training
    assert training.training
    assert training.norm > 1.05 * evaluation.norm
    dense = conv_matrix(model.deq.cell.blocks[0].conv2.weight.detach(), (8, 8), 1, 1)
    assert float(torch.linalg.matrix_norm(dense, ord=2)) <= 2


def test_a_certificate_as_plain_data() -> None:
    data = hand_made(0.5).as_dict()
    assert data["contracts"] is True
    assert data["tightness"] is None
    assert data["radius"] == 0.5


class Given(nn.Module):
    """A cell with the block matrix that it is told."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def block_matrix(self, training: bool) -> Tensor:
        return self.matrix


@pytest.mark.parametrize("matrix", [torch.tensor([[0.7, -0.7], [0.7, 0.7]]), torch.zeros(2, 3)])
def test_a_matrix_that_bounds_nothing_is_refused(matrix: Tensor) -> None:
    with pytest.raises(eq.CertificateError, match="square matrix of bounds >= 0"):
        eq.certify(Given(matrix))


def test_a_map_that_ignores_its_state_is_certified() -> None:
    certificate = eq.certify(Given(torch.zeros(2, 2, dtype=torch.float32)))
    assert certificate.contracts
    assert certificate.norm == 0
    assert dataclasses.replace(certificate, measured=0.0).as_dict()["tightness"] is None


def test_a_certificate_is_of_the_mode_of_the_model() -> None:
    config = dataclasses.replace(MDEQConfig.digits(), dropout=0.5, contraction=ScaledLayers())
    model = MDEQClassifier(config)
    assert eq.certify(model).training
    assert eq.certify(model).norm == eq.certify(model, training=True).norm > eq.certify(model, training=False).norm
    assert not eq.certify(model.eval()).training


def test_a_solver_with_a_false_constant_promises_no_count() -> None:
    half = eq.Certificate(block_matrix=((0.5,),), training=False, norm=0.5, radius=0.5, weights=(1.0,))
    assert half.evaluations_of(eq.Anderson(lipschitz=0.01)) is None
    assert half.evaluations_of(eq.Anderson(lipschitz=0.5)) is not None


def test_other_contractions_are_refused_instead_of_ignored() -> None:
    class Mine(Contraction):
        def constant(self, num_levels: int, *, dropout: float = 0.0) -> float:
            return 0.5

    with pytest.raises(TypeError, match="must be ScaledLayers, SLLLayers or None"):
        dataclasses.replace(MDEQConfig.digits(), contraction=Mine())
