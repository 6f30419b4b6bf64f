"""Report of a run: numbers of the log, no network, escaped names."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

import equipoise as eq
from equipoise import zoo
from equipoise.cli import main
from equipoise.data import Digits
from equipoise.report import write_report
from equipoise.report.figures import confusion_map, curve, residual_plot, step_counts, to_svg
from equipoise.report.page import EXAMPLES, examples, render
from equipoise.report.predictions import Predictions, collect_predictions
from equipoise.train import Pretraining, TrainConfig, fit
from equipoise.train.run_folder import read_lines
from equipoise.zoo import Classify, DenseConfig, MDEQConfig
from equipoise.zoo.files import load

pytestmark = pytest.mark.slow  # each test trains: together they take too long for the fast set

CONFIG = dataclasses.replace(
    zoo.mdeq_digits(),
    data=Digits(validation_fraction=0.1),
    model=dataclasses.replace(MDEQConfig.digits(), channels=(4, 8), num_groups=2, head_channels=(1, 2)),
    solver=eq.Broyden(max_steps=8, memory=8, rtol=0.1),
    task=Classify(pretraining=Pretraining(steps=2, depth=2)),
    epochs=2,
    batch_size=256,
    eval_batch_size=100,
    log_every=2,
    tensorboard=False,
)
SECTIONS = ("run", "learning", "training-solver", "test-solver", "predictions", "numbers", "configuration")
EVIL = "<script>alert(1)</script>", "$x^2$ & \"y'", "</svg><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with its report."""
    folder = tmp_path_factory.mktemp("report") / "run"
    fit(CONFIG, run_dir=folder)
    write_report(folder)
    return folder


def test_state_of_one_tensor(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG,
        model=DenseConfig(image_size=8, image_channels=1, num_classes=10, width=8, explicit_steps=1),
        task=Classify(),
        epochs=1,
    )
    fit(config, run_dir=tmp_path / "run")
    text = write_report(tmp_path / "run").read_text()
    assert all(f'id="{section}"' in text for section in SECTIONS)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run once more, to be damaged."""
    return shutil.copytree(run, tmp_path / "run")


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def some_predictions(correct: list[bool], num_classes: int = 3) -> Predictions:
    """Predictions of which these are correct, with distinct confidences."""
    count = len(correct)
    labels = torch.arange(count) % num_classes
    return Predictions(
        images=torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8),
        labels=labels,
        predicted=torch.where(torch.tensor(correct), labels, (labels + 1) % num_classes),
        confidence=(torch.randperm(count) + 1) / (count + 1),
        num_steps=torch.randint(2, 6, (count,)),
        converged=torch.rand(count) < 0.5,
        trace=torch.rand(5, count) + 0.01,
        available=count,
    )


def page_with(run: Path, predictions: Predictions, classes: tuple[str, ...], name: str = "name") -> str:
    """The run's page with other predictions, classes and recipe name."""
    result = json.loads((run / "result.json").read_text()) | {"recipe": name}
    return render(dataclasses.replace(CONFIG, name=name), read_lines(run), result, predictions, classes)


def test_sections_and_titles(run: Path) -> None:
    page = page_of(run)
    assert re.findall(r'<(?:section|details) id="([\w-]+)">', page) == list(SECTIONS)
    assert len(re.findall(r'<figure role="img" aria-label="[^"]{10,}"><h3>[^<]{10,}</h3><svg viewBox=', page)) == 9
    assert page.count("<svg ") == page.count("</svg>") == 9
    assert not list(run.glob(".*.tmp"))


def test_self_contained(run: Path) -> None:
    page = page_of(run)
    assert "http" not in page
    assert "<script" not in page
    targets = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)|url\(([^)]*)", page)
    assert len(targets) > EXAMPLES
    for target in map("".join, targets):
        assert target.startswith(("#", "data:")), target


