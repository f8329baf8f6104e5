"""Numbers on the command line: what each option takes, and what it says of anything else."""

from __future__ import annotations

import argparse


def positive(value: str) -> int:
    """An integer of at least 1."""
    return _at_least(value, 1)


def count(value: str) -> int:
    """An integer of at least 0."""
    return _at_least(value, 0)


def _at_least(value: str, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"wanted an integer >= {least}; got {value!r}")
    return number
