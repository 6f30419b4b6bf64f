"""`equipoise certify`: proofs, observations and exit codes, and the proofs that other commands print."""

import dataclasses
import math
import pathlib
import shutil

import pytest
from console import Console
from toy import PLAIN, Interrupt, Interrupted, contracting_toys

import equipoise as eq
from equipoise.train import fit
from equipoise.zoo.files import load

pytestmark = pytest.mark.slow  # the runs are trained first

TOYS = contracting_toys()
REASON = "deq.cell.blocks.0.conv1 (Conv2d: its norm is not bounded, and depends on the size of the image"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of each kind, one whose map expands, a model alone, and a run that is not finished."""
    folder = tmp_path_factory.mktemp("runs")
    layers = dataclasses.replace(TOYS["scaled"].model.contraction, slope=1.0, update=1.0, exchange=1.0, cap=4.0)
    expanding = dataclasses.replace(PLAIN, model=dataclasses.replace(PLAIN.model, contraction=layers))
    for name, config in {**TOYS, "plain": PLAIN, "expanding": expanding}.items():
        result = fit(dataclasses.replace(config, stop_after=2), run_dir=folder / name)
        assert name not in TOYS or result.test["certified_lipschitz"] < 1
    (folder / "alone").mkdir()
    for name in ("model.safetensors", "config.yaml"):
        shutil.copy(folder / "tight" / name, folder / "alone")
    with pytest.raises(Interrupted):
        fit(dataclasses.replace(TOYS["tight"], checkpoint_every=1), run_dir=folder / "half", observer=Interrupt(3))
    return folder


@pytest.mark.parametrize("kind", TOYS)
def test_certify(kind: str, console: Console) -> None:
    (found,) = console.json("certify", kind, "--rtol", "1e-4")
    assert found["certified"]
    model = load(pathlib.Path(kind, "model.safetensors"))
    for mode in ("evaluation", "training"):
        certificate, shown = eq.certify(model, training=mode == "training"), found[mode]
        assert shown["block_matrix"] == [list(row) for row in certificate.block_matrix]
        assert (shown["norm"], shown["radius"]) == (certificate.norm, certificate.radius)
        assert found["predicted"][mode] == certificate.solver(rtol=1e-4).max_steps
    assert 0 < found["evaluation"]["tightness"] <= 1
    for seen in (found["observed"][way] for way in ("forward", "backward")):
        assert seen["converged"] == 1
        assert 1 < seen["mean"] <= seen["most"] <= found["predicted"]["evaluation"]
    (looser,) = console.json("certify", kind, "--rtol", "0.1", "--images", "3")
    assert (found["images"], looser["images"]) == (15, 3)
    assert looser["predicted"]["evaluation"] < found["predicted"]["evaluation"]
    assert looser["observed"]["forward"]["mean"] < found["observed"]["forward"]["mean"]


def test_certify_table(console: Console) -> None:
    text = console.out("certify", "scaled")
    certificate = eq.certify(load("scaled/model.safetensors"))
    for value in (certificate.norm, certificate.radius, *(entry for row in certificate.block_matrix for entry in row)):
        assert f"{value:.4f}" in text
    flat = " ".join(text.split())
    for words in (
        "ScaledLayers(slope=0.8",
        "largest norm of the Jacobian at 15 images",
        "certified: every input has one equilibrium, and each step of plain iteration brings the distance",
        f"down to {certificate.norm:.1%} at most",
    ):
        assert words in flat
    assert max(map(len, text.splitlines())) <= 110


def test_certify_without_images(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toy.Toy.load", None)
    (found,) = console.json("certify", "tight", "--images", "0")
    assert (found["images"], found["observed"], found["evaluation"]["measured"]) == (0, None, None)
    assert "certified: every input" in console.out("certify", "tight", "--images", "0")


def test_not_certified(console: Console) -> None:
    (found,) = console.json("certify", "plain", code=1)
    assert found["reason"].startswith(REASON)
    facts = [found[name] for name in ("certified", "evaluation", "predicted", "observed")]
    assert facts == [False, None, {}, None]
    assert f"not certified: {REASON}" in console.flat("certify", "plain", code=1)


def test_expanding_map(console: Console) -> None:
    (found,) = console.json("certify", "expanding", code=1)
    assert found["evaluation"]["norm"] > 1
    assert found["predicted"] == {"evaluation": None, "training": None}
    text = console.flat("certify", "expanding", code=1)
    assert "not certified: the map is not proved to contract: the block matrix has radius" in text
    assert "no bound" in text


def test_certify_parts_of_runs(console: Console) -> None:
    alone, run = (console.json("certify", name)[0]["evaluation"] for name in ("alone", "tight"))
    assert alone == run
    assert "the run is not finished: its checkpoint at step 2 is used" in console.out("certify", "half")


TIGHT = ("certify", "tight")
LIPSCHITZ = ("evaluate", "tight", "--solver", "Picard", "--solver.lipschitz", "0.1")
DIGITS = ("train", "mdeq-digits", "--print_config")
LAYERS = "--model.contraction"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("certify",), 2, "the following arguments are required: RUN; usage: equipoise certify RUN"),
        ((*TIGHT, "--images", "-1"), 2, "--images -1: must be >= 0"),
        ((*TIGHT, "--rtol", "0"), 2, "--rtol 0: must be > 0"),
        ((*TIGHT, "--rtoll", "1"), 2, "unknown flag --rtoll; did you mean --rtol?"),
        (("certify", "nowhere"), 1, "nowhere is not a run folder: it has no config.yaml"),
        (LIPSCHITZ, 1, "the solver of the DEQ was given lipschitz=0.1, and the weights prove 0."),
        ((*DIGITS, LAYERS, "SLLLayer"), 2, f"{LAYERS}: unknown class 'SLLLayer'; did you mean 'SLLLayers'?"),
        (
            (*DIGITS, LAYERS, "SLLLayers", f"{LAYERS}.cieling", "1"),
            2,
            f"unknown flag {LAYERS}.cieling; did you mean {LAYERS}.ceiling?",
        ),
        (
            (*DIGITS, LAYERS, "ScaledLayers", f"{LAYERS}.weights", "softmx"),
            2,
            "model.contraction.weights is 'softmx'; choose one of 'softmax', 'uniform'",
        ),
        (
            (*DIGITS, LAYERS, "SLLLayers", f"{LAYERS}.ceiling", "much"),
            2,
            "model.contraction.ceiling must be float, got 'much'",
        ),
        (
            (*DIGITS, LAYERS, "SLLLayers"),
            2,
            "dropout=0.1 has no place in SLLLayers, whose blocks would expand; set it to 0",
        ),
        (
            (*DIGITS, "--eval_solver", "Picard", "--eval_solver.max_steps", "x"),
            2,
            "eval_solver.max_steps must be int, got 'x'",
        ),
    ],
)
def test_certify_mistakes(words: tuple[str, ...], code: int, message: str, console: Console) -> None:
    assert console.error(*words, code=code).startswith(message)


def test_evaluate_certificate(console: Console) -> None:
    bound = math.ceil(eq.certify(load("tight/model.safetensors")).norm * 1e4) / 1e4
    text = console.flat("evaluate", "tight")
    assert f"certificate contracts: L = {bound:.4g} (measured 0." in text
    assert "% tight), at most " in text
    assert "certificate not certified: deq.cell.blocks.0.conv1 (Conv2d: " in console.flat("evaluate", "plain")


def test_certify_help(console: Console) -> None:
    text = console.out("certify", "--help")
    assert "The exit code is 0 if the map provably contracts in evaluation, and 1 if not." in text
    assert "equipoise certify runs/demo --images 200 --rtol 1e-6" in text


def test_layers_by_flags_and_files(console: Console, tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        console.out(*DIGITS, LAYERS, "SLLLayers", f"{LAYERS}.ceiling", "0.8", "--model.dropout", "0")
    )
    file = ("train", "--config", str(tmp_path / "mine.yaml"))
    text = console.flat(*file, f"{LAYERS}.start", "0.6", "--print_config")
    assert "class_path: equipoise.zoo.SLLLayers init_args: ceiling: 0.8 start: 0.6" in text
    assert "contraction: null" in console.out("train", "lipschitz-digits", LAYERS, "null", "--print_config")
