"""The page: facts, figures and examples in one HTML file that needs no network."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from equipoise.files import write_atomic
from equipoise.models import EquilibriumClassifier
from equipoise.report.answers import Answers, look
from equipoise.report.figures import confusion_map, curve, decay, step_counts, to_svg
from equipoise.train import RunError, TrainConfig, checkpoint, evaluate
from equipoise.train.data import Splits
from equipoise.train.evaluation import summary
from equipoise.train.proof import FACTS, summarize
from equipoise.train.run import config_yaml, folder_config, read_lines
from equipoise.train.tasks import SCORES

EXAMPLES, MIXUPS = 24, 12  # images and rows shown


def write_report(run_dir: str | os.PathLike[str], *, max_images: int = 2000) -> Path:
    """Write `report.html` into the folder of a run, atomically; the page needs no network.

    Args:
        run_dir: folder of the run; of one that is not finished the newest whole checkpoint is looked at.
        max_images: test images to look at; so many are taken at random if there are more.

    Returns:
        Path of the page.

    Raises:
        ValueError: `max_images` is less than 1.
        RunError: the folder holds neither a result nor a checkpoint, or its log or result is damaged.
        CheckpointError: the model is missing or damaged.
        DataError: the data of the run is missing.
    """
    folder = Path(run_dir)
    if max_images < 1:
        raise ValueError(f"max_images={max_images!r}: must be >= 1")
    config = folder_config(folder)
    splits = config.data.load()
    finished = (folder / "result.json").is_file()
    if finished:
        model, state = checkpoint.load(folder / "model.safetensors"), None
    else:
        state, problems = checkpoint.read_newest_state(folder / "checkpoints")
        if state is None:
            raise RunError("; ".join([*problems, f"{folder} has neither a result nor a checkpoint to report on"]))
        model = checkpoint.model_of_state(state, config)
    answers = look(model, splits.test, config, max_images) if isinstance(model, EquilibriumClassifier) else None
    try:
        if state is None:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        else:
            result = _so_far(model, state, splits, config)
        page = render(config, read_lines(folder), result, answers, splits.classes)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RunError(f"{folder}: metrics.jsonl or result.json is damaged or of another version ({what})") from error
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def _so_far(model: Any, state: checkpoint.State, splits: Splits, config: TrainConfig) -> dict[str, Any]:
    """What `result.json` would hold had the run ended at a checkpoint, and that it did not."""
    place = state.facts["place"]
    steps_per_epoch = len(splits.train) // config.batch_size
    tested = evaluate(model, splits.test, config)
    facts = summary(
        config,
        tested,
        {key: tested[key] for key in FACTS},
        steps=place["step"],
        steps_per_epoch=steps_per_epoch,
        seconds=place["seconds"],
        backward_share=place["backward_seconds"] / place["seconds"] if place["seconds"] else 0.0,
        parameters=sum(p.numel() for p in model.parameters()),
        device=next(model.parameters()).device,
        world_size=1,
    )
    total = min(steps_per_epoch * config.epochs, config.stop_after or steps_per_epoch * config.epochs)
    at = f"step {place['step']:,} of {total:,}"
    return {
        **facts,
        "unfinished": f"Not finished: the curves are of the training so far, all else is of the checkpoint at {at}.",
    }


def render(
    config: TrainConfig,
    lines: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    answers: Answers | None,
    classes: Sequence[str],
) -> str:
    """The page as HTML; what it says of single test images is of those of a classifier."""
    epochs = [line for line in lines if line["kind"] == "epoch"]
    scores = [name for name in SCORES if any(name in line for line in epochs)]
    fixed = config.pretraining
    return PAGE.substitute(
        title=_text(result["recipe"]),
        unfinished=f"<p><b>{_text(result['unfinished'])}</b></p>" if "unfinished" in result else "",
        cards="".join(f"<div><b>{_text(value)}</b><span>{name}</span></div>" for name, value in _cards(config, result)),
        facts="".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in _facts(config, result)),
        shaded=f" Shaded: the first {fixed.steps:,} steps, with {fixed.depth} applications of f."
        if fixed.steps
        else "",
        learning=_figures(_learning(config, lines, result)),
        solving=_figures(_solving(config, lines, result)),
        tested="" if answers is None else _tested(config, answers, classes),
        epochs=_table(
            (
                "epoch",
                "split",
                "step",
                "loss",
                *(SCORES[name] for name in scores),
                "solver steps",
                "converged",
                "residual",
                "seconds",
            ),
            [
                (
                    *(x["epoch"] + (x["split"] != "test"), x["split"], x["step"], f"{x['loss']:.4f}"),
                    *(_score(name, x[name]) if name in x else "" for name in scores),
                    *(f"{x['mean_steps']:.2f}", f"{x['converged']:.1%}"),
                    *(f"{x['residual']:.2e}", f"{x['seconds']:.1f}"),
                )
                for x in epochs
            ],
        ),
        config=_text(config_yaml(config)),
    )


def _tested(config: TrainConfig, answers: Answers, classes: Sequence[str]) -> str:
    """The sections on the test images."""
    count, wrong = len(answers.labels), int((~answers.correct).sum())
    some = f"{count:,} test images" if count == answers.available else f"{count:,} of {answers.available:,} test images"
    counts = answers.confusion(len(classes))
    pairs = (counts - counts.diag().diag()).nonzero().tolist()
    mixups = sorted(((int(counts[t, p]), t, p) for t, p in pairs), key=lambda pair: (-pair[0], pair[1:]))
    worst = [f"{classes[t]} is taken for {classes[p]}, {n} of {counts[t].sum()} times" for n, t, p in mixups]
    return TESTED.substitute(
        some=some,
        testing=_figures(_testing(config, answers)),
        wrong="1 mistake" if wrong == 1 else f"{wrong:,} mistakes",
        examples=examples(answers, classes),
        matrix=_figures(
            [(f"Confusion: most often {worst[0]}" if worst else "No confusion", confusion_map(counts, classes))]
        ),
        mixups=_table(
            ("true class", "predicted", "images", "share of the class"),
            [(classes[t], classes[p], n, f"{n / int(counts[t].sum()):.1%}") for n, t, p in mixups[:MIXUPS]],
        ),
    )


def examples(answers: Answers, classes: Sequence[str]) -> str:
    """Images with what the model says: mistakes, the surest first, then right answers, the least sure first."""
    correct, confidence = answers.correct.tolist(), answers.confidence.tolist()
    order = sorted(range(len(correct)), key=lambda i: confidence[i] if correct[i] else -1 - confidence[i])
    return "".join(_example(answers, number, classes) for number in order[:EXAMPLES])


def _score(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "psnr" else f"{value:.2%}"


def _cards(config: TrainConfig, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        *((f"test {SCORES[name]}", _score(name, result[f"test_{name}"])) for name in config.task.scores),
        ("test loss", f"{result['test_loss']:.4f}"),
        ("solver steps per test image", f"{result['mean_steps']:.1f}"),
        ("of the test images converged", f"{result['converged']:.1%}"),
        ("parameters", f"{result['parameters']:,}"),
        ("seconds of training and test", f"{result['seconds']:,.0f}"),
    ]


def _facts(config: TrainConfig, result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("Training", f"{result['steps']:,} steps of {config.batch_size} images ({result['epochs']:.4g} epochs)"),
        ("Task", config.task),
        ("Data", config.data),
        ("Solver", config.solver),
        ("Solver in evaluation", config.eval_solver or "the same"),
        ("Certificate", _certificate(config, result)),
        ("Gradient", config.gradient),
        ("Optimizer", config.optimizer),
        ("Seed", result["seed"]),
        ("Machine", f"{result['device']}, processes: {result['world_size']}, precision {config.precision}"),
        ("Versions", f"equipoise {result['equipoise']}, torch {result['torch']}"),
    ]


def _certificate(config: TrainConfig, result: Mapping[str, Any]) -> str:
    if "not_certified" not in result:
        return "not asked for by the version that made this run; see equipoise certify"
    return summarize(result, (config.eval_solver or config.solver).max_steps)


Titled = list[tuple[str, Figure]]


def _learning(config: TrainConfig, lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Titled:
    end, fixed = _last_epoch(lines), config.pretraining.steps
    return [
        (
            f"Loss: {end['loss']:.3f} in the last epoch of training, {result['test_loss']:.3f} on the test images",
            curve(lines, "loss", "loss", fixed),
        ),
        *(
            (
                f"{SCORES[name].capitalize() if name != 'psnr' else SCORES[name]}: "
                + (f"{_score(name, end[name])} in the last epoch of training, " if name in end else "")
                + f"{_score(name, result[f'test_{name}'])} on the test images",
                curve(lines, name, SCORES[name], fixed, "linear" if name == "psnr" else "percent"),
            )
            for name in config.task.scores
        ),
    ]


def _solving(config: TrainConfig, lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Titled:
    end, fixed = _last_epoch(lines), config.pretraining.steps
    return [
        (
            f"Solver steps: {end['mean_steps']:.1f} per image in the last epoch, at most {config.solver.max_steps}",
            curve(lines, "mean_steps", "solver steps per image", fixed),
        ),
        (
            f"Convergence: {end['converged']:.1%} of the solves met the tolerance in the last epoch",
            curve(lines, "converged", "solves converged", fixed, "percent"),
        ),
        (
            f"Residual: {end['residual']:.2g} on average in the last epoch",
            curve(lines, "residual", "relative residual |f(z) - z| / |z|", fixed, "log"),
        ),
        (
            f"Backward: {result['backward_share']:.0%} of the training time went into gradients",
            curve(lines, "backward_share", "time spent in backward", fixed, "percent"),
        ),
    ]


def _testing(config: TrainConfig, answers: Answers) -> Titled:
    median = answers.quantiles()[1]
    fall = f"falls from {median[0]:.2g} to {median[-1]:.2g} within {len(median)} steps" if len(median) else "is unknown"
    half, done = (
        int(answers.num_steps.median()),
        f"{int(answers.converged.sum()):,} of {len(answers.labels):,} converge",
    )
    return [
        (f"Residual: the median {fall}", decay(answers, (config.eval_solver or config.solver).rtol)),
        (f"Steps: half of the images need at most {half}; {done}", step_counts(answers)),
    ]


def _last_epoch(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    train = [line for line in lines if line["split"] == "train"]
    return ([line for line in train if line["kind"] == "epoch"] or train)[-1]  # none in a run stopped in its first


def _text(value: Any) -> str:
    return html.escape(str(value))


def _figures(figures: Titled) -> str:
    return "".join(
        f'<figure role="img" aria-label="{_text(title)}"><h3>{_text(title)}</h3>{to_svg(figure, title)}</figure>'
        for title, figure in figures
    )


def _example(answers: Answers, number: int, classes: Sequence[str]) -> str:
    pixels = answers.images[number].permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    image.thumbnail((96, 96))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    true, named = (_text(classes[int(labels[number])]) for labels in (answers.labels, answers.predicted))
    return (
        f'<div class="{"right" if answers.correct[number] else "wrong"}"><img alt="test image of class {true}" '
        f'src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        f"<b>{named}</b> {answers.confidence[number]:.0%}<br><span>true: {true}</span></div>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title · equipoise</title><link rel="icon" href="data:,"><style>
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0; background: #f5f6f8; color: #1d2733; font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
main { max-width: 1180px; margin: auto; padding: 24px 16px 48px }
h1 { font-size: 28px; margin: 0; overflow-wrap: anywhere } h2 { font-size: 20px; margin: 0 }
h3 { font-size: 14px; margin: 0 0 8px } p, figure, dl { margin: 0 } figure { min-width: 0 }
p, .facts dt, span, th { color: #5b6673 }
section, details { background: #fff; border: 1px solid #e1e5ea; border-radius: 10px; padding: 20px; margin-top: 16px }
section > p { margin-bottom: 16px; max-width: 80ch }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0 20px }
.cards div { background: #f5f6f8; border-radius: 8px; padding: 12px } .cards b { display: block; font-size: 22px }
.cards span { font-size: 13px }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; font-size: 13.5px }
.facts dd { margin: 0; overflow-wrap: anywhere }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px }
svg { display: block; width: 100%; height: auto } svg text { font-family: inherit !important }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(100px, 10.5%), 1fr)); gap: 12px;
  margin-bottom: 28px }
.examples div { border: 1px solid #e1e5ea; border-top: 3px solid #0072b2; border-radius: 6px; padding: 8px;
  font-size: 13px; overflow-wrap: anywhere } .examples .wrong { border-top-color: #d55e00 } .wrong b { color: #b34700 }
.examples img { display: block; width: 100%; image-rendering: pixelated; margin-bottom: 4px }
.table { overflow-x: auto } table { border-collapse: collapse; font-size: 13.5px; width: 100% }
th { vertical-align: bottom } td { white-space: nowrap }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #e8ebef }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } summary { cursor: pointer; font-weight: 600 }
pre { overflow-x: auto; font-size: 12.5px }
@media (max-width: 600px) { main { padding: 16px 8px } section, details { padding: 16px 12px } }
</style></head><body><main>
<h1>$title</h1><p>A training run of an equilibrium model: what it learned, and how its fixed points were solved.</p>
$unfinished<section id="run"><h2>Run</h2><div class="cards">$cards</div><dl class="facts">$facts</dl></section>
<section id="learning"><h2>Learning</h2><p>Means over the images since the point before.$shaded</p>
<div class="figures">$learning</div></section>
<section id="training-solver"><h2>Solver during training</h2><p>How hard the fixed points were to find while the weights
changed.</p><div class="figures">$solving</div></section>
$tested<details id="numbers"><summary>Numbers by epoch</summary>$epochs</details>
<details id="configuration"><summary>Configuration</summary><pre>$config</pre></details>
</main></body></html>
""")
TESTED = Template("""\
<section id="test-solver"><h2>Solver on $some</h2><p>Every image is its own problem and stops at the tolerance. In
median and quantiles, an image that is done keeps its last residual.</p><div class="figures">$testing</div></section>
<section id="predictions"><h2>$wrong on $some</h2><p>The mistakes first, the surest of them ahead; then right answers,
the least sure ahead. Under each image: predicted class and its probability, true class.</p>
<div class="examples">$examples</div><div class="figures">$matrix<figure><h3>Most frequent mistakes</h3>$mixups</figure>
</div></section>
""")
