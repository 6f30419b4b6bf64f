"""What the command line says without a traceback."""

import sys


class UsageError(ValueError):
    """A command line that cannot be understood."""


def fail(text: str, code: int) -> int:
    """Tell an error on stderr, in one line; returns its exit code."""
    sys.stderr.write(f"equipoise: error: {' '.join(text.split())}\n")
    return code
