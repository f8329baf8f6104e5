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
    """Progress as whole lines, for what is no terminal; without a total, it is how much is done."""

    disable = unit_scale = False  # what a bar also has

    def __init__(self, total: int | None, what: str, unit: str, *, asked: bool) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.n, self.asked, self.postfix = 0, asked, ""
        self.initial = 0  # done before this run
        self.began = time.monotonic()
        self.next = self.began + (EVERY if asked else SILENT)

    def update(self, n: int = 1) -> None:
        """More is done."""
        self.n += n
        if time.monotonic() >= self.next and (self.asked or self.n != self.total):
            self.next = time.monotonic() + EVERY
            self._say()

    def set_postfix_str(self, words: str) -> None:
        """What the next lines end with."""
        self.postfix = words

    def close(self) -> None:
        """The last line, if it was asked for."""
        if self.asked:
            self._say()

    def _say(self) -> None:
        seconds = time.monotonic() - self.began
        of = "" if self.total is None else f" of {self.total}"
        said = [f"{self.what}: {self.n}{of} {self.unit}s", terminal_bar.format_interval(seconds)]
        rate = (self.n - self.initial) / max(seconds, 1e-9)
        if self.total is not None and rate > 0 and self.n < self.total:
            said.append(f"{terminal_bar.format_interval((self.total - self.n) / rate)} left")
        said.append(f"{rate:.3g} a second" if rate < 100 else f"{rate:,.0f} a second")
        sys.stderr.write(", ".join([*said, self.postfix] if self.postfix else said) + "\n")
        sys.stderr.flush()


def tell(words: str, progress: bool | None) -> None:
    """A line where a bar would be, or in a log that was asked for."""
    if sys.stderr is not None and (progress or (progress is None and _is_seen())):
        terminal_bar.write(words, file=sys.stderr)


def _is_seen() -> bool:
    """Whether somebody looks: a notebook, or a terminal."""
    return "ipykernel" in sys.modules or sys.stderr is None or sys.stderr.isatty()


@contextmanager
def counting(total: int | None, what: str, unit: str, progress: bool | None) -> Iterator[Any]:
    """A bar that disappears at its end or, where there is neither terminal nor notebook, lines.

    ``progress``: False for nothing; True also has a last line; None keeps a log silent for its
    first minute.
    """
    if progress is False or _is_seen():
        with tqdm(total=total, desc=what, unit=unit, disable=progress is False, leave=False) as bar:
            yield bar
        return
    lines = _Lines(total, what, unit, asked=bool(progress))
    yield lines
    lines.close()
