"""How functions are compiled here: for the CPU, without the GIL, cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import njit

_F = TypeVar("_F", bound=Callable[..., Any])

# Sums may be reordered and multiplied-and-added at once; infinities and NaNs keep their meaning.
_ALLOWED = {"contract", "reassoc", "nsz", "arcp"}


def _cache_folder() -> str | None:
    """A writable folder for exactly these sources; None where there is none.

    Numba checks only a function's own file to see whether its machine code is stale; our functions
    call each other across files.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.glob("*.py")):
        digest.update(path.read_bytes())
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    config: Any = numba.config
    chosen = config.CACHE_DIR  # NUMBA_CACHE_DIR
    roots = [Path(chosen)] if chosen else [here / "__pycache__", user / "qkvnorm-lens"]
    for root in roots:
        folder = root / f"compiled-{digest.hexdigest()[:16]}"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return str(folder)
    return None


FOLDER = _cache_folder()
"""Where the machine code of these sources is kept."""


def _compile(function: _F, allowed: set[str]) -> _F:
    plain = inspect.unwrap(function)  # the tests' shape checks wrap every function
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = FOLDER or before
    try:
        decorate = njit(cache=FOLDER is not None, nogil=True, error_model="numpy", fastmath=allowed)
        made: Any = decorate(plain)
    finally:
        config.CACHE_DIR = before
    return cast(_F, made)


def compiled(function: _F) -> _F:
    """Compile at the first call; later processes load the machine code from the cache."""
    return _compile(function, _ALLOWED)


def is_ready(function: Any) -> bool:
    """Whether a compiled function runs at once: it ran already, or its machine code is on disk."""
    made = f"*.{function.__name__}-*.nbi"
    known = FOLDER is not None and any(Path(FOLDER).rglob(made))
    return known or bool(getattr(function, "signatures", ("plain Python",)))


def compiled_without_nan(function: _F) -> _F:
    """:func:`compiled` for loops over numbers without NaN: only then do their maxima vectorise."""
    return _compile(function, {*_ALLOWED, "nnan"})
