"""A few-shot learner: what it finds is optimal, gradients are exact, classes have no order, and it learns sinusoids."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import difference, directions

import equipoise as eq
from equipoise.zoo import ADAPT, FewShotConfig, FewShotLearner
from equipoise.zoo.few_shot.model import FewShotCell

TIGHT = eq.Anderson(memory=20, max_steps=400, rtol=1e-9, ridge=1e-8)
SMALL = FewShotConfig(image_size=28, image_channels=1, channels=4, num_groups=2, width=5, context=3)
EXACT = dataclasses.replace(
    ADAPT, solver=TIGHT, gradient=eq.Implicit(solver=eq.GMRES(max_steps=300, rtol=0.0, atol=1e-11))
)


def learner() -> FewShotLearner:
    torch.manual_seed(3)
    model: FewShotLearner = SMALL.build(
        solver=eq.Anderson(max_steps=200, rtol=1e-12),
        gradient=eq.Implicit(solver=eq.GMRES(atol=1e-12, rtol=0.0)),
    )
    with torch.no_grad():
        model.decay.log_weight.copy_(torch.tensor([0.1, 0.3]).log())
        model.deq.cell.film.weight.mul_(5)
    return model


def task(tasks: int = 2, ways: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(5)
    images = torch.randn(tasks, 2 * ways, 1, 28, 28, generator=source)
    labels = torch.arange(ways).expand(tasks, -1)
    return images[:, :ways], labels, images[:, ways:], labels.flip(1)


def by_hand(model: FewShotLearner, images: Tensor, x: dict[str, Tensor]) -> Tensor:
    """Logits by two hundred applications of the formula."""
    u = model.stem(images.flatten(0, 1)).view(*images.shape[:2], -1)
    scale, shift = (x["context"] @ model.deq.cell.film.weight.T)[:, None].chunk(2, dim=-1)
    z = torch.zeros_like(u)
    for _ in range(200):
        z = torch.tanh((1 + scale) * (z @ model.deq.cell.state.weight.T) + u + shift)
    return torch.einsum("bnd,bkd->bnk", z, x["head"]) / math.sqrt(SMALL.width)


def test_stationary_point() -> None:
    model = learner()
    support, labels, queries, _ = task()
    found = model.adapt(support, labels, ways=3, optimizer=EXACT)
    assert bool(found.converged.all())
    x = {name: value.detach().requires_grad_() for name, value in found.value[2].items()}
    likelihood = by_hand(model, support, x).log_softmax(2).gather(2, labels[..., None]).sum()
    decay = 0.5 * (0.1 * x["context"].square().sum() + 0.3 * x["head"].square().sum())
    slopes = torch.autograd.grad(decay - likelihood, list(x.values()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-6
    assert min(float(value.detach().norm(dim=-1).min()) for value in x.values()) > 1e-3
    logits, _ = model.classify(queries, x)
    torch.testing.assert_close(logits, by_hand(model, queries, x), rtol=0, atol=1e-8)


def loss(model: FewShotLearner, **changes: Any) -> Tensor:
    support, labels, queries, wanted = task()
    found = model.adapt(support, labels, ways=3, optimizer=dataclasses.replace(EXACT, **changes))
    logits, _ = model.classify(queries, found.value[2])
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


@pytest.mark.parametrize("name", ["deq.cell.film.weight", "decay.log_weight", "stem.13.weight"])
def test_gradients(name: str) -> None:
    """The full gradient equals differences of the query loss, and that of first order does not."""
    model = learner()
    weights = [model.get_parameter(name)]
    (direction,) = along = directions(weights)
    slope = pytest.approx(difference(lambda: loss(model), weights, along, 1e-4), rel=1e-4, abs=1e-8)
    (exact,) = torch.autograd.grad(loss(model), weights)
    assert float((exact * direction).sum()) == slope
    blind = loss(model, gradient=eq.inputs.FirstOrder())
    (blind,) = torch.autograd.grad(blind, weights, materialize_grads=True)
    assert float((blind * direction).sum()) != slope


def test_order_of_classes() -> None:
    model = learner()
    support, labels, queries, _ = task()
    order = torch.tensor([2, 0, 1])
    one = model.classify(queries, model.adapt(support, labels, ways=3, optimizer=EXACT).value[2])[0]
    other = model.classify(queries, model.adapt(support, order[labels], ways=3, optimizer=EXACT).value[2])[0]
    torch.testing.assert_close(one, other[:, :, order], rtol=0, atol=1e-6)
    support, labels, queries, _ = task(tasks=1, ways=5)
    assert model.classify(queries, model.adapt(support, labels, ways=5).value[2])[0].shape == (1, 5, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width=0: must be >= 1"),
        ({"channels": 5}, "channels=5 must be a multiple of num_groups=2"),
        ({"image_size": 8}, "image_size=8: must be >= 16"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=r"images must have shape \(B, n, 1, 28, 28\)"):
        learner().encode(torch.zeros(2, 1, 28, 28))


class SineCell(FewShotCell):
    """The few-shot map on numbers, whose task sets a context alone."""

    def forward(self, z: Tensor, context: Tensor, u: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z, {"context": context}, u)


class SineCost(nn.Linear):
    """Squared errors of the numbers that a head reads, which the context sets."""

    def forward(self, z: Tensor, context: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return ((z * super().forward(context)[:, None]).sum(2) - y).square().sum(1)


@pytest.mark.slow
def test_sinusoids() -> None:
    """Finn et al. (2017): amplitude in [0.1, 5], phase in [0, pi], inputs in [-5, 5]."""
    torch.set_default_dtype(torch.float32)
    source = torch.Generator().manual_seed(0)
    config = FewShotConfig(image_size=16, image_channels=1, width=40, context=8)
    stem, cell, cost = nn.Linear(1, 40), SineCell(config), SineCost(8, 40, bias=False)
    with torch.no_grad():
        stem.weight.mul_(2)
        stem.bias.mul_(3)
    parameters = [*stem.parameters(), *cell.parameters(), *cost.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)

    def errors(tasks: int) -> tuple[Tensor, Tensor]:
        amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, generator=source)
        phase = math.pi * torch.rand(tasks, 1, generator=source)
        x = 10 * torch.rand(tasks, 20, generator=source) - 5
        y = amplitude * torch.sin(x - phase)
        u = stem(x[..., None])
        zeros = torch.zeros(tasks, 8)
        found = eq.optimize_inputs(
            cell,
            z0=torch.zeros_like(u[:, :10]),
            x0=zeros,
            cost=cost,
            inputs=(u[:, :10],),
            targets=(y[:, :10],),
            regularizer=lambda context: 0.05 * context.square().sum(1),
            optimizer=eq.inputs.InputOptimizer(
                solver=eq.Anderson(memory=10, max_steps=40, rtol=1e-2, ridge=1e-3),
                step_size=0.02,
                gradient=eq.Implicit(solver=eq.GMRES(max_steps=30, rtol=0.0, atol=1e-2)),
                verify_solver=None,
            ),
        )
        z = [eq.fixed_point(cell, torch.zeros_like(u[:, 10:]), x, u[:, 10:]).value for x in (found.value[2], zeros)]
        adapted, unadapted = (
            cost(each, x, y[:, 10:]).mean() / 10 for each, x in zip(z, (found.value[2], zeros), strict=True)
        )
        return adapted, unadapted

    for _ in range(50):
        optimizer.zero_grad()
        errors(16)[0].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        adapted, unadapted = errors(200)
    assert float(adapted) < 0.25 * float(unadapted)
    assert float(unadapted) > 1.0
