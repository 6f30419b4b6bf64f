"""Report page: facts, figures and examples in one HTML file that needs no network."""

import base64
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from equipoise.data import Splits
from equipoise.files import write_atomic
from equipoise.report.figures import confusion_map, curve, residual_plot, step_counts, to_svg
from equipoise.report.predictions import Predictions, collect_predictions
from equipoise.train import RunError, TrainConfig, checkpoint, evaluate
from equipoise.train.evaluation import summary
from equipoise.train.proof import FACTS, summarize
from equipoise.train.run_folder import config_yaml, read_lines
from equipoise.train.task import SCORES
from equipoise.zoo import CLASSES, EquilibriumClassifier
from equipoise.zoo.files import folder_config, load

EXAMPLES, CONFUSED = 24, 12  # images and rows shown


def format_score(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "psnr" else f"{value:.2%}"


class Missing(StrictUndefined):
    """Key absent from a log or result: using it in any way raises an error that names it."""

    def __format__(self, spec: str) -> str:
        return str(self)


TEMPLATES = Environment(
    loader=PackageLoader("equipoise.report", ""), autoescape=True, undefined=Missing, trim_blocks=True
)
TEMPLATES.globals |= {"SCORES": SCORES, "format_score": format_score}


def write_report(run_dir: str | os.PathLike[str], *, max_images: int = 2000, classes: Iterable[type] = CLASSES) -> Path:
    """Write `report.html` into the folder of a run, atomically; the page needs no network.

    Args:
        run_dir: folder of the run; an unfinished run is reported as of its newest complete checkpoint.
        max_images: test images to classify; a random sample of this size if there are more.
        classes: that the files of the run may name.

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
    config = folder_config(folder, classes=classes)
    splits = config.data.load()
    finished = (folder / "result.json").is_file()
    if finished:
        model, state = load(folder / "model.safetensors", classes=classes), None
    else:
        state, problems = checkpoint.read_newest_state(folder / "checkpoints")
        if state is None:
            raise RunError("; ".join([*problems, f"{folder} has neither a result nor a checkpoint to report on"]))
        model = checkpoint.model_of_state(state, config)
    predictions = None
    if isinstance(model, EquilibriumClassifier):
        predictions = collect_predictions(model, splits.test, config, max_images)
    try:
        if state is None:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        else:
            result = _so_far(model, state, splits, config)
        page = render(config, read_lines(folder), result, predictions, splits.classes)
    except (KeyError, IndexError, TypeError, ValueError, UndefinedError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RunError(f"{folder}: metrics.jsonl or result.json is damaged or of another version ({what})") from error
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def _so_far(model: Any, state: checkpoint.State, splits: Splits, config: TrainConfig) -> dict[str, Any]:
    """Return the content of `result.json` as of a checkpoint, and a note that the run is unfinished."""
    place = state.facts["progress"]
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
    predictions: Predictions | None,
    classes: Sequence[str],
) -> str:
    """Return the page as HTML.

    Args:
        config: of the run.
        lines: of `metrics.jsonl`.
        result: `result.json`, or the same facts about a checkpoint.
        predictions: on test images; None for models that classify nothing.
        classes: names of the classes.
    """
    epochs = [line for line in lines if line["kind"] == "epoch"]
    return TEMPLATES.get_template("page.html.j2").render(
        config=config,
        yaml=config_yaml(config),
        result=result,
        certificate=_certificate(config, result),
        learning=_learning(config, lines, result),
        solving=_solving(config, lines, result),
        tested=None if predictions is None else _tested(config, predictions, classes),
        epochs=epochs,
        scores=[name for name in SCORES if any(name in line for line in epochs)],
    )


def _certificate(config: TrainConfig, result: Mapping[str, Any]) -> str:
    if "not_certified" not in result:
        return "not computed by the version that made this run; compute it with equipoise certify"
    return summarize(result, (config.eval_solver or config.solver).max_steps)


Titled = list[tuple[str, Markup]]  # figures as SVG, with their titles


def _titled(title: str, figure: Figure) -> tuple[str, Markup]:
    return title, Markup(to_svg(figure, title))


def _learning(config: TrainConfig, lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Titled:
    end, fixed = _last_epoch(lines), config.task.pretraining.steps
    figures = [
        _titled(
            f"Loss: {end['loss']:.3f} in the last epoch of training, {result['test_loss']:.3f} on the test samples",
            curve(lines, "loss", "loss", fixed),
        )
    ]
    for name in config.task.scores:
        trained = f"{format_score(name, end[name])} in the last epoch of training, " if name in end else ""
        title = SCORES[name] if name == "psnr" else SCORES[name].capitalize()
        figures.append(
            _titled(
                f"{title}: {trained}{format_score(name, result[f'test_{name}'])} on the test samples",
                curve(lines, name, SCORES[name], fixed, "linear" if name == "psnr" else "percent"),
            )
        )
    return figures


def _solving(config: TrainConfig, lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Titled:
    end, fixed = _last_epoch(lines), config.task.pretraining.steps
    return [
        _titled(
            f"Solver steps: {end['mean_steps']:.1f} per image in the last epoch, at most {config.solver.max_steps}",
            curve(lines, "mean_steps", "solver steps per image", fixed),
        ),
        _titled(
            f"Convergence: {end['converged']:.1%} of the solves met the tolerance in the last epoch",
            curve(lines, "converged", "solves converged", fixed, "percent"),
        ),
        _titled(
            f"Residual: {end['residual']:.2g} on average in the last epoch",
            curve(lines, "residual", "relative residual |f(z) - z| / |z|", fixed, "log"),
        ),
        _titled(
            f"Backward: {result['backward_share']:.0%} of the training time went into gradients",
            curve(lines, "backward_share", "time spent in backward", fixed, "percent"),
        ),
    ]


def _last_epoch(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    train = [line for line in lines if line["split"] == "train"]
    return ([line for line in train if line["kind"] == "epoch"] or train)[-1]  # a run may stop in its first epoch


def _tested(config: TrainConfig, predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Content of the sections on test images."""
    count, wrong = len(predictions.labels), int((~predictions.correct).sum())
    counts = predictions.confusion(len(classes))
    pairs = (counts - counts.diag().diag()).nonzero().tolist()
    confused = sorted(((int(counts[t, p]), t, p) for t, p in pairs), key=lambda pair: (-pair[0], pair[1:]))
    worst = [f"{classes[t]} is taken for {classes[p]}, {n} of {counts[t].sum()} times" for n, t, p in confused]
    title = f"Confusion: most often {worst[0]}" if worst else "No confusion"
    return {
        "images": f"{count:,}{'' if count == predictions.available else f' of {predictions.available:,}'} test images",
        "mistakes": "1 mistake" if wrong == 1 else f"{wrong:,} mistakes",
        "solving": _test_solves(config, predictions),
        "examples": examples(predictions, classes),
        "confusion": [_titled(title, confusion_map(counts, classes))],
        "confused": [(classes[t], classes[p], n, f"{n / int(counts[t].sum()):.1%}") for n, t, p in confused[:CONFUSED]],
    }


def _test_solves(config: TrainConfig, predictions: Predictions) -> Titled:
    median = predictions.quantiles()[1]
    fall = f"falls from {median[0]:.2g} to {median[-1]:.2g} within {len(median)} steps" if len(median) else "is unknown"
    half, done = int(predictions.num_steps.median()), int(predictions.converged.sum())
    return [
        _titled(
            f"Residual: the median {fall}",
            residual_plot(predictions, (config.eval_solver or config.solver).rtol),
        ),
        _titled(
            f"Steps: half of the images need at most {half}; {done:,} of {len(predictions.labels):,} converge",
            step_counts(predictions),
        ),
    ]


def examples(predictions: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return images with their predictions: mistakes, most confident first, then the least confident correct ones."""
    correct, confidence = predictions.correct.tolist(), predictions.confidence.tolist()
    order = sorted(range(len(correct)), key=lambda i: confidence[i] if correct[i] else -1 - confidence[i])
    return [
        {
            "correct": correct[i],
            "predicted": classes[int(predictions.predicted[i])],
            "label": classes[int(predictions.labels[i])],
            "confidence": f"{confidence[i]:.0%}",
            "png": _png(predictions.images[i]),
        }
        for i in order[:EXAMPLES]
    ]


def _png(image: Tensor) -> str:
    """Return a thumbnail in base64."""
    pixels = image.movedim(0, -1).numpy()
    thumbnail = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    thumbnail.thumbnail((96, 96))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
