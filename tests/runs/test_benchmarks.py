"""Benchmarks run in their quick setting and write what they promise; their figures are not judged here."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
OMNIGLOT = pathlib.Path(os.environ.get("EQUIPOISE_DATA") or ROOT.parent / "shared/data") / "omniglot"
METHODS = {
    "picard": ("forward_ratio", "evals", "seconds", "peak_states"),
    "anderson": ("forward_ratio", "evals", "seconds", "peak_states"),
    "broyden": ("forward_ratio", "evals", "seconds", "peak_states"),
    "implicit": ("backward_ratio", "cosine"),
    "shine": ("backward_ratio", "cosine"),
    "jacobian-free": ("backward_ratio", "cosine"),
    "torchdeq-picard": ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine"),
    "torchdeq-anderson": ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine"),
    "torchdeq-broyden": ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine"),
}


@pytest.mark.slow
def test_solver_cost(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torchdeq")
    target = tmp_path / "cost.json"
    command = [sys.executable, "-m", "benchmarks.solver_cost.run", "--quick", "--json", str(target)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(target.read_text())
    for method, keys in METHODS.items():
        for key in keys:
            assert f"tanh/{method}/{key}" in figures
    # What is counted, not timed, is the same on every machine.
    assert figures["tanh/anderson/evals"] <= 34
    assert figures["tanh/anderson/peak_states"] <= 20
    assert figures["tanh/broyden/peak_states"] <= 28
    assert figures["tanh/implicit/cosine"] > 0.9999
    assert figures["mixed/easy_steps"] < figures["mixed/hard_steps"] / 3
    assert figures["mixed/row_evaluations_ratio"] < 0.7


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_backward_cost(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    target, picture = tmp_path / "backward.json", tmp_path / "backward.png"
    command = [
        sys.executable,
        "-m",
        "benchmarks.backward_cost.run",
        "--quick",
        "--json",
        str(target),
        "--plot",
        str(picture),
    ]
    early = subprocess.run([*command, "--show"], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert early.returncode == 2
    assert f"--show: {target} does not exist" in early.stderr
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(target.read_text())["figures"]
    for variant in ("original/full", "original/1", "jfb/0", "jfb/1", "shine/0", "shine/1", "shine-opa/0"):
        for key in ("test_accuracy", "backward_ms", "backward_ratio", "vjps", "cosine", "radius_median"):
            assert f"digits/{variant}/{key}" in figures
    # What is counted, not timed, is the same on every machine.
    assert [figures[f"digits/{variant}/vjps"] for variant in ("jfb/0", "shine/0", "shine-opa/0")] == [0, 0, 0]
    assert [figures[f"digits/{variant}/1/vjps"] for variant in ("original", "jfb", "shine")] == [2, 2, 2]
    assert 2 < figures["digits/original/full/vjps"] <= 21
    assert figures["digits/jfb/full/cosine"] > figures["digits/jfb/0/cosine"]
    assert {f"digits/{variant}/fallback_rate" for variant in ("shine/0", "shine-opa/0")} <= figures.keys()
    assert picture.stat().st_size > 10_000

    # A record that is complete is neither trained nor measured again; one of another setting is not mixed with it.
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert json.loads(target.read_text())["figures"] == figures
    other = subprocess.run([*command, "--threads", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert "threads" in other.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inversion_quality(tmp_path: pathlib.Path) -> None:
    for package in ("matplotlib", "sklearn", "lightning_fabric"):
        pytest.importorskip(package)
    target, plot = tmp_path / "quality.json", tmp_path / "quality.png"
    command = [
        sys.executable,
        "-m",
        "benchmarks.inversion_quality.run",
        "--quick",
        "--json",
        str(target),
        "--plot",
        str(plot),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(target.read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"quality.json", "quality.png"}
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
def test_bilevel_speed(tmp_path: pathlib.Path) -> None:
    for module in ("optuna", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    target, picture = tmp_path / "speed.json", tmp_path / "plots" / "speed.png"
    command = [sys.executable, "-m", "benchmarks.bilevel.run", "--quick", "--json", str(target), "--plot", str(picture)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(target.read_text())
    searches = ("grid", "random", "sklearn-cv", "optuna-tpe")
    gradients = ("shine", "shine-opa", "shine-refine", "hoag", "hoag-limited", "jacobian-free")
    for method in (*searches, *gradients, "shine/hoag-step", "hoag/hoag-step"):
        for key in ("seconds_to_1pct", "grad_evals_to_1pct", "solved_loss", "test_loss"):
            assert f"breast-cancer/{method}/{key}" in figures
        assert 0 < figures[f"breast-cancer/{method}/final_loss"] < 30
    # SHINE pays for no product with the Hessian.
    for rule in ("", "/hoag-step"):
        steps = figures["runs"]["breast-cancer"]["0"]
        shine, hoag = (steps[f"{method}{rule}"]["visits"][0][1] for method in ("shine", "hoag"))
        assert shine < hoag
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lipschitz_speed(tmp_path: pathlib.Path) -> None:
    for package in ("matplotlib", "sklearn", "lightning_fabric"):
        pytest.importorskip(package)
    target, picture = tmp_path / "lipschitz.json", tmp_path / "lipschitz.png"
    script = "benchmarks.lipschitz.run"
    command = [sys.executable, "-m", script, "--quick", "--json", str(target), "--plot", str(picture)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(target.read_text())
    certified = [f"lipschitz-s{slope}" for slope in (0.2, 0.4, 0.6, 0.8, 1.0)]
    certified += [f"tight-{ceiling}" for ceiling in (0.5, 0.7, 0.9)]
    keys = ("test_accuracy", "train_step_ratio", "inference_ratio", "evals_forward", "evals_backward")
    for variant in ("mdeq", "mdeq-jacobian", "mdeq-shine", *certified):
        for key in (*keys, "converged_fraction", "certified_L"):
            assert f"{variant}/{key}" in figures
    for variant in certified:
        assert figures[f"{variant}/certified_L"] < 1
        assert 0 < figures[f"{variant}/tightness"] <= 1
        assert figures[f"{variant}/converged_fraction"] == 1
        assert figures[f"{variant}/evals_ratio"] < figures["mdeq/evals_ratio"] / 3
    assert figures["mdeq/certified_L"] is None
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_continuous_skip(tmp_path: pathlib.Path) -> None:
    for package in ("matplotlib", "sklearn", "torchdiffeq", "rich"):
        pytest.importorskip(package)
    target, picture = tmp_path / "skip.json", tmp_path / "skip.png"
    command = [sys.executable, "-m", "benchmarks.continuous.run", "--quick", "--data", "mnist", "multiscale", "--json"]

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)

    early = run(str(target), "--show")
    assert early.returncode != 0
    assert "does not exist" in early.stderr
    # Trained here, timed elsewhere.
    trained = run(str(tmp_path / "trained.json"), "--train-only")
    assert trained.returncode == 0, trained.stderr
    timed = run(str(target), "--add", str(tmp_path / "trained.json"), "--time-only", "--plot", str(picture))
    assert timed.returncode == 0, timed.stderr
    assert "as accurate" in timed.stdout
    figures = json.loads(target.read_text())
    keys = ("test_accuracy", "nfe", "backward_vjps", "train_step_ratio_to_node", "train_step_ratio_to_vanilla")
    models = ("vanilla", "skip", "skip-reg")
    grid = [
        f"mnist/{m}-{s}{j}" for m in models for s in ("anderson", "broyden", "vcab3", "tsit5") for j in ("", "-jac")
    ]
    grid += [f"multiscale/{m}-{s}" for m in models for s in ("broyden", "vcab3")]
    for variant in grid:
        for key in (*keys, "median_residual"):
            assert figures[f"{variant}/{key}"] >= 0
        if "/vanilla" in variant:
            assert figures[f"{variant}/train_step_ratio_to_vanilla"] == 1
    for data in ("mnist", "multiscale"):
        assert figures[f"{data}/node/train_step_ratio_to_node"] == 1
        assert figures[f"{data}/node/median_residual"] is None
        assert figures[f"{data}/node/backward_vjps"] > 3
        assert "torch" in figures["runs"][data]["node"]["0"]["machine"]
        assert len(figures["times"][data]["0"]["node_ms"]) == 8
    assert {f"mnist/skip{r}-vcab3-w0.1/nfe" for r in ("", "-reg")} <= figures.keys()
    # Predictor and final application are counted: the solve itself takes one evaluation at the least.
    assert figures["mnist/skip-anderson/nfe"] >= 3
    assert picture.stat().st_size > 10_000

    # What is there is not done again; a record of another setting is not mixed with it.
    again = run(str(target))
    assert again.returncode == 0, again.stderr
    assert json.loads(target.read_text())["runs"] == figures["runs"]
    other = run(str(target), "--multiscale", "cifar10")
    assert other.returncode != 0
    assert "choose another FILE" in other.stderr


@pytest.mark.slow
def test_jiio_inverse(tmp_path: pathlib.Path) -> None:
    for package in ("matplotlib", "skimage", "sklearn", "lightning_fabric"):
        pytest.importorskip(package)
    target, picture = tmp_path / "inverse.json", tmp_path / "inverse.png"
    command = [
        sys.executable,
        "-m",
        "benchmarks.inverse.run",
        "--quick",
        "--data",
        "photographs",
        "--json",
        str(target),
    ]
    command += ["--pictures", str(picture)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(target.read_text())["figures"]
    for task, rival in (("noise-0.1", "tv"), ("noise-0.2", "tv"), ("hole-9", "biharmonic")):
        for method in ("joint", "adam", rival):
            assert 5 < figures[f"{task}/{method}/psnr"] < 60
            assert figures[f"{task}/{method}/ssim"] < 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_jiio_adversarial(tmp_path: pathlib.Path) -> None:
    for package in ("foolbox", "sklearn", "lightning_fabric", "rich"):
        pytest.importorskip(package)
    target = tmp_path / "adversarial.json"
    command = [sys.executable, "-m", "benchmarks.adversarial.run", "--quick", "--data", "digits", "--json", str(target)]

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)

    early = run("--show")
    assert early.returncode != 0
    assert "does not exist" in early.stderr
    done = run("--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    content = json.loads(target.read_text())
    figures = content["figures"]
    for method in ("clean", "joint", "pgd", "pgd-tol"):
        for key in ("accuracy", "foolbox", "joint_attack", "foolbox_long", "foolbox_radius_4"):
            assert 0 <= figures[f"digits/{method}/{key}"] <= 1
    steps = 11
    assert figures["digits/joint/evals"] == figures["digits/joint/vjps"] == steps * 10 * 3  # rounds, and steps of each
    assert figures["digits/pgd/evals"] == steps * 21 * 18
    assert steps * 21 < figures["digits/pgd/vjps"] <= steps * 21 * 18
    assert figures["digits/pgd-tol/evals"] < figures["digits/pgd/evals"]
    assert figures["digits/pgd/foolbox_std"] >= 0
    again = run("--seeds", "0", "1")
    assert again.returncode == 0, again.stderr
    assert json.loads(target.read_text()) == content, "what is there is not done again"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not OMNIGLOT.is_dir(), reason="Omniglot is not at hand")
def test_jiio_meta(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    target, written, picture = (tmp_path / f"meta.{ending}" for ending in ("json", "md", "png"))
    command = [sys.executable, "-m", "benchmarks.few_shot.run", "--quick", "--json", str(target)]
    environment = {**os.environ, "EQUIPOISE_DATA": str(OMNIGLOT.parent)}

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False
        )

    done = run("--table", str(written), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    results = json.loads(target.read_text())["results"]
    assert set(results) == {"jiio", "jiio-first-order", "fomaml", "prototypes", "pixels"}
    for method, seeds in results.items():
        for kind in ("5-way-1-shot", "5-way-5-shot", "20-way-1-shot", "20-way-5-shot"):
            assert 0 <= seeds["0"][kind]["accuracy"] <= 1
        assert 0 <= seeds["0"]["one_shot_runs_error"] <= 1
        assert f"| {method} | 0 |" in written.read_text()
    sizes = [results[method]["0"]["parameters"] for method in ("jiio", "fomaml", "prototypes")]
    assert max(sizes) < 1.02 * min(sizes)
    assert picture.stat().st_size > 1000
    again = run("--methods", "jiio")
    assert again.returncode == 0, again.stderr
    assert "step" not in again.stdout  # what is there is not done again


@pytest.mark.slow
def test_input_optimization(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("sklearn")
    target = tmp_path / "inputs.json"
    command = [sys.executable, "-m", "benchmarks.input_optimization.run", "--quick", "--problem", "generative"]
    run = subprocess.run(
        [*command, "--json", str(target)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(target.read_text())
    for method in ("joint", "gauss-seidel", "nested-2", "automatic", "gd-warm-2", "gd-cold-paper"):
        for key in ("seconds", "evals", "vjps", "speedup_over_cold", "ratio_to_best_warm"):
            assert f"generative/{method}/{key}" in figures
    # What is counted, not timed, is the same on every machine.
    for method, evals, vjps in (("joint", 1, 1), ("gauss-seidel", 1, 2), ("nested-2", 2, 2), ("gd-warm-2", 2, 3)):
        rounds = figures["details"]["generative"][method]["rounds"]
        assert (figures[f"generative/{method}/evals"], figures[f"generative/{method}/vjps"]) == (
            evals * rounds,
            vjps * rounds,
        )
    assert "| automatic |" in target.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_jiio_generative(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("skimage")
    target = tmp_path / "generative.json"
    command = [sys.executable, "-m", "benchmarks.generative.run", "--quick", "--json", str(target)]
    run = subprocess.run(
        [*command, "--pictures", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(target.read_text())["figures"]
    for name in ("jiio", "vae"):
        for key in ("mse", "frechet_reconstructions", "frechet_samples", "parameters"):
            assert figures[f"{name}/{key}"] > 0
    assert figures["vae/parameters"] > figures["jiio/parameters"]
    for task in ("deblur", "superres"):
        # What is counted, not timed, is the same on every machine.
        assert figures[f"{task}/jiio/evals"] < figures[f"{task}/adam/evals"]
        assert figures[f"{task}/jiio/psnr"] > 0
    for name in ("reconstructions", "samples", "deblur", "superres"):
        assert (tmp_path / f"generative-{name}.png").stat().st_size > 100
