"""What is proved about a run: stored with it, checked when it is loaded and evaluated, and true of what is observed."""

import copy
import dataclasses
import json
import pathlib
from typing import Any
from unittest import mock

import pytest
import torch
from toy import CLASSES, FULL, PLAIN, Run, contracting_toys

import equipoise as eq
from equipoise import CertificateError, files, train, zoo
from equipoise.contraction.capped import _Cap
from equipoise.train import CheckpointError, TrainConfig, checkpoint, evaluate, fit, loop
from equipoise.train.evaluation import certified
from equipoise.train.loop import Average
from equipoise.train.proof import FACTS, check_claims, prove, summarize
from equipoise.train.serialize import from_plain, to_plain
from equipoise.zoo import MDEQClassifier, ScaledLayers
from equipoise.zoo.files import load

TOYS = contracting_toys()


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    """A model whose convolutions are all at their caps."""
    config = TOYS["scaled"]
    torch.manual_seed(0)
    train.save(MDEQClassifier(config.model, solver=config.solver, gradient=config.gradient), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOYS)
def test_proof_of_a_run(kind: str, whole: Run) -> None:
    config = TOYS[kind]
    result = whole(config)
    certificate = eq.certify(result.model)
    found = json.loads((result.run_dir / "result.json").read_text())
    assert found == result.test
    bound, steps = certificate.norm, certificate.evaluations_of(config.eval_solver)
    assert 0 < found["measured_lipschitz"] <= bound < 1
    expected = (bound, found["measured_lipschitz"] / bound, None, steps, 1)
    names = ("certified_lipschitz", "tightness", "not_certified", "predicted_evaluations", "converged")
    assert tuple(found[name] for name in names) == expected
    assert 1 < found["mean_steps"] <= steps <= config.eval_solver.max_steps
    stored = checkpoint.describe(result.run_dir / "model.safetensors")["certificate"]
    assert (stored["reason"], stored["evaluation"]) == (None, json.loads(json.dumps(certificate.as_dict())))
    assert stored["training"]["norm"] == eq.certify(result.model, training=True).norm >= certificate.norm
    split = config.data.load().test
    again = evaluate(load(result.run_dir / "model.safetensors"), split, config)
    assert {name: again[name] for name in FACTS} == pytest.approx({name: found[name] for name in FACTS})
    strict = dataclasses.replace(config.eval_solver, lipschitz=certificate.norm / 2)
    with pytest.raises(CertificateError, match=r"was given lipschitz=0.* and the weights prove 0\.\d+ only"):
        evaluate(result.model, split, config, solver=strict)


def test_plain_model(whole: Run) -> None:
    found = whole(PLAIN).test
    assert [found[name] for name in FACTS[:-1]] == [None] * 4
    assert found["not_certified"].startswith(
        "deq.cell.blocks.0.conv1 (Conv2d: its norm is not bounded, and depends on the size of the image"
    )
    # The advice after the semicolon is left out.
    assert summarize(found) == f"not certified: {found['not_certified'].partition('; ')[0]})"


FACTS_OF = dict(zip(FACTS, (0.73, 27, 0.41, 0.56, None), strict=True))
CONTRACTS = "contracts: L = 0.73 (measured 0.41, 56% tight), at most 27 evaluations"


@pytest.mark.parametrize(
    ("facts", "cut", "line"),
    [
        (FACTS_OF, (), CONTRACTS),
        (FACTS_OF, (18,), f"{CONTRACTS}, cut at 18"),
        (FACTS_OF, (27,), CONTRACTS),
        (
            {**FACTS_OF, "measured_lipschitz": None, "predicted_evaluations": None},
            (),
            "contracts: L = 0.73, and the solver promises nothing",
        ),
        (  # a bound is rounded up
            {**dict.fromkeys(FACTS), "certified_lipschitz": 0.99961, "predicted_evaluations": 3},
            (),
            "contracts: L = 0.9997, at most 3 evaluations",
        ),
        (
            {"not_certified": "Cell has no method block_matrix(training) that bounds it; define one"},
            (),
            "not certified: Cell has no method block_matrix(training) that bounds it",
        ),
        (
            {"not_certified": "its layers may expand (cap=1.2; lower it)"},
            (),
            "not certified: its layers may expand (cap=1.2)",
        ),
        (
            {"not_certified": "bf16-mixed rounds more than a proof allows"},
            (),
            "not certified: bf16-mixed rounds more than a proof allows",
        ),
    ],
)
def test_summary(facts: dict[str, Any], cut: tuple[int, ...], line: str) -> None:
    assert summarize(facts, *cut) == line


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (eq.Picard(rtol=1e-3), 12),  # 0.5^11 * 1.5 <= 1e-3 * (1 - 0.5^12), and 0.5^10 * 1.5 > 1e-3
        (eq.Picard(rtol=1e-3, lipschitz=0.5), 13),  # the same with half the tolerance
        (eq.Anderson(rtol=1e-3, lipschitz=0.5), 2 * 12 + 1),  # 0.5^12 * 1.5 * 1.0005 <= 5e-4 < 0.5^11 * 1.5
        (eq.Picard(rtol=1e-3, damping=0.5), None),
        (eq.Picard(rtol=0, atol=1e-3), None),
        (eq.Anderson(), None),
        (eq.Broyden(), None),
    ],
)
def test_predicted_evaluations(solver: eq.Solver, expected: int | None) -> None:
    half = eq.Certificate(block_matrix=((0.5,),), training=False, norm=0.5, radius=0.5, weights=(1.0,))
    assert half.evaluations_of(solver) == expected
    assert dataclasses.replace(half, norm=1.5, radius=1.25).evaluations_of(solver) is None


