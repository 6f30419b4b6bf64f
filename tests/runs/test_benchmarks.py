"""Benchmarks run in their quick setting, and reports read the committed records; times are not judged."""

import importlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import harness

ROOT = pathlib.Path(__file__).parents[2]
OMNIGLOT = pathlib.Path(os.environ.get("EQUIPOISE_DATA") or ROOT.parent / "shared/data") / "omniglot"
RECORDS = sorted((ROOT / "benchmarks").glob("*/results/*.json"))
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Iterator[Run]:
    """Run a benchmark in this process in single precision, by its quick setting; return its record."""

    def call(question: str, *argv: object, out: str = "record.json", needs: tuple[str, ...] = ()) -> dict[str, Any]:
        for package in needs:
            pytest.importorskip(package)
        module = importlib.import_module(f"benchmarks.{question}.run")
        path = tmp_path / out
        module.main([*map(str, argv), "--quick", "--out", str(path)])
        assert path.with_suffix(".md").stat().st_size > 0
        record: dict[str, Any] = json.loads(path.read_text())
        assert record["machine"]["threads"] == 1
        assert record["versions"].keys() >= {"python", "equipoise"}
        return record

    before, environment = torch.get_num_threads(), dict(os.environ)
    torch.set_default_dtype(torch.float32)
    yield call
    torch.set_num_threads(before)
    os.environ.clear()
    os.environ |= environment


def assert_figures(figures: dict[str, Any], names: Iterable[str], *keys: str) -> None:
    """Check that there is each figure of each name."""
    assert {f"{name}/{key}" for name in names for key in keys} <= figures.keys()


@pytest.mark.slow
def test_solver_cost(run: Run) -> None:
    figures = run("solver_cost", needs=("torchdeq",))["figures"]
    solvers, gradients = ("tanh/picard", "tanh/anderson", "tanh/broyden"), ("implicit", "shine", "jacobian-free")
    assert_figures(figures, solvers, "forward_ratio", "evals", "seconds", "peak_states")
    assert_figures(figures, [f"tanh/{name}" for name in gradients], "backward_ratio", "seconds", "cosine")
    for method in ("torchdeq-picard", "torchdeq-anderson", "torchdeq-broyden"):
        for key in ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine"):
            assert figures[f"tanh/{method}/{key}"] > 0
    # Counts are the same on every machine.
    assert figures["tanh/anderson/evals"] <= 34
    assert figures["tanh/anderson/peak_states"] <= 20
    assert figures["tanh/broyden/peak_states"] <= 28
    assert figures["tanh/implicit/cosine"] > 0.9999
    assert figures["mixed/easy_steps"] < figures["mixed/hard_steps"] / 3
    assert figures["mixed/row_evaluations_ratio"] < 0.7


