"""Progress where it can be seen: a bar in a terminal or a notebook, lines in a log."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import TqdmWarning
from tqdm.std import tqdm as terminal_bar

with warnings.catch_warnings():  # a notebook without ipywidgets gets the terminal's bar
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

EVERY = 10.0
"""Seconds between the lines of a log."""
SILENT = 60.0
"""Seconds until the first one, where none was asked for."""


class _Lines:
    """Progress as whole lines, for what is no terminal."""

    def __init__(self, total: int, what: str, unit: str, *, asked: bool) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.n, self.asked = 0, asked
        self.began = time.monotonic()
        self.next = self.began + (EVERY if asked else SILENT)

    def update(self, n: int = 1) -> None:
        """More is done."""
        self.n += n
        if time.monotonic() >= self.next and (self.asked or self.n < self.total):
            self.next = time.monotonic() + EVERY
            self._say()

    def close(self) -> None:
        """The last line, if it was asked for."""
        if self.asked:
            self._say()

    def _say(self) -> None:
        seconds = time.monotonic() - self.began
        left = seconds * (self.total / self.n - 1) if self.n else 0.0
        rest = f", {terminal_bar.format_interval(left)} left" if 0 < self.n < self.total else ""
        done = f"{self.what}: {self.n} of {self.total} {self.unit}s"
        sys.stderr.write(f"{done}, {terminal_bar.format_interval(seconds)}{rest}\n")
        sys.stderr.flush()


@contextmanager
def counting(total: int, what: str, unit: str, progress: bool | None) -> Iterator[Any]:
    """A bar that disappears at its end or, where there is neither terminal nor notebook, lines.

    ``progress``: False for nothing; True also has a last line; None keeps a log silent for its
    first minute.
    """
    shown = "ipykernel" in sys.modules or sys.stderr is None or sys.stderr.isatty()
    if progress is False or shown:
        with tqdm(total=total, desc=what, unit=unit, disable=progress is False, leave=False) as bar:
            yield bar
        return
    lines = _Lines(total, what, unit, asked=bool(progress))
    yield lines
    lines.close()