def test_training_mode() -> None:
    model = MDEQClassifier(TOYS["scaled"].model).train()
    before = copy.deepcopy(model.state_dict())
    proof = prove(model)
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert proof.evaluation is not None
    assert proof.evaluation == eq.certify(model.eval()) == eq.certify(model)


def rewrite(path: pathlib.Path, **changes: Any) -> None:
    """Change facts, or drop those that are None."""
    tensors, facts = files.read_tensors(path)
    files.write_tensors(path, tensors, {k: v for k, v in {**facts, **changes}.items() if v is not None})


def test_false_claims(saved: pathlib.Path) -> None:
    facts = checkpoint.describe(saved)
    claimed = facts["certificate"]["evaluation"]["norm"]
    assert load(saved).config.contraction == TOYS["scaled"].model.contraction
    config = json.loads(json.dumps(facts["config"]))
    config["init_args"]["contraction"]["init_args"]["cap"] *= 1.1  # as if every convolution had been enlarged
    solver = to_plain(eq.Picard())
    rewrite(saved, config=config, solver=solver, gradient=to_plain(eq.JacobianFree()))
    with pytest.raises(CheckpointError, match=rf"block matrix has norm {claimed:.4f} in evaluation, and its weights"):
        load(saved)
    config["init_args"]["contraction"]["init_args"].update(cap=50.0, slope=1.0)
    rewrite(saved, config=config)
    with pytest.raises(CheckpointError, match=r"claims that the map contracts in evaluation, and its weights do not"):
        load(saved)
    rewrite(saved, certificate=None)
    assert not eq.certify(load(saved)).contracts  # it claims nothing
    rewrite(saved, certificate={"evaluation": 3})
    with pytest.raises(CheckpointError, match="is not what it says"):
        load(saved)


def test_false_constants(saved: pathlib.Path) -> None:
    rewrite(saved, solver=to_plain(eq.Picard(lipschitz=0.01)))
    with pytest.raises(CheckpointError, match=r"is not what it says: the solver of the DEQ was given lipschitz=0\.01"):
        load(saved)
    model = MDEQClassifier(TOYS["tight"].model, solver=eq.Picard(lipschitz=0.1))  # starts at 0.8 * 0.5
    with pytest.raises(CertificateError, match=r"given lipschitz=0\.1, and the weights prove 0\.\d+ only"):
        train.save(model, saved)


def test_files_without_certificate(tmp_path: pathlib.Path) -> None:
    """As versions before certificates wrote them, without `contraction` in the configuration, too."""
    train.save(MDEQClassifier(FULL.model), tmp_path / "model")
    config = checkpoint.describe(tmp_path / "model")["config"]
    del config["init_args"]["contraction"]
    rewrite(tmp_path / "model", certificate=None, config=config)
    assert load(tmp_path / "model").config == FULL.model


