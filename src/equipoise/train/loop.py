"""Training loop on Lightning Fabric, with the moving average of the weights."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from equipoise.data import Split, Splits, derive_seed, generator
from equipoise.train import checkpoint
from equipoise.train.config import TrainConfig
from equipoise.train.device import BackwardClock, bf16_is_native, isolated_rng, make_fabric, to_device
from equipoise.train.evaluation import certified, evaluate_sums, means, summary
from equipoise.train.progress import Meter, Observer, Progress, Result
from equipoise.train.proof import check_claims
from equipoise.train.run_folder import RunFolder, new_folder
from equipoise.train.serialize import to_plain
from equipoise.train.task import StepInfo

NEVER = 2**62  # step of the first loss that is not finite, as long as there is none


class Average:
    """Exponential moving average of a model's weights and statistics, faster in the first steps.

    Buffers of parametrizations, such as the vectors of power iterations, are copied: their mean is meaningless. This is
    why torch's `AveragedModel`, which averages all buffers or none, does not serve.

    Args:
        model: whose state is averaged.
        decay: of the average once it has warmed up.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.copied = {
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, ParametrizationList)
            for name, _ in module.named_buffers()
        }

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the present state of the model."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point() and name not in self.copied:
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)

    @torch.no_grad()
    def swap(self, model: torch.nn.Module) -> None:
        """Exchange the state of the model and the average."""
        for name, value in model.state_dict().items():
            kept = value.clone()
            value.copy_(self.values[name])
            self.values[name].copy_(kept)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the average to that of a checkpoint."""
        for name, value in self.values.items():
            value.copy_(values[name])


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the message names the batch and the last good checkpoint."""


def fit(
    config: TrainConfig,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer = Observer(),
) -> Result:
    """Train the model of a configuration, and evaluate it on the test samples at the end.

    Everything random is a function of seed and step, so a resumed run equals an uninterrupted one bit for bit.

    Args:
        config: of the run.
        run_dir: folder of the run; None: `runs/<name>-<number>`.
        resume: continue from the newest undamaged checkpoint in the folder, or start if there is none.
        overwrite: replace a run that the folder holds.
        observer: callbacks.

    Returns:
        Model, history, result and folder.

    Raises:
        RunError: the folder holds a run and neither `resume` nor `overwrite` is set, or one of another configuration.
        DataError: the data is missing or damaged.
        NonFiniteLoss: the loss became NaN or infinite.
        CertificateError: a solver is given a Lipschitz constant that the layers of the model may exceed.
        OSError: the folder cannot be written.

    Example:
        >>> import dataclasses, tempfile
        >>> from equipoise import zoo
        >>> from equipoise.train import fit
        >>> config = dataclasses.replace(zoo.mdeq_digits(), stop_after=2, tensorboard=False)
        >>> result = fit(config, run_dir=tempfile.mkdtemp())
        >>> 0 <= result.test_accuracy <= 1
        True
    """
    fabric = make_fabric(config)
    fabric.launch()
    main = fabric.global_rank == 0
    observer = observer if main else Observer()
    path = Path(fabric.broadcast(str(run_dir if run_dir is not None else new_folder(config.name))))
    folder = RunFolder(path, config, writes=main, note=observer.noted)
    splits = config.data.load()
    _check(config, splits, fabric.world_size)
    if main:
        folder.claim(resume=resume, overwrite=overwrite)
    fabric.barrier()
    if config.precision == "bf16-mixed" and fabric.device.type == "cpu" and not bf16_is_native():
        observer.noted("this CPU computes in bf16 by emulation, several times slower: --precision 32-true is faster")
    with isolated_rng(config, fabric.device):
        try:
            return _Trainer(fabric, config, splits, folder, observer).run(resume)
        finally:
            folder.close()


