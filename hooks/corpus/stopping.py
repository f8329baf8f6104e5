"""Stops a run at SIGINT and SIGTERM, but never in the middle of what must be done whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """A run was stopped; the text says where, and how it goes on.

    Attributes:
        signal: SIGINT or SIGTERM.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = int(number)


class Stopping:
    """Inside, SIGINT and SIGTERM raise `Stopped` at once, or after what `whole` holds."""

    def __init__(self) -> None:
        self._held = False
        self._asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextmanager
    def whole(self, *, last: bool = False) -> Iterator[None]:
        """Inside, nothing is stopped, but after it; nor after the ``last``."""
        self._held = True
        try:
            yield
        finally:
            self._held = last
        if self._asked is not None and not last:
            raise Stopped(number=self._asked)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        if not self._held:
            raise Stopped(number=number)
