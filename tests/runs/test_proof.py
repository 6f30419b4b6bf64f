"""What is proved about a run: stored with it, checked when it is loaded and evaluated, and true of what is observed."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
import torch
from toy import CLASSES, FULL, PLAIN, Run, contracting_toys

import equipoise as eq
from equipoise import CertificateError, files, train, zoo
from equipoise.contraction.capped import _Cap
from equipoise.train import CheckpointError, TrainConfig, checkpoint, evaluate, fit, loop
from equipoise.train.average import Average
from equipoise.train.evaluation import certified
from equipoise.train.proof import FACTS, check_claims, prove, summarize
from equipoise.train.serialize import from_plain, to_plain
from equipoise.zoo import MDEQClassifier, ScaledLayers, SLLLayers
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
def test_a_run_ends_with_a_proof_that_its_test_images_obey(kind: str, whole: Run) -> None:
    config = TOYS[kind]
    result = whole(config)
    certificate = eq.certify(result.model)
    found = json.loads((result.run_dir / "result.json").read_text())
    assert found == result.test
    assert 0 < found["measured_lipschitz"] <= found["certified_lipschitz"] == certificate.norm < 1
    assert found["tightness"] == found["measured_lipschitz"] / found["certified_lipschitz"]
    assert found["not_certified"] is None
    assert config.eval_solver is not None
    assert found["predicted_evaluations"] == certificate.evaluations_of(config.eval_solver)
    assert found["converged"] == 1
    assert 1 < found["mean_steps"] <= found["predicted_evaluations"] <= config.eval_solver.max_steps
    stored = checkpoint.describe(result.run_dir / "model.safetensors")["certificate"]
    assert stored["reason"] is None
    assert stored["evaluation"] == json.loads(json.dumps(certificate.as_dict()))
    assert stored["training"]["norm"] == eq.certify(result.model, training=True).norm >= certificate.norm
    split = config.data.load().test
    again = evaluate(load(result.run_dir / "model.safetensors"), split, config)
    assert {name: again[name] for name in FACTS} == pytest.approx({name: found[name] for name in FACTS})
    strict = dataclasses.replace(config.eval_solver, lipschitz=certificate.norm / 2)
    with pytest.raises(CertificateError, match=r"was given lipschitz=0.* and the weights prove 0\.\d+ only"):
        evaluate(result.model, split, config, solver=strict)


def test_a_run_of_a_plain_model_says_that_nothing_is_proved(whole: Run) -> None:
    found = whole(PLAIN).test
    assert [found[name] for name in FACTS[:-1]] == [None] * 4
    assert found["not_certified"].startswith(
        "deq.cell.blocks.0.conv1 (Conv2d: its norm is not bounded, and depends on the size of the image"
    )
    # The advice after the semicolon is left out.
    assert summarize(found) == f"not certified: {found['not_certified'].partition('; ')[0]})"


def test_the_line_names_bound_tightness_and_evaluations() -> None:
    facts = dict(zip(FACTS, (0.73, 27, 0.41, 0.56, None), strict=True))
    assert summarize(facts) == "contracts: L = 0.73 (measured 0.41, 56% tight), at most 27 evaluations"
    assert summarize(facts, 18).endswith("at most 27 evaluations, cut at 18")
    assert summarize(facts, 27) == summarize(facts)
    unmeasured = {**facts, "measured_lipschitz": None, "predicted_evaluations": None}
    assert summarize(unmeasured) == "contracts: L = 0.73, and the solver promises nothing"


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
def test_evaluations_are_predicted_where_a_solver_has_a_proof(solver: eq.Solver, expected: int | None) -> None:
    half = eq.Certificate(block_matrix=((0.5,),), training=False, norm=0.5, radius=0.5, weights=(1.0,))
    assert half.evaluations_of(solver) == expected
    assert dataclasses.replace(half, norm=1.5, radius=1.25).evaluations_of(solver) is None


def test_proving_leaves_a_model_in_training_as_it_is() -> None:
    model = MDEQClassifier(TOYS["scaled"].model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    proof = prove(model)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert proof.evaluation is not None
    assert proof.evaluation == eq.certify(model.eval()) == eq.certify(model)


def rewrite(path: pathlib.Path, **changes: Any) -> None:
    tensors, facts = files.read_tensors(path)
    files.write_tensors(path, tensors, {**facts, **changes})


def test_a_file_whose_weights_prove_less_than_it_claims_is_refused(saved: pathlib.Path) -> None:
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


def test_a_file_whose_solver_was_told_a_smaller_constant_is_refused(saved: pathlib.Path) -> None:
    rewrite(saved, solver=to_plain(eq.Picard(lipschitz=0.01)))
    with pytest.raises(CheckpointError, match=r"is not what it says: the solver of the DEQ was given lipschitz=0\.01"):
        load(saved)
    model = MDEQClassifier(TOYS["tight"].model, solver=eq.Picard(lipschitz=0.1))  # starts at 0.8 * 0.5
    with pytest.raises(CertificateError, match=r"given lipschitz=0\.1, and the weights prove 0\.\d+ only"):
        train.save(model, saved)


def test_files_without_a_certificate_are_still_read(tmp_path: pathlib.Path) -> None:
    """As versions before certificates wrote them, without `contraction` in the configuration, too."""
    train.save(MDEQClassifier(FULL.model), tmp_path / "model")
    tensors, facts = files.read_tensors(tmp_path / "model")
    del facts["certificate"], facts["config"]["init_args"]["contraction"]
    files.write_tensors(tmp_path / "model", tensors, facts)
    assert load(tmp_path / "model").config == FULL.model
    plain = to_plain(PLAIN)
    del plain["model"]["init_args"]["contraction"]
    assert from_plain(TrainConfig, plain, CLASSES) == PLAIN


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
def test_a_run_does_not_start_with_a_constant_that_its_layers_may_exceed(
    config: TrainConfig, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(CertificateError, match=message):
        fit(config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dropout_counts_in_training_alone() -> None:
    config = zoo.contracting(PLAIN, ScaledLayers())
    assert PLAIN.model.dropout > 0
    assert config.eval_solver is not None
    evaluated = getattr(config.eval_solver, "lipschitz")  # noqa: B009, a field of the two solvers of the policy alone
    check_claims(config)
    with pytest.raises(CertificateError, match=r"^solver.lipschitz"):
        check_claims(dataclasses.replace(config, solver=dataclasses.replace(config.solver, lipschitz=evaluated)))
    lower = dataclasses.replace(config.eval_solver, lipschitz=0.99 * evaluated)
    with pytest.raises(CertificateError, match=r"^eval_solver.lipschitz"):
        check_claims(dataclasses.replace(config, eval_solver=lower))


@pytest.mark.slow
def test_power_iteration_meets_the_bound_of_the_trained_weights_every_epoch(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_what_a_parametrisation_remembers_is_copied_and_not_averaged() -> None:
    model = MDEQClassifier(TOYS["scaled"].model)
    average = Average(model, 0.9)
    kernel, vector, slack = (
        f"deq.cell.blocks.0.conv1.parametrizations.weight.{name}" for name in ("original", "0.vector", "0.slack")
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name in (kernel, vector, slack):
            model.state_dict()[name].mul_(2)
    average.update(model, 10**6)
    torch.testing.assert_close(average.values[kernel], 1.1 * before[kernel])
    for name in (vector, slack):
        assert torch.equal(average.values[name], 2 * before[name])


@pytest.mark.slow
def test_a_proof_that_fails_at_the_end_does_not_cost_the_model(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CertificateError("nothing is proved")

    monkeypatch.setattr(loop, "certified", fail)
    with pytest.raises(CertificateError, match="nothing is proved"):
        fit(dataclasses.replace(TOYS["tight"], stop_after=1), run_dir=tmp_path)
    assert eq.certify(load(tmp_path / "model.safetensors")).contracts


def test_a_model_in_half_precision_is_told_so() -> None:
    model = MDEQClassifier(TOYS["scaled"].model).bfloat16().eval()
    assert model(torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16)).isfinite().all()
    with pytest.raises(CertificateError, match=r"original is torch.bfloat16, which rounds more .* use model.float\(\)"):
        eq.certify(model)
    assert eq.certify(model.float()).contracts


def test_layers_are_part_of_the_configuration(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(TOYS["tight"], model=dataclasses.replace(TOYS["tight"].model))
    plain = to_plain(config)
    assert plain["model"]["init_args"]["contraction"]["class_path"] == "equipoise.zoo.SLLLayers"
    assert from_plain(TrainConfig, plain, CLASSES) == config
    plain["model"]["init_args"]["contraction"]["init_args"]["cieling"] = 0.5
    with pytest.raises(ValueError, match=r"unknown key 'model.contraction.cieling'; did you mean 'ceiling'"):
        from_plain(TrainConfig, plain, CLASSES)
    plain["model"]["init_args"]["contraction"] = {"class_path": "SLLLayer", "init_args": {}}
    with pytest.raises(ValueError, match=r"model.contraction: unknown class 'SLLLayer'; did you mean 'SLLLayers'"):
        from_plain(TrainConfig, plain, CLASSES)
    plain["model"]["init_args"]["contraction"] = {"class_path": "SLLLayers", "init_args": {"ceiling": 1.0}}
    with pytest.raises(ValueError, match=r"ceiling=1\.0: must be > 0 and < 1"):
        from_plain(TrainConfig, plain, CLASSES)
    assert isinstance(config.model.contraction, SLLLayers)


def test_a_model_with_the_solver_of_its_certificate_is_saved(tmp_path: pathlib.Path) -> None:
    """The constant is that of evaluation; with dropout the weights prove less, which is no reason to lose the model."""
    config = dataclasses.replace(zoo.lipschitz_digits().model, dropout=0.3)
    model = MDEQClassifier(config).eval()
    model.deq.solver = eq.certify(model).solver()
    train.save(model, tmp_path / "model")
    stored = checkpoint.describe(tmp_path / "model")["certificate"]
    assert stored["training"]["norm"] > stored["evaluation"]["norm"]
    assert load(tmp_path / "model").deq.solver == model.deq.solver


def test_nothing_is_promised_in_bf16() -> None:
    config = dataclasses.replace(TOYS["scaled"], precision="bf16-mixed")
    model = MDEQClassifier(config.model, solver=config.solver).float().eval()
    found = certified(model, config.data.load().test, config, torch.device("cpu"))
    assert found["certified_lipschitz"] is None
    assert "bf16" in found["not_certified"]


def test_a_bound_is_rounded_up() -> None:
    facts = dict.fromkeys(FACTS) | {"certified_lipschitz": 0.99961, "predicted_evaluations": 3}
    assert "L = 0.9997" in summarize(facts)


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (
            "Cell has no method block_matrix(training) that bounds it; define one",
            "(training) that bounds it",
        ),
        ("its layers may expand (cap=1.2; lower it)", "may expand (cap=1.2)"),
        ("bf16-mixed rounds more than a proof allows", "more than a proof allows"),
    ],
)
def test_the_line_of_what_is_not_certified_closes_its_parentheses(reason: str, line: str) -> None:
    assert summarize({"not_certified": reason}).endswith(line)