def test_cards(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    cards = dict(re.findall(r"<div><b>([^<]*)</b><span>([^<]*)</span>", page_of(run)))
    shown = {name: float(value.replace(",", "").removesuffix("%")) for value, name in cards.items()}
    assert shown == {
        "test accuracy": pytest.approx(100 * result["test_accuracy"], abs=0.00501),
        "test loss": pytest.approx(result["test_loss"], abs=0.0000501),
        "solver steps per test sample": pytest.approx(result["mean_steps"], abs=0.0501),
        "of the test samples converged": pytest.approx(100 * result["converged"], abs=0.0501),
        "parameters": result["parameters"],
        "seconds of training and test": pytest.approx(result["seconds"], abs=0.501),
    }


def test_certificate(run: Path) -> None:
    assert "<dt>Certificate</dt><dd>not certified: deq.cell.blocks.0.conv1 (Conv2d: " in page_of(run)
    result = json.loads((run / "result.json").read_text())
    numbers = {"certified_lipschitz": 0.73, "predicted_evaluations": 27, "measured_lipschitz": 0.41, "tightness": 0.56}
    older = {key: value for key, value in result.items() if key not in {*numbers, "not_certified"}}
    for facts, text in (
        (
            {**result, **numbers, "not_certified": None},
            "contracts: L = 0.73 (measured 0.41, 56% tight), at most 27 evaluations, cut at 8",
        ),
        (older, "not computed by the version that made this run; compute it with equipoise certify"),
    ):
        page = render(CONFIG, read_lines(run), facts, some_predictions([True, False]), ("a", "b", "c"))
        assert f"<dt>Certificate</dt><dd>{text}</dd>" in page


def test_epochs(run: Path) -> None:
    page = page_of(run)
    rows = re.findall(
        r"<tr>(<td>.*?)</tr>", page[page.index('id="numbers"') : page.index('id="configuration"')], re.DOTALL
    )
    lines = [line for line in read_lines(run) if line["kind"] == "epoch"]
    assert len(rows) == len(lines) == 5  # training and validation twice, test
    for row, line in zip(rows, lines, strict=True):
        epoch, split, step, *numbers = re.findall("<td>(.*?)</td>", row)
        assert (split, int(step)) == (line["split"], line["step"])
        assert int(epoch) == min(line["epoch"] + 1, 2), "training and validation of an epoch have the same number"
        loss, accuracy, steps, converged, residual, seconds = (float(number.removesuffix("%")) for number in numbers)
        assert loss == pytest.approx(line["loss"], abs=0.000051)
        assert accuracy == pytest.approx(100 * line["accuracy"], abs=0.0051)
        assert steps == pytest.approx(line["mean_steps"], abs=0.0051)
        assert converged == pytest.approx(100 * line["converged"], abs=0.051)
        assert residual == pytest.approx(line["residual"], rel=0.0051)
        assert seconds == pytest.approx(line["seconds"], abs=0.051)


@pytest.mark.parametrize("name", ["loss", "accuracy", "mean_steps", "converged", "residual", "backward_share"])
def test_curves(run: Path, name: str) -> None:
    lines = read_lines(run)
    (axes,) = curve(lines, name, "label", fixed=2, scale="log" if name == "residual" else "linear").axes
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert set(drawn) == ({"training"} if name == "backward_share" else {"training", "validation", "test"})
    for label, points in drawn.items():
        split, kind = ("train", "step") if label == "training" else (label, "epoch")
        chosen = [line for line in lines if (line["split"], line["kind"]) == (split, kind)]
        values = [x["backward_seconds"] / x["seconds"] if name == "backward_share" else x[name] for x in chosen]
        assert np.array_equal(points, np.column_stack([[x["step"] for x in chosen], values]))
        assert len(points)


def test_predictions_match_evaluation(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    model, test = load(run / "model.safetensors"), CONFIG.data.load().test
    predictions = collect_predictions(model, test, CONFIG, max_images=1000)
    assert predictions.available == len(test) == len(predictions.labels)
    assert float(predictions.correct.double().mean()) == pytest.approx(result["test_accuracy"])
    assert float(predictions.num_steps.double().mean()) == pytest.approx(result["mean_steps"])
    assert float(predictions.converged.double().mean()) == pytest.approx(result["converged"])
    # The answer is the best iterate and the trace ends at the last one: on this map they agree for most images.
    assert torch.equal((~predictions.trace.isnan()).sum(0), predictions.num_steps)
    part = collect_predictions(model, test, CONFIG, max_images=130)
    assert len(part.labels) == part.trace.shape[1] == 130
    assert part.available == len(test)
    assert not torch.equal(part.labels, predictions.labels[:130])  # a folder per class would give one class only


def test_traces(run: Path) -> None:
    model, test = load(run / "model.safetensors").double(), CONFIG.data.load().test
    config: TrainConfig = dataclasses.replace(CONFIG, eval_solver=eq.Picard(max_steps=4, rtol=0), precision="64-true")
    model.deq.gradient = eq.JacobianFree()  # Picard keeps no inverse for SHINE
    predictions = collect_predictions(model, test, config, max_images=7)
    u = model.stem(CONFIG.data.prepare(predictions.images).double())
    z, points = model.deq.cell.zeros(u), []  # type: ignore[union-attr, operator]
    with torch.no_grad():
        for _ in range(4):
            fz = model.deq.cell(z, u)
            points.append(tuple(torch.cat([x.flatten(1) for x in state], 1) for state in (z, fz)))
            z = fz
    residuals = torch.stack([(fz - z).norm(dim=1) for z, fz in points])
    best = residuals.argmin(0)
    size = torch.stack([points[step][0][row].float().norm() for row, step in enumerate(best.tolist())])
    torch.testing.assert_close(predictions.trace.double(), residuals / size.double(), rtol=1e-5, atol=0)


def test_quantiles() -> None:
    nan, inf = torch.nan, torch.inf
    trace = torch.tensor([[8.0, 4.0, 2.0, nan], [1.0, nan, 3.0, inf], [nan, nan, 5.0, nan]])
    predictions = dataclasses.replace(some_predictions([True] * 4), trace=trace)
    # sorted: (2, 4, 8, inf), (1, 3, 4, inf), (1, 4, 5, inf); the 90 % quantile is never finite
    assert np.array_equal(predictions.quantiles(), [[2, 1, 1], [4, 3, 4], [nan] * 3], equal_nan=True)
    (axes,) = residual_plot(predictions, rtol=0.1).axes
    median = next(line for line in axes.lines if line.get_label() == "median")
    assert np.array_equal(median.get_xydata(), [[1, 4], [2, 3], [3, 4]])
    assert next(line for line in axes.lines if line.get_label() == "tolerance").get_ydata() == [0.1, 0.1]


@pytest.mark.parametrize("spread", [1, 4, 300])
def test_histogram(spread: int) -> None:
    predictions = some_predictions([True] * 50)
    predictions = dataclasses.replace(predictions, num_steps=3 + torch.randint(spread, (50,)))
    (axes,) = step_counts(predictions).axes
    converged, others = axes.containers
    assert sum(bar.get_height() for bar in converged) == int(predictions.converged.sum())
    assert sum(bar.get_height() for bar in others) == int((~predictions.converged).sum())
    if spread == 4:
        heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_y() + bar.get_height() for bar in others}
        numbers, counts = predictions.num_steps.unique(return_counts=True)
        assert {n: heights[n] for n in numbers.tolist()} == dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def test_confusion_equals_scikit_learn() -> None:
    predictions = some_predictions([True, False, True, False, False, True, True], num_classes=4)
    expected = confusion_matrix(predictions.labels, predictions.predicted, labels=range(5))
    counts = predictions.confusion(5)
    assert np.array_equal(counts, expected)
    (axes,) = confusion_map(counts, ("a", "b", "c", "d", "never")).axes
    drawn = {(int(t.get_position()[1]), int(t.get_position()[0])): int(t.get_text()) for t in axes.texts}
    assert drawn == {(i, j): expected[i, j] for i, j in np.argwhere(expected)}


@pytest.mark.parametrize("mistakes", [0, 1, 5, 24, 40])
def test_order_of_examples(mistakes: int) -> None:
    predictions = some_predictions([i >= mistakes for i in range(50)])
    shown = examples(predictions, ("a", "b", "c"))
    assert [x["correct"] for x in shown] == [False] * min(mistakes, EXAMPLES) + [True] * (EXAMPLES - mistakes)
    assert all((x["predicted"] == x["label"]) == x["correct"] for x in shown)
    sure = [int(x["confidence"].removesuffix("%")) for x in shown]
    assert sure[:mistakes] == sorted(sure[:mistakes], reverse=True)
    assert sure[mistakes:] == sorted(sure[mistakes:])
    assert sure[0] == round(
        100 * float(predictions.confidence[:mistakes].max() if mistakes else predictions.confidence.min())
    )


def test_names_are_escaped(run: Path) -> None:
    predictions = some_predictions([True, False, True, False, True, True])
    page = page_with(run, predictions, EVIL, name="<b>bold</b>")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>bold" not in page
    assert "<h1>&lt;b&gt;bold&lt;/b&gt;</h1>" in page
    assert "true: &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<h2>2 mistakes on 6 test images</h2>" in page
    assert ">$x^2$ &amp; \"y'</text>" in page  # in the matrix: no formula


@pytest.mark.parametrize("num_classes", [20, 21])
def test_matrix_of_many_classes(num_classes: int) -> None:
    counts = some_predictions([i % 3 > 0 for i in range(90)], num_classes=num_classes).confusion(num_classes)
    svg = to_svg(confusion_map(counts, [f"class-{i}" for i in range(num_classes)]), "title")
    assert (">class-7</text>" in svg) == (num_classes <= 20)


def test_unfinished_run(copy: Path) -> None:
    """The same model, without the files that the end of a run writes: all but the time and the banner are the same."""

    def cards() -> dict[str, str]:
        return {name: value for value, name in re.findall(r"<div><b>([^<]*)</b><span>([^<]*)</span>", page_of(copy))}

    finished = cards()
    assert "Not finished" not in page_of(copy)
    for name in ("result.json", "model.safetensors"):
        (copy / name).unlink()
    write_report(copy)
    notice = "Not finished: the curves are of the training so far, all else is of the checkpoint at step 10 of 10."
    assert f"<p><b>{notice}</b></p>" in page_of(copy)
    seconds = "seconds of training and test"
    assert {**cards(), seconds: ""} == {**finished, seconds: ""}
    assert page_of(copy).count("<svg ") == 9


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_key(path: Path) -> None:
    content = json.loads(path.read_text())
    del content["mean_steps"]
    path.write_text(json.dumps(content))


def test_run_without_result_and_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints")
    assert main(["report", str(copy)]) == 1
    assert "has neither a result nor a checkpoint to report on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.yaml", Path.unlink, "not a run folder: it has no config.yaml"),
        ("config.yaml", lambda path: path.write_text("name: [\n"), "config.yaml is not valid YAML"),
        ("result.json", truncate, "metrics.jsonl or result.json is damaged"),
        ("result.json", without_key, "metrics.jsonl or result.json is damaged .*'mean_steps'"),
        ("metrics.jsonl", Path.unlink, "metrics.jsonl or result.json is damaged"),
        ("metrics.jsonl", lambda path: path.write_text("[1, 2]\n"), "metrics.jsonl or result.json is damaged"),
        ("model.safetensors", Path.unlink, "model.safetensors does not exist"),
        ("model.safetensors", truncate, "model.safetensors is truncated, damaged"),
    ],
)
def test_damaged_run(
    copy: Path,
    name: str,
    damage: Callable[[Path], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = page_of(copy)
    damage(copy / name)
    assert main(["report", str(copy)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("equipoise: error: ")
    assert error.count("\n") == 1 or "YAML" in message  # which shows the place
    assert page_of(copy) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: RUN; usage: equipoise report RUN"),
        (["nowhere"], "nowhere is not a run folder"),
        (["RUN", "--images", "0"], "--images 0: must be >= 1"),
        (["RUN", "--image", "3"], "unknown flag --image"),
    ],
)
def test_usage_errors(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *(str(run) if argument == "RUN" else argument for argument in arguments)]) in (1, 2)
    assert message in capsys.readouterr().err


def test_number_of_images(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(copy), "--images", "50"]) == 0
    assert capsys.readouterr().out == f"report {copy / 'report.html'}\n"
    assert "on 50 of 359 test images" in page_of(copy)


