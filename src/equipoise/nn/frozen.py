"""A context in which modules are evaluated without effect on them, say the head of an outer loss."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Context in which modules are in evaluation mode.

    They draw no random numbers, update no statistics, and treat each sample by itself. On exit, also after an error,
    each part returns to its own mode.

    Args:
        modules: these and all modules inside them.

    Raises:
        ValueError: a BatchNorm without running statistics, which uses those of the batch in evaluation mode, too.

    Example:
        >>> import torch, equipoise as eq
        >>> head = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 2))
        >>> labels = torch.tensor([0, 1])
        >>> def outer(z, rows):
        ...     with eq.nn.frozen(head):
        ...         return torch.nn.functional.cross_entropy(head(z), labels[rows], reduction="none")
        >>> solver = eq.AdjointBroyden(outer_every=5, outer_loss=outer)
    """
    modes = {part: part.training for module in modules for part in module.modules()}
    for part in modes:
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"{part} has no running statistics and cannot be frozen: its result depends on the rest of the batch; "
                "set track_running_stats=True, or use GroupNorm"
            )
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
