"""Few-shot tasks of handwritten characters, drawn from Omniglot, which is read from local files.

Source: B. Lake, R. Salakhutdinov, J. Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 2015.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.data import ImageData, Split, Splits, TensorSplit, generator
from equipoise.data.base import TEST_SEED, batch_indices
from equipoise.data.readers import open_image, to_mode, to_tensor
from equipoise.files import DataError, data_root

SIDE = 28  # pixels
BACKGROUND, EVALUATION, RUNS = "images_background", "images_evaluation", "all_runs"
FETCH = "fetch images_background.zip (or the two small ones) and all_runs.zip from github.com/brendenlake/omniglot"

Characters = dict[str, dict[str, Tensor]]  # alphabet, character: uint8 (drawings, 1, 28, 28), ink 255


class Episodes(Split):
    """Tasks drawn from classes: each has random classes under new labels, with support and query images.

    Task number i of an epoch is a function of seed, epoch and i alone, whatever the batch.

    Args:
        classes: uint8 `(n_i, C, H, W)` for each class.
        tasks: in an epoch.
        ways: classes of a task.
        shots: support images of each.
        queries: query images of each.
        rotate: whether each class of a task is rotated by a random multiple of 90 degrees.

    Raises:
        ValueError: there are too few classes, or too few images of one.
    """

    def __init__(
        self, classes: Sequence[Tensor], *, tasks: int, ways: int, shots: int, queries: int, rotate: bool = False
    ) -> None:
        fewest = min(map(len, classes), default=0)
        if len(classes) < ways or fewest < shots + queries:
            raise ValueError(
                f"{len(classes)} classes of at least {fewest} images do not give tasks of {ways} ways, {shots} shots "
                f"and {queries} queries; ask for fewer"
            )
        self.classes, self.tasks, self.rotate = classes, tasks, rotate
        self.ways, self.shots, self.queries = ways, shots, queries

    def __len__(self) -> int:
        return self.tasks

    def batches(
        self,
        size: int,
        *,
        shuffle: tuple[int, int] | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of tasks: uint8 `(b, S + Q, C, H, W)` and int64 `(b, S + Q)`, the support first.

        Args:
            size: tasks per batch, over all devices.
            shuffle: seed and epoch; None: the same tasks every time.
            start: number of the first batch.
            rank: number of this process, which gets every `world_size`-th task of each batch.
            world_size: number of processes.
        """
        place = (TEST_SEED,) if shuffle is None else shuffle
        label = torch.arange(self.ways)
        labels = torch.cat([label.repeat_interleave(self.shots), label.repeat_interleave(self.queries)])
        for numbers in batch_indices(len(self), size, shuffle, start, rank, world_size):
            tasks = [self.task(generator(*place, number)) for number in numbers.tolist()]
            yield torch.stack(tasks), labels.expand(len(tasks), -1)

    def task(self, source: torch.Generator) -> Tensor:
        """Draw the images of a task, `(S + Q, C, H, W)`."""
        support, query = [], []
        for number in torch.randperm(len(self.classes), generator=source)[: self.ways].tolist():
            images = self.classes[number]
            chosen = images[torch.randperm(len(images), generator=source)[: self.shots + self.queries]]
            if self.rotate:
                chosen = chosen.rot90(int(torch.randint(4, (), generator=source)), (2, 3))
            support.append(chosen[: self.shots])
            query.append(chosen[self.shots :])
        return torch.cat(support + query)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Omniglot(ImageData):
    """Few-shot tasks of handwritten characters, 28x28, ink 1 on 0; whole alphabets are held out.

    Training tasks rotate characters by multiples of 90 degrees. Training never includes a character of the official
    one-shot runs, which are of the evaluation alphabets.
    """

    image_batches: ClassVar[bool] = False
    shape = (1, SIDE, SIDE)

    root: str | None = None
    """Folder of the published zip files, or of their content; None: `$EQUIPOISE_DATA/omniglot`."""
    ways: int = 5
    """Classes of a task."""
    shots: int = 1
    """Support images of each class of a task."""
    queries: int = 5
    """Query images of each class of a task."""
    tasks: int = 2000
    """Training tasks in an epoch."""
    held_out_tasks: int = 600
    """Validation tasks, and test tasks."""
    validation_alphabets: tuple[str, ...] = ("Balinese",)
    """Alphabets for validation."""
    test_alphabets: tuple[str, ...] = ("Sanskrit", "Tagalog")
    """Alphabets for the test; none named: all of `images_evaluation`."""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("validation_alphabets", "test_alphabets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_ranges(self, "data.", **dict.fromkeys(("ways", "shots", "queries", "tasks", "held_out_tasks"), ">= 1"))
        if self.validation_fraction or self.crop_padding or self.flip:
            raise ValueError(
                "data: tasks are neither cropped nor mirrored, nor carved by data.validation_fraction; leave these as "
                "they are and name data.validation_alphabets"
            )
        both = set(self.validation_alphabets) & set(self.test_alphabets)
        if both:
            raise ValueError(f"data: {', '.join(sorted(both))} cannot be for validation and for the test; drop one")

    def load(self) -> Splits:
        root = find_root(self.root)
        known = read_alphabets(root, BACKGROUND)
        validation = self._take(known, self.validation_alphabets, root)
        if self.test_alphabets:
            test = self._take(known, self.test_alphabets, root)
        else:
            test = [images for alphabet in read_alphabets(root, EVALUATION).values() for images in alphabet.values()]
        held_out = {*self.validation_alphabets, *self.test_alphabets}
        train = [images for name, alphabet in known.items() if name not in held_out for images in alphabet.values()]
        return Splits(
            self._tasks(train + self.more_classes(), self.tasks, rotate=True),
            self._tasks(validation, self.held_out_tasks) if validation else None,
            self._tasks(test, self.held_out_tasks),
            tuple(str(number) for number in range(self.ways)),
        )

    def more_classes(self) -> list[Tensor]:
        """Return further classes for training, uint8 `(n, 1, 28, 28)` each; a subclass may have some."""
        return []

    def one_shot_runs(self) -> TensorSplit:
        """Read the 20 official runs, of 20 ways and one shot: `(20, 40, 1, 28, 28)` and `(20, 40)`, support first.

        Raises:
            DataError: they are missing or damaged.
        """
        return read_runs(find_root(self.root))

    def _take(self, known: Characters, names: Sequence[str], root: Path) -> list[Tensor]:
        for name in names:
            if name not in known:
                raise DataError(f"{root} has no alphabet {name!r}, but {', '.join(known)}; name some of these")
        return [images for name in names for images in known[name].values()]

    def _tasks(self, classes: Sequence[Tensor], tasks: int, *, rotate: bool = False) -> Episodes:
        try:
            return Episodes(classes, tasks=tasks, ways=self.ways, shots=self.shots, queries=self.queries, rotate=rotate)
        except ValueError as error:
            raise DataError(f"Omniglot: {error}") from error


def find_root(root: str | None) -> Path:
    """Find the folder of Omniglot.

    Raises:
        DataError: there is none.
    """
    shared = data_root()
    folder = Path(root) if root is not None else shared / "omniglot" if shared is not None else None
    if folder is None or not folder.is_dir():
        raise DataError(
            f"no Omniglot in {folder or '$EQUIPOISE_DATA/omniglot'}: {FETCH}, and point --data.root at their folder"
        )
    return folder


def read_alphabets(root: Path, part: str) -> Characters:
    """Read all drawings of a part of Omniglot, by alphabet and character; duplicate alphabets are read once.

    Args:
        root: folder of `<part>*.zip`, of folders `<part>*`, or, for the background, of the alphabets themselves.
        part: `images_background` or `images_evaluation`.

    Raises:
        DataError: there is no such part, or a file is damaged.
    """
    files: dict[tuple[str, str, str], tuple[_Container, str]] = {}  # by alphabet, character and drawing
    for container in map(_Container, sorted(root.glob(f"{part}*")) or ([root] if part == BACKGROUND else [])):
        for name in container.names():
            key = tuple(name.split("/")[-3:])
            if name.endswith(".png") and len(key) == 3:
                files.setdefault(key, (container, name))
    if not files:
        raise DataError(
            f"{root} has no {part}: looked for alphabet/character/drawing.png in {part}*.zip and {part}*; {FETCH}"
        )
    drawings: dict[str, dict[str, list[Tensor]]] = {}
    for (alphabet, character, _), (container, name) in sorted(files.items(), key=lambda item: item[0]):
        drawings.setdefault(alphabet, {}).setdefault(character, []).append(container.drawing(name))
    return {
        alphabet: {character: torch.stack(images) for character, images in characters.items()}
        for alphabet, characters in drawings.items()
    }


def read_runs(root: Path) -> TensorSplit:
    """Read the official one-shot runs, from `all_runs.zip` or a folder `all_runs`.

    Raises:
        DataError: they are missing or damaged.
    """
    path = next((path for path in (root / f"{RUNS}.zip", root / RUNS) if path.exists()), None)
    if path is None:
        raise DataError(f"{root} has no {RUNS}.zip, the official one-shot runs; {FETCH}")
    container = _Container(path)
    tasks, answers = [], []
    for name in sorted(n for n in container.names() if n.endswith("class_labels.txt")):
        folder = name.rsplit("/", 2)[0] + "/" if name.count("/") > 1 else ""
        pairs = [line.split() for line in container.read(name).decode(errors="replace").splitlines() if line]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise DataError(f"{path}: {name} is damaged: each line must name a test and a training image")
        support = sorted({training for _, training in pairs})
        order = [*support, *(test for test, _ in pairs)]
        tasks.append(torch.stack([container.drawing(folder + n) for n in order]))
        numbers = [support.index(training) for _, training in pairs]
        answers.append(torch.tensor([*range(len(support)), *numbers]))
    if not tasks or len({len(answer) for answer in answers}) > 1:
        raise DataError(f"{path} is no set of one-shot runs of equal size: fetch it again")
    return TensorSplit(torch.stack(tasks), torch.stack(answers))


class _Container:
    """Zip file or folder with drawings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.archive = None if path.is_dir() else zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no zip file, or damaged ({error}): fetch it again") from error

    def names(self) -> list[str]:
        """List the files, with their folders."""
        if self.archive is not None:
            return self.archive.namelist()
        return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]

    def read(self, name: str) -> bytes:
        """Read a file."""
        try:
            return (self.path / name).read_bytes() if self.archive is None else self.archive.read(name)
        except (OSError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path}: {name} cannot be read ({error}): fetch it again") from error

    def drawing(self, name: str) -> Tensor:
        """Read a drawing, black on white, as uint8 `(1, 28, 28)` with ink 255."""
        from PIL import Image

        drawing = to_mode(open_image(self.read(name), f"{self.path}: {name}"), 1)
        return 255 - to_tensor(drawing.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
