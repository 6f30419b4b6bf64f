"""Evaluation, and what it shares with training: devices, batches as the model takes them, sums and means."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import equipoise
from equipoise.models import EquilibriumClassifier
from equipoise.solvers import Solver
from equipoise.train.config import TrainConfig
from equipoise.train.data import Split
from equipoise.train.proof import MEASURED, prove
from equipoise.train.run import RunError
from equipoise.train.tasks import Objective


def evaluate(model: Any, split: Split, config: TrainConfig, *, solver: Solver | None = None) -> dict[str, Any]:
    """Loss, scores and solver statistics of a model on a split, and what is proved about its map.

    Args:
        model: of a run.
        split: images, from `config.data.load()`.
        config: of its run: batch size, precision and device are read from it.
        solver: in place of the configured one.

    Returns:
        `loss`, the scores of the task (`accuracy`), `mean_steps`, `converged`, `residual` and `count`; and of the
        certificate `certified_lipschitz`, `predicted_evaluations`, `measured_lipschitz`, `tightness` and
        `not_certified`, the reason why it is not.

    Raises:
        CertificateError: the solver was given a Lipschitz constant that the weights do not prove.
    """
    fabric = make_fabric(config)
    fabric.launch()
    config = dataclasses.replace(config, eval_solver=solver or config.eval_solver)
    objective = config.task.objective(model, config).to(fabric.device)
    objective.eval()
    with surroundings(config, fabric.device):
        proved = certified(model, split, config, fabric.device)
        found = means(objective.names, evaluate_sums(fabric, objective, split, config))
    del found["penalty"]
    return {**found, **proved}


def certified(model: Any, split: Split, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What is proved about a model in evaluation mode; of a classifier, with the tightness at a split's first images.

    Raises:
        CertificateError: the solver was given a Lipschitz constant that the weights do not prove.
    """
    batch = next(iter(split.batches(MEASURED)), None) if isinstance(model, EquilibriumClassifier) else None
    images = None if batch is None else to_device(config, *batch, device)[0]
    proof = prove(model, solver=config.task.forward_solver(config), images=images)
    if config.precision == "bf16-mixed" and proof.reason is None:
        # Rounding of a part in 256 is beyond what the proof is about: solves stall above the tolerance.
        proof = dataclasses.replace(proof, evaluation=None, reason="bf16-mixed rounds more than a proof allows")
    return proof.facts()


@torch.no_grad()
def evaluate_sums(
    fabric: Any, objective: Objective, split: Split, config: TrainConfig, told: Callable[[int], None] | None = None
) -> Tensor:
    """Sums of an objective over a split, over all processes; `told` hears how many images are done."""
    objective.eval()
    done = 0
    total = torch.zeros(len(objective.names), dtype=torch.float64, device=fabric.device)
    batches = split.batches(config.eval_batch_size, rank=fabric.global_rank, world_size=fabric.world_size)
    for images, labels in batches:
        done += len(labels) * fabric.world_size
        if len(labels):
            images, labels = to_device(config, images, labels, fabric.device)
            with fabric.autocast():
                total += objective(images, labels)[1]
        if told is not None:
            told(min(done, len(split)))
    return fabric.all_reduce(total, reduce_op="sum") if fabric.world_size > 1 else total


def means(names: tuple[str, ...], sums: Tensor) -> dict[str, Any]:
    """The sums of an objective as means over the images; `steps` is called `mean_steps`."""
    values = dict(zip(names, sums.tolist(), strict=True))
    count = values.pop("count")
    found = {name: value / max(1.0, count) for name, value in values.items()}
    mean_steps = found.pop("steps")
    return {"count": int(count), **found, "mean_steps": mean_steps}


def summary(
    config: TrainConfig,
    tested: Mapping[str, Any],
    proved: Mapping[str, Any],
    *,
    steps: int,
    steps_per_epoch: int,
    seconds: float,
    backward_share: float,
    parameters: int,
    device: torch.device,
    world_size: int,
) -> dict[str, Any]:
    """What `result.json` holds: what was found on the test images, and how the run came there.

    Args:
        config: of the run.
        tested: means over the test images, as `means` gives them.
        proved: about the map, as `certified` gives it.
        steps: optimizer steps made.
        steps_per_epoch: optimizer steps that pass over the training images once.
        seconds: of training and test.
        backward_share: share of the training time that went into gradients.
        parameters: number of trained numbers.
        device: that the result was computed on.
        world_size: number of processes.
    """
    return {
        **{f"test_{name}": tested[name] for name in config.task.scores},
        "test_loss": tested["loss"],
        "mean_steps": tested["mean_steps"],
        "converged": tested["converged"],
        "residual": tested["residual"],
        **proved,
        "seconds": seconds,
        "backward_share": backward_share,
        "steps": steps,
        "epochs": steps / steps_per_epoch,
        "parameters": parameters,
        "seed": config.seed,
        "recipe": config.name,
        "device": device_name(device),
        "world_size": world_size,
        "torch": torch.__version__,
        "equipoise": equipoise.__version__,
    }


def to_device(
    config: TrainConfig, images: Tensor, labels: Tensor, device: torch.device, crops: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A batch as the model takes it, augmented if there is a source of randomness."""
    if device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    prepared = config.data.prepare(images.to(device, non_blocking=True), crops)
    if config.precision == "64-true":
        prepared = prepared.double()
    if config.channels_last:
        prepared = prepared.contiguous(memory_format=torch.channels_last)
    return prepared, labels.to(device, non_blocking=True)


def make_fabric(config: TrainConfig) -> Any:
    """Lightning Fabric on the devices that a configuration, or torchrun, names.

    Raises:
        RunError: the extra `train` is not installed, or the devices do not exist.
    """
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise RunError("training needs Lightning Fabric: pip install 'equipoise[train]'") from error
    devices, nodes = config.devices, config.num_nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    return Fabric(
        accelerator=config.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=config.strategy,
        precision=config.precision,
    )


def bf16_is_native() -> bool:
    """Whether the CPU has instructions with which bfloat16 pays; on x86-64 that takes AVX-512 at the least."""
    return platform.machine() not in ("x86_64", "AMD64") or "AVX512" in torch.backends.cpu.get_cpu_capability()


def device_name(device: torch.device) -> str:
    """What a result was computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


@contextlib.contextmanager
def surroundings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """The caller's random state and switches decide nothing, and are as before when the run is over."""
    before, dtype = torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            torch.set_default_dtype(torch.float32)
            if config.deterministic and device.type == "cuda":
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.set_default_dtype(dtype)
