"""The command line, called in this process, with the classes of the toys."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

PREFIX = "equipoise: error: "


class Console:
    """Calls of the command line that check its exit code and that it writes to one stream alone."""

    def __init__(self, main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
        self.main, self.capsys = main, capsys

    def both(self, *words: str, code: int = 0) -> tuple[str, str]:
        """Output and errors."""
        self.capsys.readouterr()
        found = self.main(words)
        captured = self.capsys.readouterr()
        assert found == code, (words, captured.err)
        return captured.out, captured.err

    def out(self, *words: str, code: int = 0) -> str:
        text, errors = self.both(*words, code=code)
        assert errors == ""
        return text

    def flat(self, *words: str, code: int = 0) -> str:
        """Output without the lines of tables, as one line."""
        return " ".join(self.out(*words, code=code).replace("│", " ").split())

    def json(self, *words: str, code: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out(*words, "--json", code=code).splitlines()]

    def error(self, *words: str, code: int = 1) -> str:
        """The message of a call that fails, without its prefix; it has one line."""
        text, errors = self.both(*words, code=code)
        assert text == ""
        assert errors.startswith(PREFIX)
        assert errors.count("\n") == 1
        return errors[len(PREFIX) : -1]
