"""The command line before anything runs: help texts, flags for every field, and what is said to mistakes."""

import dataclasses
import importlib.metadata
import pathlib
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from console import PREFIX, Console
from PIL import Image
from toy import CLASSES, contracting_toys, read_config

import equipoise as eq
from equipoise import cli, report, zoo
from equipoise.cli import train as training
from equipoise.data import HubImages, ImageData
from equipoise.train import SGD, LRSchedule, ModelConfig, Optimizer, Pretraining, TrainConfig, fit
from equipoise.train.serialize import from_plain, members, to_plain
from equipoise.zoo import Classify, JacobianPenalty, MDEQConfig, SkipPenalty

COMMANDS = ("recipes", "train", "evaluate", "certify", "predict", "reconstruct", "report")
LETTERS = {"True": "true", "False": "false", "None": "null"}


def flags_of(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a plain configuration as a flag and its value; a class before its fields."""
    for key, value in plain.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "class_path" in value:
            yield f"--{name}", value["class_path"].rpartition(".")[2]
            yield from flags_of(value["init_args"], f"{name}.")
        elif isinstance(value, dict):
            yield from flags_of(value, f"{name}.")
        elif key not in ("name", "observe"):
            yield f"--{name}", LETTERS.get(str(value), str(value).replace("'", "").replace(" ", ""))


@pytest.mark.slow
def test_version(console: Console) -> None:
    text = f"equipoise {eq.__version__}\n"
    assert console.out("--version") == text
    called = subprocess.run([sys.executable, "-m", "equipoise", "--version"], capture_output=True, text=True)
    assert (called.returncode, called.stdout, called.stderr) == (0, text, "")
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="equipoise")
    assert script.load() is cli.main


def test_help(console: Console) -> None:
    text = console.out("--help")
    assert all(re.search(rf"^  {command} +\w", text, re.MULTILINE) for command in COMMANDS)
    assert console.out(code=2) == text


def test_help_of_train(console: Console) -> None:
    text = console.out("train", "--help")
    fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"name"}
    assert fields <= set(re.findall(r"^  --(\w+)[. ]", text, re.MULTILINE))
    task = console.out("train", "--task.help", "Classify")
    for nested, where in ((LRSchedule, text), (Pretraining, task), (JacobianPenalty, task), (SkipPenalty, task)):
        shown = set(re.findall(r"^  --[\w.]+\.(\w+) ", where, re.MULTILINE))
        assert {field.name for field in dataclasses.fields(nested)} <= shown
    assert max(len(line) for line in text.splitlines() if not line.startswith("  equipoise")) <= 112
    assert not re.search(r"\bNone\b", text)  # a flag is written null
    assert "mdeq-imagenet-xl" in text
    assert "[0.002" not in text.split("--optimizer ")[0]
    assert "In brackets: the values of mdeq-digits" in text


def test_help_of_recipe(console: Console) -> None:
    text = console.out("train", "mdeq-fashion-mnist", "--help")
    assert "In brackets: the values of mdeq-fashion-mnist" in text
    assert re.search(r"--epochs int .*\[5\]", text)


@pytest.mark.parametrize("command", COMMANDS[2:])
def test_help_of_commands(command: str, console: Console) -> None:
    text = console.out(command, "--help")
    assert text.startswith(f"usage: equipoise {command} RUN")
    assert "examples:\n" in text


PYTHON_ONLY = ("observe", "outer_loss", "pairs")  # functions and tensors


@pytest.mark.parametrize("family", [eq.Solver, eq.Gradient, Optimizer, ImageData, ModelConfig])
def test_help_of_classes(family: type, console: Console) -> None:
    flag = {ImageData: "data", ModelConfig: "model"}.get(family, family.__name__.lower())
    classes = members(family, zoo.CLASSES)
    assert len(classes) >= 2
    for name, cls in classes.items():
        text = console.out("train", f"--{flag}.help", name)
        for field in dataclasses.fields(cls):
            assert (f"--{flag}.{field.name} " in text) == (field.name not in PYTHON_ONLY), (name, field.name)
        assert "$" not in text.replace("$EQUIPOISE_DATA", ""), name  # no TeX


def parsed(text: str) -> TrainConfig:
    content = yaml.safe_load(text)
    assert content.pop("version") == eq.__version__
    found: TrainConfig = from_plain(TrainConfig, content, CLASSES)
    return found


@pytest.mark.slow
def test_examples_of_help(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    """Evaluation and prediction run; training and reports, which have tests of their own, are only asked for.

    So has `reconstruct`, which needs a run of a decoder.
    """
    texts = [console.out(*command, "--help") for command in ((), *((command,) for command in COMMANDS))]
    lines = [line for text in texts for line in re.findall(r"^  ((?:equipoise|torchrun) .*)", text, re.MULTILINE)]
    lines = [line for line in lines if not line.startswith("equipoise reconstruct")]
    assert len(lines) >= 18
    demo = contracting_toys()["tight"]  # one that is certified
    fit(demo, run_dir="runs/demo")
    pathlib.Path("scans").mkdir()
    for name in ("digit.png", "scan1.png", "scan2.png", "scans/a.png"):
        Image.new("L", (4, 4), 90).save(name)
    asked: list[tuple[TrainConfig, dict[str, Any]]] = []

    def record(config: TrainConfig, **details: Any) -> Any:
        asked.append((config, details))
        return types.SimpleNamespace(run_dir=details["run_dir"])

    monkeypatch.setattr(training, "fit", record)
    monkeypatch.setattr(report, "write_report", lambda folder, **_: pathlib.Path(folder, "report.html"))
    for line in lines:
        words = shlex.split(line)
        words = words[words.index("equipoise") + 1 :]
        if ">" in words:
            pathlib.Path(words[-1]).write_text(console.out(*words[:-2]))
        else:
            assert console.out(*words), line
    configs = [config for config, _ in asked]
    assert dataclasses.replace(zoo.mdeq_digits(), seed=1) in configs  # of the file that an example wrote
    assert demo in configs  # `--config runs/demo/config.yaml` and `--resume`
    assert {str(details["run_dir"]) for _, details in asked} >= {"runs/demo", "runs/again", "runs/mdeq-digits-1"}
    assert [details["resume"] for _, details in asked].count(True) == 1


def test_flags_of_all_fields(console: Console) -> None:
    """A configuration in which no field is as in the recipe, given by flags alone."""
    base = zoo.mdeq_digits()
    target = TrainConfig(
        name=base.name,
        data=HubImages(
            source="a/b",
            root="somewhere",
            train_split="x",
            test_split="y",
            image_size=16,
            image_channels=3,
            resize=20,
            in_memory=False,
            streaming=True,
            num_train=7,
            num_workers=3,
            crop_padding=2,
            flip=True,
            mean=(0.1, 0.2, 0.3),
            std=(0.5, 0.6, 0.7),
        ),
        model=MDEQConfig(
            image_size=16,
            image_channels=3,
            num_classes=4,
            channels=(8, 8, 16),
            num_downsamplings=1,
            expansion=3,
            num_groups=2,
            dropout=0.3,
            post_norm_affine=True,
            head_channels=(2, 3, 4),
            final_channels=12,
            predictor=True,
            explicit_steps=2,
        ),
        solver=eq.Anderson(max_steps=5, rtol=1e-4, atol=1e-6, patience=3, memory=2, mixing=0.5, ridge=0.1, growth=2.0),
        gradient=eq.Implicit(solver=eq.Broyden(max_steps=6, rtol=1e-5, memory=4), start=eq.Neumann(steps=2)),
        eval_solver=eq.Picard(max_steps=3),
        task=Classify(
            pretraining=Pretraining(steps=1, depth=2),
            penalty=JacobianPenalty(
                weight=0.5, probability=0.25, num_probes=2, growth=0.1, growth_every=10, stop_epoch=3
            ),
            skip=SkipPenalty(weight=0.1, decay=0.9, per_scale=False, detach_target=True),
            label_smoothing=0.1,
        ),
        optimizer=SGD(lr=0.1, weight_decay=0.01, momentum=0.8, nesterov=False),
        schedule=LRSchedule(warmup_steps=4, final_lr=1e-3),
        epochs=3,
        stop_after=9,
        batch_size=10,
        eval_batch_size=11,
        clip_norm=1.5,
        ema_decay=0.99,
        seed=5,
        precision="64-true",
        accelerator="cpu",
        devices=2,
        num_nodes=3,
        strategy="ddp",
        channels_last=True,
        compile_cell=True,
        deterministic=True,
        log_every=7,
        checkpoint_every=8,
        tensorboard=False,
    )
    plain, before = to_plain(target), to_plain(base)
    # Fields that are null by default and stay so; flags cannot say it of a class inside a class, see below.
    silent = {"--gradient.solver.patience"}
    assert [key for key in plain if plain[key] == before[key]] == ["name"]
    words = [word for pair in flags_of(plain) if pair[0] not in silent for word in pair]
    text = console.out("train", "mdeq-digits", *words, "--print-config")
    assert parsed(text) == target
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    joined = [f"{flag}={value}" for flag, value in zip(dashed[::2], dashed[1::2], strict=True)]
    assert console.out("train", "mdeq-digits", "--print_config", *joined) == text


def test_null_in_nested_class(console: Console) -> None:
    words = ("--gradient", "Implicit", "--gradient.solver", "Broyden", "--gradient.solver.patience", "null")
    console.out("train", "mdeq-digits", *words, "--print-config")


@pytest.mark.parametrize(
    "recipe",
    [
        recipe if recipe in ("mdeq-digits", "mdeq-imagenet-xl") else pytest.param(recipe, marks=pytest.mark.slow)
        for recipe in sorted(training.RECIPES)
    ],
)
def test_print_config(recipe: str, console: Console) -> None:
    text = console.out("train", recipe, "--print-config")
    file = pathlib.Path("mine.yaml")
    file.write_text(text)
    assert read_config(file) == training.RECIPES[recipe]()
    assert console.out("train", "--config", "mine.yaml", "--print_config") == text
    assert recipe in console.out("recipes")


def test_precedence(console: Console) -> None:
    pathlib.Path("part.yaml").write_text("epochs: 3\nseed: 4\noptimizer: {class_path: Adam, init_args: {lr: 1e-2}}\n")
    text = console.out("train", "mdeq-digits", "--config", "part.yaml", "--seed", "5", "--print-config")
    found = parsed(text)
    assert (found.epochs, found.seed, found.optimizer.lr, found.batch_size) == (3, 5, 0.01, 64)


def test_change_of_class(console: Console) -> None:
    words = ("--solver", "LBFGS", "--gradient", "Implicit", "--optimizer", "SGD", "--data", "Digits")
    found = parsed(console.out("train", "mdeq-digits", *words, "--print-config"))
    assert found.solver == eq.LBFGS(max_steps=18, rtol=1e-2)
    assert found.optimizer == SGD(lr=2e-3)
    assert found.gradient == eq.Implicit()


DIGITS = ("train", "mdeq-digits")
MISTAKES = {
    "command": (("trian",), "unknown command 'trian'; did you mean 'train'?"),
    "recipe": (("train", "mdeq-digit"), "unknown recipe 'mdeq-digit'; did you mean 'mdeq-digits'?"),
    "nothing to train": (("train",), r"name a recipe \(mdeq-digits, .*--config FILE or --resume"),
    "superfluous word": ((*DIGITS, "extra"), "unrecognized arguments: extra"),
    "recipes": (("recipes", "all"), "recipes takes no arguments, got 'all'"),
    "flag": ((*DIGITS, "--epoch", "3"), "unknown flag --epoch; did you mean --epochs?"),
    "own flag": ((*DIGITS, "--run-dri", "x"), "unknown flag --run_dri; did you mean --run-dir?"),
    "nested flag": (
        (*DIGITS, "--solver.max-step=3"),
        "unknown flag --solver.max_step; did you mean --solver.max_steps?",
    ),
    "strange flag": ((*DIGITS, "--xyzzy", "3"), "unknown flag --xyzzy; --help lists all"),
    "field of another class": ((*DIGITS, "--solver.mixing", "1"), "--solver.mixing; .*--solver.*memory"),
    "field of the old class": (
        (*DIGITS, "--solver", "Picard", "--gradient", "Implicit", "--solver.min_denominator", "1"),
        "unknown flag --solver.min_denominator",
    ),
    "class": ((*DIGITS, "--solver", "Broydn"), "--solver: unknown class 'Broydn'; did you mean 'Broyden'?"),
    "nested class": ((*DIGITS, "--gradient", "Implicit", "--gradient.solver", "Andersn"), "Ander.*"),
    "class of help": (("train", "--solver.help", "Andersen"), "unknown class 'Andersen'; did you mean 'Anderson'?"),
    "foreign class": ((*DIGITS, "--optimizer", "subprocess.Popen"), "--optimizer: unknown class 'Popen'"),
    "range": ((*DIGITS, "--epochs", "0"), r"epochs=0\)?: must be >= 1"),
    "nested range": ((*DIGITS, "--optimizer.lr", "-1"), "lr=-1.0: must be > 0"),
    "share": ((*DIGITS, "--task.penalty.probability", "2"), r"task.penalty.probability=2.0: must be >= 0 and <= 1"),
    "type": ((*DIGITS, "--epochs", "three"), "epochs must be int, got 'three'"),
    "type or null": ((*DIGITS, "--clip_norm", "None"), "clip_norm must be float, got 'None'"),
    "nested type": ((*DIGITS, "--solver.memory", "2.5"), "solver.memory must be int, got 2.5"),
    "list": ((*DIGITS, "--model.channels", "16,32"), "model.channels must be a list, got '16,32'"),
    "choice": ((*DIGITS, "--precision", "fp16"), "precision is 'fp16'; choose one of .*'bf16-mixed'"),
    "no value": ((*DIGITS, "--epochs"), "--epochs: expected one argument"),
    "no file": ((*DIGITS, "--config"), "--config: expected one argument"),
    "fields that do not fit": (
        (*DIGITS, "--solver", "Anderson"),
        "Shine reads .* use the solver Broyden, or the gradient",
    ),
    "image size": (
        (*DIGITS, "--model.image_size", "16"),
        r"images of shape \(1, 8, 8\), the model takes \(1, 16, 16\)",
    ),
    "resume where": (("train", "--resume"), "--resume needs --run-dir FOLDER"),
    "resume and overwrite": ((*DIGITS, "--run-dir", "x", "--resume", "--overwrite"), "give one of them"),
    "evaluate what": (("evaluate",), "arguments are required: RUN; usage: equipoise evaluate RUN"),
    "predict with what": (
        ("predict", "--top", "2"),
        "arguments are required: RUN, IMAGE; usage: ",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, console: Console) -> None:
    words, pattern = MISTAKES[mistake]
    assert re.search(pattern, console.error(*words, code=2))
    assert not any(pathlib.Path().iterdir())


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("epoch: 3\n", "unknown key 'epoch'; did you mean 'epochs'?"),
        (
            "solver: {class_path: Broyden, init_args: {memroy: 3}}\n",
            "unknown key 'solver.memroy'; did you mean 'memory'?",
        ),
        ("solver: {class_path: os.system, init_args: {}}\n", "unknown class 'os.system'"),
        ("solver: {class_path: equipoise.Andersn}\n", "did you mean 'Anderson'?"),
        ("epochs: three\n", "epochs must be int, got 'three'"),
        ("epochs: 0\n", r"epochs=0\)?: must be >= 1"),
        ("- 1\n", "must hold the fields of a configuration, got list"),
        ("", "must hold the fields of a configuration, got NoneType"),
        ("epochs: [1\nseed: 2", "not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not valid YAML.*could not determine a constructor"),
        ("\x00", "not valid YAML"),
    ],
)
def test_mistakes_in_files(content: str, pattern: str, console: Console) -> None:
    pathlib.Path("bad.yaml").write_text(content)
    said = console.error("train", "mdeq-digits", "--config", "bad.yaml", "--print-config", code=2)
    assert re.search(rf"bad\.yaml.*{pattern}", said)


def test_missing_file(console: Console) -> None:
    for name, reason in (("nowhere.yaml", "No such file"), (".", "Is a directory")):
        assert f"{name}: {reason}" in console.error("train", "--config", name, code=2)


def test_debug(console: Console) -> None:
    with pytest.raises(ValueError, match="unknown flag --epoch"):
        console.out("--debug", "train", "mdeq-digits", "--epoch", "3")
    with pytest.raises(ValueError, match="not a run folder"):
        console.out("evaluate", "nowhere", "--debug")
    assert console.error("evaluate", "nowhere") == "nowhere is not a run folder: it has no config.yaml"


def test_unexpected_error(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    monkeypatch.setattr(training, "recipes", lambda *_: (_ for _ in ()).throw(RuntimeError("first\nsecond")))
    assert console.error("recipes") == "RuntimeError: first second (--debug shows the traceback)"


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["rich", "docstring_parser", "lightning_fabric", "sklearn"])
def test_missing_package(missing: str, tmp_path: pathlib.Path) -> None:
    """In a process of its own, where nothing is imported yet."""
    program = f"""
import sys
sys.modules[{missing!r}] = None
from equipoise.cli import main
sys.exit(main(["train", "mdeq-digits", "--run-dir", "run"]))
"""
    called = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert called.returncode == 1
    extra = "data" if missing == "sklearn" else "train"
    assert re.fullmatch(rf"{PREFIX}.*pip install 'equipoise\[.*{extra}.*\]'\n", called.stderr), called.stderr
    assert not (tmp_path / "run").exists()
