"""What only an accelerator shows: the answers of the host, mixed precision, compiled cells, whole runs."""

import dataclasses
import pathlib

import pytest
import torch
from problems import TanhCell
from torch import nn
from toy import FULL, PLAIN, contracting_toys

import equipoise as eq
from equipoise.train import TrainConfig, checkpoint, fit
from equipoise.zoo import Classify, DenseConfig, MDEQConfig, SkipPenalty
from equipoise.zoo.files import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

EXACT = eq.Implicit(solver=eq.GMRES(max_steps=80, rtol=0.0, atol=1e-10))
GRADIENTS = {
    "implicit": (eq.Anderson(max_steps=200, rtol=1e-11), EXACT),
    "refined": (eq.Broyden(max_steps=60, memory=60, rtol=1e-11), dataclasses.replace(EXACT, start=eq.Shine())),
    "shine": (eq.Broyden(max_steps=6, memory=6, rtol=0.0), eq.Shine()),
    "jacobian-free": (eq.Anderson(max_steps=200, rtol=1e-11), eq.JacobianFree()),
    "neumann": (eq.Anderson(max_steps=200, rtol=1e-11), eq.Neumann(steps=4)),
    "unrolled": (eq.Picard(max_steps=0), eq.Unrolled(steps=6)),
    "flow": (eq.SteadyState(max_steps=300, rtol=1e-11), EXACT),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_host(name: str) -> None:
    solver, gradient = GRADIENTS[name]
    cell, guess, x = TanhCell(7), nn.Linear(7, 7), torch.randn(40, 7) * torch.logspace(-2, 1, 40)[:, None]
    found = []
    for device in ("cpu", "cuda"):
        layer = eq.nn.DEQ(cell, solver=solver, gradient=gradient, init=guess, explicit_steps=1).to(device)
        leaf = x.to(device, copy=True).requires_grad_()
        solution = layer.solve(leaf)
        loss = solution.value.square().sum() + eq.nn.skip_penalty(solution)
        if name == "implicit":
            loss = loss + eq.nn.spectral_radius(solution, 20).sum() * 0
        found.append([g.cpu() for g in torch.autograd.grad(loss, [leaf, *layer.parameters()])])
    for host, device_ in zip(*found, strict=True):
        torch.testing.assert_close(device_, host, rtol=1e-7, atol=1e-9)


def test_second_derivatives_on_the_device() -> None:
    cell = TanhCell(4).cuda()
    layer = eq.nn.DEQ(cell, solver=eq.Anderson(max_steps=200, rtol=1e-13), gradient=EXACT)
    x = torch.randn(3, 4, device="cuda", requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x), x, atol=1e-5, fast_mode=True)


RUNS: dict[str, TrainConfig] = {
    "full": dataclasses.replace(FULL, precision="64-true"),
    "adjoint-broyden": dataclasses.replace(
        PLAIN, solver=eq.AdjointBroyden(max_steps=6, memory=20, outer_every=2), precision="64-true"
    ),
    "skip-flow": dataclasses.replace(
        PLAIN,
        model=dataclasses.replace(PLAIN.model, predictor=True),
        solver=eq.SteadyState(max_steps=12),
        gradient=eq.Implicit(solver=eq.GMRES(max_steps=10, rtol=0.0, atol=1e-3)),
        task=Classify(skip=SkipPenalty(weight=0.1)),
        precision="64-true",
    ),
    **{name: dataclasses.replace(config, precision="64-true") for name, config in contracting_toys().items()},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_the_device_follows_that_on_the_host(name: str, tmp_path: pathlib.Path) -> None:
    results = {
        kind: fit(dataclasses.replace(RUNS[name], accelerator=kind), run_dir=tmp_path / kind)
        for kind in ("cpu", "cuda")
    }
    losses = {kind: [line["loss"] for line in result.history] for kind, result in results.items()}
    # Dropout masks are functions of seeds that each device draws by itself.
    alike = not RUNS[name].model.dropout  # type: ignore[attr-defined]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-6 if alike else 0.5)
    assert "cuda" not in str(load(tmp_path / "cuda" / "model.safetensors").deq.solver)
    assert checkpoint.describe(tmp_path / "cuda" / "model.safetensors")["kind"] == "model"


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16-mixed"},
        {"compile_cell": True},
        {"channels_last": True, "precision": "bf16-mixed"},
        {"deterministic": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_modes_of_the_device_train(changes: dict[str, object], tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(FULL, accelerator="cuda", epochs=3, **changes)  # type: ignore[arg-type]
    result = fit(config, run_dir=tmp_path / "first")
    assert all(line["loss"] < 5 for line in result.history)
    if changes == {"deterministic": True}:
        again = fit(config, run_dir=tmp_path / "second")
        for name, value in result.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    "config",
    [MDEQConfig.digits(), DenseConfig(image_size=8, image_channels=1, num_classes=10)],
    ids=lambda config: type(config).__name__,
)
def test_models_give_the_logits_of_the_host(config: MDEQConfig | DenseConfig) -> None:
    model = config.build(solver=eq.Anderson(max_steps=60, rtol=1e-10)).double().eval()
    images = torch.randn(20, 1, 8, 8)
    with torch.no_grad():
        host = model(images)
        device = model.cuda()(images.cuda())
    torch.testing.assert_close(device.cpu(), host, rtol=1e-6, atol=1e-7)


def test_a_certificate_does_not_depend_on_the_device() -> None:
    config = contracting_toys()["tight"]
    model = config.model.build(solver=config.solver).double().eval()
    host = eq.certify(model)
    device = eq.certify(model.cuda())
    assert device.norm == pytest.approx(host.norm, rel=1e-9)
