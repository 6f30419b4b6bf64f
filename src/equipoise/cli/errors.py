"""Errors of the command line, printed without a traceback."""

import sys


class UsageError(ValueError):
    """Error in a command line."""


def fail(text: str, code: int) -> int:
    """Print an error to stderr in one line and return its exit code."""
    sys.stderr.write(f"equipoise: error: {' '.join(text.split())}\n")
    return code
