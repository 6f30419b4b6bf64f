"""The command line, `equipoise COMMAND`."""

from equipoise.cli.main import main

__all__ = ["main"]