@pytest.mark.slow
def test_backward_cost(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    needs = ("lightning_fabric", "matplotlib", "sklearn")
    record = run("backward_cost", needs=needs)
    figures = record["figures"]
    variants = ("original/full", "original/1", "jfb/0", "jfb/1", "shine/0", "shine/1", "shine-opa/0")
    keys = ("test_accuracy", "backward_ms", "backward_ratio", "vjps", "cosine", "radius_median")
    assert_figures(figures, [f"digits/{variant}" for variant in variants], *keys)
    assert [figures[f"digits/{variant}/0/vjps"] for variant in ("jfb", "shine", "shine-opa")] == [0, 0, 0]
    assert [figures[f"digits/{variant}/1/vjps"] for variant in ("original", "jfb", "shine")] == [2, 2, 2]
    assert 2 < figures["digits/original/full/vjps"] <= 21
    assert figures["digits/jfb/full/cosine"] > figures["digits/jfb/0/cosine"]
    assert {f"digits/{variant}/fallback_rate" for variant in ("shine/0", "shine-opa/0")} <= figures.keys()

    # A record is neither overwritten nor mixed with another setting; a complete one is not measured again.
    assert run("backward_cost", "--resume")["runs"] == record["runs"]
    for flags, message in (([], "add --resume"), (["--resume", "--threads", "2"], "choose another FILE")):
        with pytest.raises(SystemExit):
            run("backward_cost", *flags)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_inversion_quality(run: Run) -> None:
    figures = run("inversion_quality", needs=("matplotlib", "sklearn", "lightning_fabric"))["figures"]
    for search in ("nearly exact", "default"):
        off, aware = (figures[f"lbfgs/{search}, {opa}/prescribed/cosine_median"] for opa in ("OPA off", "OPA 5"))
        assert aware > 0.9999 > off
        assert figures[f"lbfgs/{search}, OPA 5/krylov/cosine_min"] > 0.999999
    for step in (0, 2):
        assert figures[f"mdeq/{step}/reference_images"] > 0
        assert figures[f"mdeq/{step}/reference_residual_adjoint"] < 1e-6
        for name in ("Jacobian-free", "SHINE, adjoint Broyden, OPA 5", "SHINE refined by 5 steps"):
            assert -1 <= figures[f"mdeq/{step}/{name}/cosine"] <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_bilevel(run: Run) -> None:
    record = run("bilevel", needs=("optuna", "sklearn", "matplotlib"))
    searches = ("grid", "random", "sklearn-cv", "optuna-tpe")
    gradients = ("shine", "shine-opa", "shine-refine", "hoag", "hoag-limited", "jacobian-free")
    methods = [f"breast-cancer/{m}" for m in (*searches, *gradients, "shine/hoag-step", "hoag/hoag-step")]
    keys = ("seconds_to_1pct", "grad_evals_to_1pct", "solved_loss", "test_loss")
    assert_figures(record["figures"], methods, *keys)
    assert all(0 < record["figures"][f"{method}/final_loss"] < 30 for method in methods)
    # SHINE takes no product with the Hessian.
    for rule in ("", "/hoag-step"):
        steps = record["runs"]["breast-cancer"]["0"]
        shine, hoag = (steps[f"{method}{rule}"]["visits"][0][1] for method in ("shine", "hoag"))
        assert shine < hoag


@pytest.mark.slow
def test_lipschitz(run: Run) -> None:
    figures = run("lipschitz", needs=("matplotlib", "sklearn", "lightning_fabric"))["figures"]
    keys = ("test_accuracy", "train_step_ratio", "inference_ratio", "evals_forward", "evals_backward")
    variants = ("mdeq", "mdeq-shine", "lipschitz-s0.4", "tight-0.7")
    assert_figures(figures, variants, *keys, "converged_fraction", "certified_L")
    for variant in ("lipschitz-s0.4", "tight-0.7"):
        assert figures[f"{variant}/certified_L"] < 1
        assert 0 < figures[f"{variant}/tightness"] <= 1
        assert figures[f"{variant}/converged_fraction"] == 1
        assert figures[f"{variant}/evals_ratio"] < figures["mdeq/evals_ratio"] / 3
    assert figures["mdeq/certified_L"] is None


@pytest.mark.slow
def test_continuous(run: Run) -> None:
    needs = ("matplotlib", "sklearn", "torchdiffeq")
    data = ("--data", "mnist", "multiscale")
    assert "times" not in run("continuous", *data, "--train-only", needs=needs)
    record = run("continuous", *data, "--time-only", "--resume")
    figures = record["figures"]
    keys = ("test_accuracy", "nfe", "backward_vjps", "train_step_ratio_to_node", "train_step_ratio_to_vanilla")
    for model in ("vanilla", "skip", "skip-reg"):
        for variant in (f"mnist/{model}-vcab3", f"mnist/{model}-vcab3-jac", f"multiscale/{model}-vcab3"):
            for key in (*keys, "median_residual"):
                assert figures[f"{variant}/{key}"] >= 0
    assert figures["mnist/vanilla-vcab3/train_step_ratio_to_vanilla"] == 1
    for kind in ("mnist", "multiscale"):
        assert figures[f"{kind}/node/train_step_ratio_to_node"] == 1
        assert figures[f"{kind}/node/median_residual"] is None
        assert figures[f"{kind}/node/backward_vjps"] > 3
        assert "torch" in record["runs"][kind]["node"]["0"]["machine"]
        assert len(record["times"][kind]["0"]["node_ms"]) == 8
    assert {f"mnist/skip{r}-vcab3-w0.1/nfe" for r in ("", "-reg")} <= figures.keys()
    # Predictor and final application are counted: the solve itself takes one evaluation at the least.
    assert figures["mnist/skip-vcab3/nfe"] >= 3


@pytest.mark.slow
def test_inverse(run: Run, tmp_path: pathlib.Path) -> None:
    picture = tmp_path / "inverse.png"
    argv = ("--data", "photographs", "--pictures", picture)
    figures = run("inverse", *argv, needs=("matplotlib", "skimage", "sklearn", "lightning_fabric"))["figures"]
    for task, rival in (("noise-0.1", "tv"), ("noise-0.2", "tv"), ("hole-9", "biharmonic")):
        for method in ("joint", "adam", rival):
            assert 5 < figures[f"{task}/{method}/psnr"] < 60
            assert figures[f"{task}/{method}/ssim"] < 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_adversarial(run: Run) -> None:
    record = run("adversarial", "--data", "digits", "--seeds", 2, needs=("foolbox", "sklearn", "lightning_fabric"))
    figures, steps = record["figures"], 2
    for method in ("clean", "joint", "pgd", "pgd-tol"):
        for key in ("accuracy", "foolbox", "joint_attack", "foolbox_long", "foolbox_radius_4"):
            assert 0 <= figures[f"digits/{method}/{key}"] <= 1
    assert figures["digits/joint/evals"] == figures["digits/joint/vjps"] == steps * 10 * 3  # rounds, and steps of each
    assert figures["digits/pgd/evals"] == steps * 21 * 18
    assert steps * 21 < figures["digits/pgd/vjps"] <= steps * 21 * 18
    assert figures["digits/pgd-tol/evals"] < figures["digits/pgd/evals"]
    assert record["spread"]["digits/pgd/foolbox"] >= 0


@pytest.mark.slow
@pytest.mark.skipif(not OMNIGLOT.is_dir(), reason="Omniglot is not at hand")
def test_few_shot(run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_DATA", str(OMNIGLOT.parent))
    record = run("few_shot", "--picture", tmp_path / "few-shot.png", needs=("matplotlib",))
    results = record["results"]
    assert set(results) == {"jiio", "jiio-first-order", "fomaml", "prototypes", "pixels"}
    for seeds in results.values():
        for kind in ("5-way-1-shot", "5-way-5-shot", "20-way-1-shot", "20-way-5-shot"):
            assert 0 <= seeds["0"][kind]["accuracy"] <= 1
        assert 0 <= seeds["0"]["one_shot_runs_error"] <= 1
    sizes = [results[method]["0"]["parameters"] for method in ("jiio", "fomaml", "prototypes")]
    assert max(sizes) < 1.02 * min(sizes)
    assert (tmp_path / "few-shot.png").stat().st_size > 1000
    assert run("few_shot", "--methods", "jiio", "--resume")["results"] == results


@pytest.mark.slow
def test_reasoning(run: Run) -> None:
    figures = run("reasoning", needs=("sklearn", "lightning_fabric"))["figures"]
    assert_figures(figures, ("equilibrium", "tied", "plain"), "exact/32", "exact/64", "parameters", "seconds")
    assert_figures(figures, ["equilibrium"], "exact/64-random", "exact/64-first", "converged/64", "curve/32")
    sizes = [figures[f"{name}/parameters"] for name in ("equilibrium", "tied", "plain")]
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.slow
def test_input_optimization(run: Run) -> None:
    record = run("input_optimization", "--problem", "generative", needs=("sklearn",))
    figures = record["figures"]
    methods = ("joint", "gauss-seidel", "nested-2", "automatic", "gd-warm-2", "gd-cold-paper")
    keys = ("seconds", "evals", "vjps", "speedup_over_cold", "ratio_to_best_warm")
    assert_figures(figures, [f"generative/{method}" for method in methods], *keys)
    # Counts are the same on every machine.
    for method, evals, vjps in (("joint", 1, 1), ("gauss-seidel", 1, 2), ("nested-2", 2, 2), ("gd-warm-2", 2, 3)):
        rounds = record["details"]["generative"][method]["rounds"]
        assert figures[f"generative/{method}/evals"] == evals * rounds
        assert figures[f"generative/{method}/vjps"] == vjps * rounds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_generative(run: Run, tmp_path: pathlib.Path) -> None:
    figures = run("generative", "--pictures", tmp_path, needs=("skimage", "sklearn"))["figures"]
    for name in ("jiio", "vae"):
        for key in ("mse", "frechet_reconstructions", "frechet_samples", "parameters"):
            assert figures[f"{name}/{key}"] > 0
    assert figures["vae/parameters"] > figures["jiio/parameters"]
    for task in ("deblur", "superres"):
        assert figures[f"{task}/jiio/evals"] < figures[f"{task}/adam/evals"]
        assert figures[f"{task}/jiio/psnr"] > 0
    for name in ("reconstructions", "samples", "deblur", "superres"):
        assert (tmp_path / f"generative-{name}.png").stat().st_size > 100


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*(?:e[-+]\d+)?", text)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_committed_record(
    path: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of a committed record is the committed one, if that was written in Markdown; figures are drawn."""
    pytest.importorskip("matplotlib")
    harness.report([str(path)])
    report = capsys.readouterr().out
    written = path.with_suffix(".md")
    if written.exists():
        assert report.split() == written.read_text().split()
    else:
        assert len(numbers(report)) > 20
    picture = tmp_path / "figure.png"
    if path.parts[-3] in ("backward_cost", "bilevel", "continuous", "lipschitz", "reasoning"):
        harness.report([str(path), "--plot", str(picture)])
        assert picture.stat().st_size > 10_000
    elif path.parts[-3] != "inversion_quality":  # its figure shows single runs, which old records do not hold
        with pytest.raises(SystemExit):
            harness.report([str(path), "--plot", str(picture)])


def test_summaries() -> None:
    means, spreads = harness.summarize({"a": [{"x": 1, "y": None}, {"x": 3, "y": None, "s": "t"}], "": [{"b/x": 2.0}]})
    assert means == {"a/x": 2, "a/y": None, "b/x": 2}
    assert spreads == {"a/x": 2**0.5}
    columns = {"x": ("title", ".1f")}
    assert harness.figure_table(["a", "b", "c"], columns, means, spreads).splitlines()[2:] == [
        "| a | 2.0 ± 1.4 |",
        "| b | 2.0 |",
    ]


def test_order_of_turns() -> None:
    assert [name for *_, name in harness.in_turn("abc", range(3))] == list("abcbcacab")
