"""`equipoise certify`: what it proves, what it observes, its exit codes, and what other commands say of a proof."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

import pytest
import torch
from toy import PLAIN, Interrupt, Interrupted, contracting_toys
from toy import command_line as main

import equipoise as eq
from equipoise.train import fit
from equipoise.zoo.files import load

pytestmark = pytest.mark.slow  # the runs are trained first


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in {**contracting_toys(), "plain": PLAIN}.items():
        result = fit(dataclasses.replace(config, stop_after=2), run_dir=folder / name)
        assert config.model.contraction is None or result.test["certified_lipschitz"] < 1
    return folder


@pytest.fixture(autouse=True)
def _user_defaults(runs: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "110")


def json_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, json.loads(captured.out)


@pytest.mark.parametrize("kind", contracting_toys())
def test_it_proves_predicts_and_observes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = json_of(capsys, "certify", kind, "--rtol", "1e-4")
    assert code == 0
    assert found["certified"]
    model = load(pathlib.Path(kind, "model.safetensors"))
    for mode in ("evaluation", "training"):
        certificate = eq.certify(model, training=mode == "training")
        shown = found[mode]
        assert shown["block_matrix"] == [list(row) for row in certificate.block_matrix]
        assert (shown["norm"], shown["radius"]) == (certificate.norm, certificate.radius)
        assert found["predicted"][mode] == certificate.solver(rtol=1e-4).max_steps
    assert 0 < found["evaluation"]["tightness"] <= 1
    assert found["images"] == 15
    for way in ("forward", "backward"):
        seen = found["observed"][way]
        assert seen["converged"] == 1
        assert 1 < seen["mean"] <= seen["most"] <= found["predicted"]["evaluation"]
    looser = json_of(capsys, "certify", kind, "--rtol", "0.1", "--images", "3")[1]
    assert looser["images"] == 3
    assert looser["predicted"]["evaluation"] < found["predicted"]["evaluation"]
    assert looser["observed"]["forward"]["mean"] < found["observed"]["forward"]["mean"]


def test_people_read_matrices_numbers_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "scaled"]) == 0
    text = capsys.readouterr().out
    certificate = eq.certify(load("scaled/model.safetensors"))
    for value in (certificate.norm, certificate.radius, *(entry for row in certificate.block_matrix for entry in row)):
        assert f"{value:.4f}" in text
    assert "ScaledLayers(slope=0.8" in text
    assert "largest norm of the Jacobian at 15 images" in text
    assert "certified: every input has one equilibrium, and each step of plain iteration brings the distance" in text
    assert f"down to {certificate.norm:.1%} at most" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 110


def test_without_images_nothing_is_measured_and_no_data_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toy.Toy.load", None)
    code, found = json_of(capsys, "certify", "tight", "--images", "0")
    assert code == 0
    assert (found["images"], found["observed"], found["evaluation"]["measured"]) == (0, None, None)
    assert main(["certify", "tight", "--images", "0"]) == 0
    assert "certified: every input" in capsys.readouterr().out


def test_a_model_that_is_not_certified_says_why_and_gives_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "deq.cell.blocks.0.conv1 (Conv2d: its norm is not bounded, and depends on the size of the image"
    code, found = json_of(capsys, "certify", "plain")
    assert code == 1
    assert not found["certified"]
    assert found["reason"].startswith(reason)
    assert (found["evaluation"], found["predicted"], found["observed"]) == (None, {}, None)
    assert main(["certify", "plain"]) == 1
    assert f"not certified: {reason}" in " ".join(capsys.readouterr().out.split())


def test_an_expanding_map_is_shown_and_not_certified(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    layers = contracting_toys()["scaled"].model.contraction
    assert layers is not None
    model = dataclasses.replace(
        PLAIN.model, contraction=dataclasses.replace(layers, slope=1.0, update=1.0, exchange=1.0, cap=4.0)
    )
    fit(dataclasses.replace(PLAIN, model=model, stop_after=1), run_dir=tmp_path / "run")
    code, found = json_of(capsys, "certify", str(tmp_path / "run"))
    assert code == 1
    assert found["evaluation"]["norm"] > 1
    assert found["predicted"] == {"evaluation": None, "training": None}
    assert main(["certify", str(tmp_path / "run")]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "not certified: the map is not proved to contract: the block matrix has radius" in text
    assert "no bound" in text


def test_models_alone_and_unfinished_runs_are_certified(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "alone").mkdir()
    for name in ("model.safetensors", "config.yaml"):
        shutil.copy(pathlib.Path("tight", name), tmp_path / "alone")
    code, found = json_of(capsys, "certify", str(tmp_path / "alone"))
    assert (code, found["evaluation"]) == (0, json_of(capsys, "certify", "tight")[1]["evaluation"])
    config = dataclasses.replace(contracting_toys()["tight"], checkpoint_every=1)
    with pytest.raises(Interrupted):
        fit(config, run_dir=tmp_path / "half", observer=Interrupt(3))
    assert main(["certify", str(tmp_path / "half")]) == 0
    assert "the run is not finished: its checkpoint at step 2 is used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("certify",), 2, "name the run folder first: equipoise certify RUN"),
        (("certify", "tight", "--images", "-1"), 2, "--images -1: must be >= 0"),
        (("certify", "tight", "--rtol", "0"), 2, "--rtol 0: must be > 0"),
        (("certify", "tight", "--rtoll", "1"), 2, "unknown flag --rtoll; did you mean --rtol?"),
        (("certify", "nowhere"), 1, "nowhere is not a run folder: it has no config.yaml"),
        (
            ("evaluate", "tight", "--solver", "Picard", "--solver.lipschitz", "0.1"),
            1,
            "the solver of the DEQ was given lipschitz=0.1, and the weights prove 0.",
        ),
    ],
)
def test_mistakes(words: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(f"equipoise: error: {message}")
    assert captured.err.count("\n") == 1


def test_evaluation_tells_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "tight"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    norm = eq.certify(load("tight/model.safetensors")).norm
    assert f"certificate contracts: L = {math.ceil(norm * 1e4) / 1e4:.4g} (measured 0." in text
    assert "% tight), at most " in text
    assert main(["evaluate", "plain"]) == 0
    assert "certificate not certified: deq.cell.blocks.0.conv1 (Conv2d: " in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )


def test_help_has_the_exit_codes_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "--help"]) == 0
    text = capsys.readouterr().out
    assert "The exit code is 0 if the map is proved to contract in evaluation, and 1 if not." in text
    assert "equipoise certify runs/demo --images 200 --rtol 1e-6" in text
    assert main(["--help"]) == 0
    assert "  certify    " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--model.contraction", "SLLLayer"),
            "--model.contraction: unknown class 'SLLLayer'; did you mean 'SLLLayers'?",
        ),
        (
            ("--model.contraction", "SLLLayers", "--model.contraction.cieling", "1"),
            "unknown flag --model.contraction.cieling; did you mean --model.contraction.ceiling?",
        ),
        (
            ("--model.contraction", "ScaledLayers", "--model.contraction.weights", "softmx"),
            "--model.contraction.weights: expected one of 'softmax', 'uniform', got softmx",
        ),
        (
            ("--model.contraction", "SLLLayers", "--model.contraction.ceiling", "much"),
            "--model.contraction.ceiling: expected float, got much",
        ),
        (
            ("--model.contraction", "SLLLayers"),
            "dropout=0.1 has no place in SLLLayers, whose blocks would expand; set it to 0",
        ),
        (("--eval_solver", "Picard", "--eval_solver.max_steps", "x"), "--eval_solver.max_steps: expected int, got x"),
    ],
)
def test_misspelt_layers(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mdeq-digits", *flags, "--print_config"]) == 2
    assert capsys.readouterr().err == f"equipoise: error: {message}\n"


def test_layers_by_flags_and_files(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    flags = ("--model.contraction", "SLLLayers", "--model.contraction.ceiling", "0.8", "--model.dropout", "0")
    assert main(["train", "mdeq-digits", *flags, "--print_config"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert (
        main(["train", "--config", str(tmp_path / "mine.yaml"), "--model.contraction.start", "0.6", "--print_config"])
        == 0
    )
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    position = lines.index("class_path: equipoise.zoo.SLLLayers")
    assert lines[position + 1 : position + 4] == ["init_args:", "ceiling: 0.8", "start: 0.6"]
    assert main(["train", "lipschitz-digits", "--model.contraction", "null", "--print_config"]) == 0
    assert "contraction: null" in capsys.readouterr().out
