"""Devices: Lightning Fabric, transfer of batches, isolated random state, time in backward."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from equipoise.files import RunError
from equipoise.train.config import TrainConfig


def to_device(
    config: TrainConfig, images: Tensor, labels: Tensor, device: torch.device, crops: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Move a batch to a device and prepare it for the model, augmented if there is a random source."""
    if device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    prepared = config.data.prepare(images.to(device, non_blocking=True), crops)
    if config.precision == "64-true":
        prepared = prepared.double()
    if config.channels_last:
        prepared = prepared.contiguous(memory_format=torch.channels_last)
    return prepared, labels.to(device, non_blocking=True)


def make_fabric(config: TrainConfig) -> Any:
    """Return Lightning Fabric on the devices of a configuration, or of torchrun.

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
    """Return whether the CPU computes in bfloat16 without emulation; on x86-64 this takes AVX-512 at least."""
    return platform.machine() not in ("x86_64", "AMD64") or "AVX512" in torch.backends.cpu.get_cpu_capability()


def device_name(device: torch.device) -> str:
    """Return the name of a device, for results."""
    cpu = f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


@contextlib.contextmanager
def isolated_rng(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Isolate a run from random state and global flags, and restore both after it."""
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


class BackwardClock:
    """Sum of the times between entry and exit; on CUDA by events, for which the host waits in `read` alone."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.pairs: list[list[torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self.cuda:
            self.pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            self.pairs[-1][0].record()
        else:
            self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.pairs[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self.start

    def read(self) -> float:
        """Return the sum since the last reading, in seconds."""
        if self.pairs:
            self.pairs[-1][1].synchronize()
            self.seconds += sum(start.elapsed_time(end) for start, end in self.pairs) / 1000
        seconds, self.seconds, self.pairs = self.seconds, 0.0, []
        return seconds