def claiming(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TOYS["tight"], **changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            claiming(solver=eq.Picard(lipschitz=0.3)),
            r"solver.lipschitz=0\.3: the layers of the model may have 0\.5; set it to 0\.5 or more, or lower",
        ),
        (claiming(eval_solver=eq.Anderson(lipschitz=0.3)), r"^eval_solver.lipschitz=0\.3: "),
        (claiming(gradient=eq.Implicit(solver=eq.Picard(lipschitz=0.3))), r"^gradient.solver.lipschitz=0\.3: "),
        (
            dataclasses.replace(PLAIN, solver=eq.Picard(lipschitz=0.3), gradient=eq.JacobianFree()),
            r"solver.lipschitz=0\.3: nothing proves it, as the layers of the model may have any constant",
        ),
        (
            claiming(model=dataclasses.replace(PLAIN.model, contraction=ScaledLayers(slope=1.0))),
            r"solver.lipschitz=0\.5: the layers of the model may have \d+\.\d+; lower the constants",
        ),
    ],
)
def test_claims_of_configurations(config: TrainConfig, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CertificateError, match=message):
        fit(config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dropout() -> None:
    config = zoo.contracting(PLAIN, ScaledLayers())
    assert PLAIN.model.dropout > 0
    evaluated = config.eval_solver.lipschitz  # type: ignore[attr-defined]
    check_claims(config)
    for field, constant in (("solver", evaluated), ("eval_solver", 0.99 * evaluated)):
        solver = dataclasses.replace(getattr(config, field), lipschitz=constant)
        with pytest.raises(CertificateError, match=rf"^{field}.lipschitz"):
            check_claims(dataclasses.replace(config, **{field: solver}))


@pytest.mark.slow
def test_renewal(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of their moving average, and without validation images, too."""
    seen: list[torch.Tensor] = []
    renew = _Cap.renew
    monkeypatch.setattr(_Cap, "renew", lambda cap, kernel: (seen.append(kernel.clone()), renew(cap, kernel))[1])
    config = dataclasses.replace(TOYS["scaled"], data=PLAIN.data, ema_decay=0.9, epochs=2)
    fit(config, run_dir=tmp_path)
    state, _ = checkpoint.read_newest_state(tmp_path / "checkpoints")
    assert state is not None
    trained = state.tensors["model.deq.cell.blocks.0.conv1.parametrizations.weight.original"]
    assert any(torch.equal(kernel, trained) for kernel in seen)


def test_average_of_buffers() -> None:
    model = MDEQClassifier(TOYS["scaled"].model)
    average = Average(model, 0.9)
    names = [f"deq.cell.blocks.0.conv1.parametrizations.weight.{name}" for name in ("original", "0.vector", "0.slack")]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name in names:
            model.state_dict()[name].mul_(2)
    average.update(model, 10**6)
    for name, factor in zip(names, (1.1, 2, 2), strict=True):  # what is not learned is copied
        torch.testing.assert_close(average.values[name], factor * before[name])


@pytest.mark.slow
def test_failed_proof(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "certified", mock.Mock(side_effect=CertificateError("nothing is proved")))
    with pytest.raises(CertificateError, match="nothing is proved"):
        fit(dataclasses.replace(TOYS["tight"], stop_after=1), run_dir=tmp_path)
    assert eq.certify(load(tmp_path / "model.safetensors")).contracts


def test_half_precision() -> None:
    model = MDEQClassifier(TOYS["scaled"].model).bfloat16().eval()
    assert model(torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16)).isfinite().all()
    with pytest.raises(CertificateError, match=r"original is torch.bfloat16, which rounds more .* use model.float\(\)"):
        eq.certify(model)
    assert eq.certify(model.float()).contracts


@pytest.mark.parametrize(
    ("class_path", "fields", "message"),
    [
        ("SLLLayers", {"cieling": 0.5}, r"unknown key 'model.contraction.cieling'; did you mean 'ceiling'"),
        ("SLLLayer", {}, r"model.contraction: unknown class 'SLLLayer'; did you mean 'SLLLayers'"),
        ("SLLLayers", {"ceiling": 1.0}, r"ceiling=1\.0\)?: must be > 0 and < 1"),
    ],
)
def test_layers_in_files(class_path: str, fields: dict[str, float], message: str) -> None:
    plain = to_plain(TOYS["tight"])
    assert from_plain(TrainConfig, plain, CLASSES) == TOYS["tight"]
    plain["model"]["init_args"]["contraction"] = {"class_path": class_path, "init_args": fields}
    with pytest.raises(ValueError, match=message):
        from_plain(TrainConfig, plain, CLASSES)


def test_solver_of_the_certificate(tmp_path: pathlib.Path) -> None:
    """The constant is that of evaluation; with dropout the weights prove less, which is no reason to lose the model."""
    config = dataclasses.replace(zoo.lipschitz_digits().model, dropout=0.3)
    model = MDEQClassifier(config).eval()
    model.deq.solver = eq.certify(model).solver()
    train.save(model, tmp_path / "model")
    stored = checkpoint.describe(tmp_path / "model")["certificate"]
    assert stored["training"]["norm"] > stored["evaluation"]["norm"]
    assert load(tmp_path / "model").deq.solver == model.deq.solver


def test_bf16() -> None:
    config = dataclasses.replace(TOYS["scaled"], precision="bf16-mixed")
    model = MDEQClassifier(config.model, solver=config.solver).float().eval()
    found = certified(model, config.data.load().test, config, torch.device("cpu"))
    assert found["certified_lipschitz"] is None
    assert "bf16" in found["not_certified"]
