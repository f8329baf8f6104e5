"""Arguments that several calls take, and what they say of a wrong one."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from hooks.laws import check_sigma, get_law


def check_integers(**given: tuple[Any, int]) -> None:
    """Refuse what is no integer, or below the least value that stands beside it."""
    for name, (value, least) in given.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}: wanted an integer >= {least}; got {value!r}")


def check_booleans(**given: Any) -> None:
    """Refuse what is neither True nor False: a text such as "no" would pass for yes."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: wanted True or False; got {value!r}")


def read_sigmas(sigmas: Any, law: str, default: tuple[float, ...]) -> list[float]:
    """Sigmas as floats that the law can have; None stands for as much of the default as it can.

    Raises:
        TypeError: no list of numbers.
        ValueError: a sigma that the law can't have.
    """
    known = get_law(law)
    if sigmas is None:
        top = known.limit
        return [s for s in default if s < top or (s == top and known.limit_included)]
    if isinstance(sigmas, (str, bytes)) or not isinstance(sigmas, Iterable):
        raise TypeError(f"sigmas: wanted a list of numbers; got {sigmas!r}")
    values = [float(s) for s in sigmas]
    for sigma in values:
        check_sigma(sigma, known)
    return values
