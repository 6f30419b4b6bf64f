"""Checks of the fields of solvers, gradients and layers."""

from __future__ import annotations


def check(owner: object, valid: bool, names: str, rule: str) -> None:
    """Raise an error that names fields and values unless they are valid.

    Args:
        owner: object that has the fields.
        valid: result of the check.
        names: of the fields that it concerns, separated by spaces.
        rule: what they must obey, and the remedy.

    Raises:
        ValueError: not valid.
    """
    if not valid:
        values = ", ".join(f"{name}={getattr(owner, name)!r}" for name in names.split())
        raise ValueError(f"{type(owner).__name__}({values}): {rule}")
