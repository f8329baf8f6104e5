"""Values on the command line, and names: what is accepted, and the error for anything else.

Nothing here imports torch: what can fail early fails early.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path


def near(given: str, known: Iterable[str]) -> str:
    """`` (did you mean 'probe'?)``, where a known name is similar to the one given."""
    lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(given.lower()[:200], lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[found[0]]!r}?)" if found else ""


def brief(value: object) -> str:
    """A value for a message, shortened to one line."""
    try:
        text = " ".join(repr(value)[:1000].split())
    except Exception:  # a repr of somebody's own, or an integer of ten thousand digits
        return type(value).__name__
    return text if len(text) <= 100 else f"{text[:70]}..."


def check_name(name: str, given: object, known: Iterable[str]) -> str:
    """One of some names.

    Raises:
        ValueError: anything else; the message suggests a similar name.
    """
    names = list(known)
    if not isinstance(given, str) or given not in names:
        said = near(given, names) if isinstance(given, str) else ""
        raise ValueError(f"{name}: wanted one of {names}; got {brief(given)}{said}")
    return str(given)


def directory(name: str, path: Path) -> None:
    """Refuse what can't become a writable directory.

    Raises:
        OSError: a file in its place, or no permission to write.
    """
    for there in (path, *path.parents):
        if there.exists() or there.is_symlink():
            break
    if not there.is_dir():
        what = "file" if there.exists() else "broken link"
        raise NotADirectoryError(f"{name}: wanted a directory; got the {what} {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}: wanted a directory that can be written; got {path}")


def file(name: str, path: Path) -> None:
    """Refuse what can't become a file.

    Raises:
        OSError: a directory in its place, a file in place of its directory, or no permission to
            write.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{name}: wanted a file's name; got the directory {path}")
    directory(name, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{name}: wanted a file that can be written; got {path}")


def some_path(value: str) -> Path:
    """A path that a file can have."""
    long = any(len(os.fsencode(part)) > 255 for part in Path(value).parts)
    if not value or "\0" in value or long:
        raise argparse.ArgumentTypeError(f"wanted a path; got {brief(value)}")
    return Path(value)


def number(wanted: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """An option's type: a number for which ``fits`` says yes."""

    def read(value: str) -> float:
        try:
            given = float(value)
        except ValueError:
            given = math.nan
        if not fits(given):  # comparisons with NaN are false
            raise argparse.ArgumentTypeError(f"wanted {wanted}; got {brief(value)}")
        return given

    return read


def positive(value: str) -> int:
    """An integer of at least 1."""
    return _at_least(value, 1)


def count(value: str) -> int:
    """An integer of at least 0."""
    return _at_least(value, 0)


def at_least(least: int) -> Callable[[str], int]:
    """An option's type: an integer of at least this."""
    return lambda value: _at_least(value, least)


def _at_least(value: str, least: int) -> int:
    try:
        whole = int(value)
    except ValueError:
        whole = least - 1
    if not least <= whole < 1 << 62:
        raise argparse.ArgumentTypeError(f"wanted an integer >= {least}; got {brief(value)}")
    return whole
