"""The demo's one way to a reader: narration with times on a terminal, plain lines when piped.

Everything that `up`, `down` and `demo` say goes through here, so that there is one place that knows
about terminals, and none that prints on its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_BOLD, _DIM, _GREEN, _RED, _END = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[31m", "\x1b[0m"
_LABEL_COLUMNS = 14


class Console:
    """Writes lines; remembers how long each step took."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._colour = self._out.isatty() and "NO_COLOR" not in os.environ
        self.times: list[tuple[str, str, float]] = []
        """(step, what it came to, seconds) of each step that ended."""

    def line(self, text: str = "") -> None:
        """One line as it is. A reader that went away (`| head`) ends the command as Ctrl-C does."""
        try:
            self._out.write(text + "\n")
            self._out.flush()
        except OSError:
            # What is still to be said, while cleaning up, must not fail for this again.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._out.fileno())
            os.close(nowhere)
            raise KeyboardInterrupt from None

    def heading(self, text: str) -> None:
        """One line that stands out."""
        self.line(self._style(_BOLD, text))

    def fact(self, label: str, text: str) -> None:
        """One thing to know, under the step that it belongs to; several lines are aligned."""
        first, *rest = text.splitlines() or [""]
        self.line(f"   {self._style(_DIM, label.ljust(_LABEL_COLUMNS))} {first}")
        for line in rest:
            self.line(f"   {'':{_LABEL_COLUMNS}} {line}")

    def proof(self, label: str, text: str) -> None:
        """A fact that was checked, and held."""
        self.fact(label, f"{text} {self._style(_GREEN, 'ok')}")

    def failure(self, text: str) -> None:
        """Why it ends badly."""
        self.line(self._style(_RED, "failed: ") + text)

    @contextmanager
    def step(self, title: str) -> Iterator[list[str]]:
        """A numbered step with its time. What is appended to the list goes into the final table."""
        self.line()
        self.heading(f"{len(self.times) + 1}. {title}")
        results: list[str] = []
        begun = time.monotonic()
        yield results
        seconds = time.monotonic() - begun
        self.times.append((title.partition(":")[0], "; ".join(results), seconds))
        self.line(self._style(_DIM, f"   {seconds:.3f} s"))

    def table(self) -> None:
        """What happened, with the times of each step."""
        self.line()
        self.heading(f"   {'step':<14} {'seconds':>8}  what happened")
        for number, (name, result, seconds) in enumerate(self.times, 1):
            self.line(f"{number:>2} {name.lower():<14} {seconds:8.3f}  {result}")
        total = sum(seconds for _, _, seconds in self.times)
        self.line(f"   {'all steps':<14} {total:8.3f}")

    def _style(self, code: str, text: str) -> str:
        return f"{code}{text}{_END}" if self._colour else text