def test_deterministic(copy: Path) -> None:
    before = page_of(copy)
    assert write_report(copy) == copy / "report.html"
    assert page_of(copy) == before


@pytest.mark.parametrize("case", ["installed", "missing", "declined"])
def test_report_after_training(
    run: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "missing":
        for name in [name for name in sys.modules if name.startswith("equipoise.report")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(eq, "report", raising=False)
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = tmp_path / "new"
    arguments = ["train", "--config", str(run / "config.yaml"), "--run-dir", str(folder), "--stop_after", "2"]
    assert main([*arguments, *(["--no-report"] if case == "declined" else [])]) == 0
    out = capsys.readouterr().out
    assert (folder / "report.html").exists() == (case == "installed")
    assert (f"report {folder / 'report.html'}\n" in out) == (case == "installed")
    remedy = "a report needs matplotlib: pip install 'equipoise[report]'"
    assert (f"\nno report: {remedy}\n" in out) == (case == "missing")
    if case == "missing":
        assert main(["report", str(run)]) == 1
        assert capsys.readouterr().err == f"equipoise: error: {remedy}\n"


PROBE = """<script>
addEventListener("load", () => {
const boxes = [...document.querySelectorAll("svg")].map(svg =>
  [...svg.querySelectorAll("text")].filter(t => !(t.getAttribute("transform") || "").includes("rotate(-40"))
    .map(t => [t.textContent, t.getBoundingClientRect()]));
const overlaps = [];
for (const texts of boxes) for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
  const [a, b] = [texts[i][1], texts[j][1]];
  if (a.left < b.right && b.left < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom)
    overlaps.push(texts[i][0] + " / " + texts[j][0]);
}
const found = {
  width: innerWidth, scroll: document.documentElement.scrollWidth, overlaps: overlaps,
  texts: boxes.flat().length, scripts: document.scripts.length,
  broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length, images: document.images.length,
  requests: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  sections: [...document.querySelectorAll("section, details")].filter(s => s.offsetHeight > 40).map(s => s.id),
  title: document.querySelector("h1").textContent,
  small: [...document.querySelectorAll("svg text")].filter(t => t.getBoundingClientRect().height < 6).length,
};
parent.document.title = JSON.stringify(found);
})</script>"""


@pytest.mark.parametrize("width", [1200, 420])
@pytest.mark.parametrize("classes", ["digits", "evil"])
def test_browser(run: Path, tmp_path: Path, width: int, classes: str) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    name = CONFIG.name if classes == "digits" else "<b>bold</b>"
    evil = some_predictions([True, False, True, False, True, True])
    page = page_of(run) if classes == "digits" else page_with(run, evil, EVIL, name)
    path = tmp_path / "page.html"
    # In a frame, because windows have a least width.
    inner = html.escape(page.replace("</body>", PROBE + "</body>"))
    frame = f'<iframe width={width} height=2000 style="border: 0" srcdoc="{inner}"></iframe>'
    path.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}</body>', encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--window-size=1300,2100", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert match is not None, done.stdout[:500]
    found = json.loads(html.unescape(match[1]))
    assert found["title"] == name
    assert found["sections"] == list(SECTIONS)
    assert found["scroll"] <= found["width"] == width
    assert found["overlaps"] == []
    assert found["small"] == 0
    assert found["texts"] > 100
    assert found["broken"] == 0
    assert found["images"] == (EXAMPLES if classes == "digits" else 6)
    assert found["requests"] == []
    assert found["scripts"] == 1  # the probe
