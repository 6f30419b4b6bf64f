"""Checks of configurations."""

import operator
import re

COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def check_ranges(config: object, prefix: str | None = None, /, **rules: str) -> None:
    """Check that numeric fields, or all numbers in a tuple, lie in their ranges; None always does.

    Args:
        config: object with the fields.
        prefix: before the name of a field in messages; None: the class, as in `Broyden(memory=0): must be >= 1`.
        rules: for each field its range, such as `> 0` or `>= 0 and < 1`, and after a comma or semicolon further advice.

    Raises:
        ValueError: a field is out of range, or not a number.

    Example:
        >>> import types
        >>> from equipoise.core.checks import check_ranges
        >>> check_ranges(types.SimpleNamespace(rate=1.0, steps=None), rate=">= 0 and <= 1", steps=">= 1, or None")
    """
    for name, rule in rules.items():
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        limits = re.findall(r"([<>]=?) ([-\w.]+)", re.split("[,;]", rule)[0])
        if not all(COMPARISONS[sign](number, float(bound)) for sign, bound in limits for number in numbers):
            shown = f"{type(config).__name__}({name}={value!r})" if prefix is None else f"{prefix}{name}={value!r}"
            raise ValueError(f"{shown}: must be {rule}")