class _Trainer:
    """Parts of a run, and the loop."""

    def __init__(self, fabric: Any, config: TrainConfig, splits: Splits, folder: RunFolder, observer: Observer) -> None:
        self.fabric, self.config, self.splits, self.folder, self.observer = fabric, config, splits, folder, observer
        self.steps_per_epoch = len(splits.train) // config.batch_size
        self.total = min(self.steps_per_epoch * config.epochs, config.stop_after or NEVER)
        torch.manual_seed(derive_seed(config.seed))
        self.model = config.build()
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if config.compile_cell:
            self.model.deq.cell.compile()
        self.objective = config.objective(self.model)
        self.zeros = torch.zeros(len(self.objective.train().names), dtype=torch.float64, device=fabric.device)
        optimizer = config.optimizer.build(self.model.parameters())
        self.module, self.optimizer = fabric.setup(self.objective, optimizer)
        self.average = None if config.ema_decay is None else Average(self.model, config.ema_decay)
        self.progress = Progress(Meter(self.zeros), Meter(self.zeros))
        self.clock = BackwardClock(fabric.device)
        # Reading a number makes the host wait for a device, and all processes for each other.
        self.read_every = 1 if fabric.device.type == "cpu" and fabric.world_size == 1 else config.log_every

    def run(self, resume: bool) -> Result:
        """Train to the end, from the checkpoint in the folder if there is one, and evaluate."""
        if resume:
            self._restore()
        history = [line for line in self.folder.rewind(self.progress.step) if line["kind"] == "epoch"]
        parameters = sum(p.numel() for p in self.model.parameters())
        self.observer.started(self.folder.path, self.total, self.progress.step, parameters)
        while self.progress.step < self.total:
            history += self._epoch()
        if self.average is not None:  # permanently: these weights are tested, saved and returned
            self.average.swap(self.model)
        start = time.perf_counter()
        line = self._evaluate("test", self.splits.test)
        self._log(line)
        if self.folder.writes:  # before the proof, whose failure must not lose the weights
            classes = list(self.splits.classes)
            about = {"data": to_plain(self.config.data), "classes": classes, "recipe": self.config.name}
            checkpoint.save(self.model, self.folder.path / "model.safetensors", about=about)
        proved = certified(self.model, self.splits.test, self.config, self.fabric.device)
        progress = self.progress
        facts = summary(
            self.config,
            line,
            proved,
            steps=progress.step,
            steps_per_epoch=self.steps_per_epoch,
            seconds=progress.seconds + time.perf_counter() - start,
            backward_share=progress.backward_seconds / progress.seconds if progress.seconds else 0.0,
            parameters=parameters,
            device=self.fabric.device,
            world_size=self.fabric.world_size,
        )
        if self.folder.writes:
            self.folder.finish(facts)
        result = Result(self.model.eval(), [*history, line], facts, self.folder.path)
        self.observer.finished(result)
        return result

    def _epoch(self) -> list[dict[str, Any]]:
        """Train to the end of the epoch; return the lines for the history."""
        config, progress = self.config, self.progress
        self.module.train()
        bad = torch.full((), NEVER, device=self.fabric.device)
        batches = self.splits.train.batches(
            config.batch_size,
            shuffle=(config.seed, progress.epoch),
            start=progress.batch,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
        )
        before = time.perf_counter()
        for images, labels in batches:
            sums = self._step(images, labels)
            bad = torch.where(sums.isfinite().all(), bad, bad.clamp(max=progress.step))
            for meter in (progress.window_meter, progress.epoch_meter):
                meter.sums = meter.sums + sums
            progress.step, progress.batch = progress.step + 1, progress.batch + 1
            last = progress.batch == self.steps_per_epoch or progress.step == self.total
            saving = config.checkpoint_every is not None and progress.step % config.checkpoint_every == 0 and not last
            logging = progress.step % config.log_every == 0
            if saving or logging or last or progress.step % self.read_every == 0:
                self._stop_if_bad(bad)
                progress.backward_seconds += self.clock.read()
                now = time.perf_counter()
                progress.seconds, before = progress.seconds + now - before, now
                line = self._line("step", "train", self._over_all(progress.window_meter.sums), progress.window_meter)
                self.observer.stepped(line)
                if logging:
                    self.folder.log(line)
                    progress.window_meter = progress.meter(self.zeros)
                if saving:
                    self._save()
                    before = time.perf_counter()
            if last:
                break
        lines = [self._line("epoch", "train", self._over_all(progress.epoch_meter.sums), progress.epoch_meter)]
        self.module.eval()  # this also proves the bounds of capped norms, for the trained weights
        if self.splits.validation is not None:
            with self._averaged():
                lines.append(self._evaluate("validation", self.splits.validation))
        for line in lines:
            self._log(line)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.epoch_meter = progress.meter(self.zeros)
        self._save()
        return lines

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Make an optimizer step; return the sums of its batch, on the device."""
        config, progress, fabric = self.config, self.progress, self.fabric
        torch.manual_seed(derive_seed(config.seed, progress.step, fabric.global_rank, 3))
        crops = generator(config.seed, progress.step, fabric.global_rank, 4)
        images, labels = to_device(config, images, labels, fabric.device, crops)
        lr = config.schedule.lr(progress.step, self.total, config.optimizer.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, sums = self.module(images, labels, StepInfo(progress.step, progress.epoch, config.seed))
        with self.clock:
            fabric.backward(loss)
        if config.clip_norm is not None:
            fabric.clip_gradients(self.module, self.optimizer, max_norm=config.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model, progress.step)
        return sums.to(torch.float64)

    def _evaluate(self, name: str, split: Split) -> dict[str, Any]:
        start = time.perf_counter()
        if self.fabric.world_size > 1:  # batch statistics differ; those of the first process are saved
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        report = functools.partial(self.observer.evaluating, name, total=len(split))
        sums = evaluate_sums(self.fabric, self.objective, split, self.config, report)
        if not sums.isfinite().all():
            self._stop(f"the loss of the {name} samples after {self.progress.step} steps")
        line = self._line("epoch", name, sums, self.progress.meter(sums))
        del line["backward_seconds"], line["lr"], line["penalty"]
        return {**line, "seconds": time.perf_counter() - start}

    def _line(self, kind: str, split: str, sums: Tensor, start: Meter) -> dict[str, Any]:
        """Return a line of the log: means over the samples of all processes, and the time since the start."""
        progress = self.progress
        return {
            "kind": kind,
            "split": split,
            "step": progress.step,
            "epoch": progress.epoch,
            **means(self.objective.names, sums),
            "lr": self.config.schedule.lr(max(0, progress.step - 1), self.total, self.config.optimizer.lr),
            "seconds": progress.seconds - start.seconds,
            "backward_seconds": progress.backward_seconds - start.backward_seconds,
        }

    def _over_all(self, sums: Tensor) -> Tensor:
        """Return sums over all processes: of a copy, as Fabric reduces in place and each process keeps its own sums."""
        return self.fabric.all_reduce(sums.clone(), reduce_op="sum") if self.fabric.world_size > 1 else sums

    def _log(self, line: dict[str, Any]) -> None:
        self.folder.log(line)
        self.observer.logged(line)

    def _stop_if_bad(self, bad: Tensor) -> None:
        first = -self.fabric.all_reduce(-bad, reduce_op="max") if self.fabric.world_size > 1 else bad
        if (step := int(first)) != NEVER:
            epoch, batch = divmod(step, self.steps_per_epoch)
            self._stop(f"the loss of batch {batch} of epoch {epoch} (step {step})")

    def _stop(self, what: str) -> NoReturn:
        saved = checkpoint.states(self.folder.checkpoints)
        good = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint before it"
        raise NonFiniteLoss(
            f"{what} is not finite; {good}. Lower optimizer.lr, set clip_norm, or use precision 32-true"
        )

    def _save(self) -> None:
        # A finite loss may have a gradient that is not; such weights must not replace a good checkpoint.
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            self._stop(f"one of the weights after {self.progress.step} steps")
        progress = dataclasses.asdict(self.progress)
        for meter in (progress["epoch_meter"], progress["window_meter"]):
            meter["sums"] = self._over_all(meter["sums"]).tolist()
        if self.folder.writes:
            tensors, facts = checkpoint.pack_optimizer(self.optimizer.optimizer)
            tensors |= {f"model.{name}": value for name, value in self.model.state_dict().items()}
            if self.average is not None:
                tensors |= {f"average.{name}": value for name, value in self.average.values.items()}
            content = {"progress": progress, "optimizer": facts}
            checkpoint.write_state(self.folder.checkpoints, self.progress.step, checkpoint.State(tensors, content))
        self.fabric.barrier()

    def _restore(self) -> None:
        state, problems = checkpoint.read_newest_state(self.folder.checkpoints)
        for problem in problems:
            self.observer.noted(problem if state is None else f"{problem}. The checkpoint before it is used")
        if state is None:
            kind = "whole checkpoint" if problems else "checkpoint"
            self.observer.noted(f"no {kind} in {self.folder.path} yet: starting from the beginning")
            return
        self.model.load_state_dict(state.part("model"))
        checkpoint.unpack_optimizer(self.optimizer.optimizer, state)
        if self.average is not None:
            self.average.load(state.part("average"))
        self.progress = Progress.from_plain(state.facts["progress"], self.fabric.device)
        if self.fabric.global_rank != 0:  # the checkpoint has sums over all processes; the first one continues them
            self.progress.epoch_meter.sums = self.progress.window_meter.sums = self.zeros
        self.observer.noted(f"resumed at step {self.progress.step} of {self.total}")

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Replace the weights by their moving average within the block."""
        swap = functools.partial(self.average.swap, self.model) if self.average is not None else lambda: None
        swap()
        try:
            yield
        finally:
            swap()


def _check(config: TrainConfig, splits: Splits, world_size: int) -> None:
    check_claims(config)
    if config.batch_size % world_size:
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of the number of devices, {world_size}")
    if len(splits.train) < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size} exceeds the {len(splits.train)} training samples; lower it")
    config.task.check_data(config.model, splits)
