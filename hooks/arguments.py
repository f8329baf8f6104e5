"""Checks of the arguments of public calls; a wrong one raises ``name: wanted X; got Y``.

Numbers may be numpy's or torch's (scalars, arrays without an axis); they are stored as Python's
own, so that settings compare and go into JSON.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

SEEDS = 2**128 - 1
"""The largest seed: numpy's have as many bits."""
MANY = 1_000_000
"""Draws, replicates or permutations beyond this are a mistake: their arrays would fill memory."""
_MOST_ENTRIES = 1_000_000  # of a list: an endless generator ends here
_SHOWN = 100  # characters of a value in a message
_LONGEST_NAME = 255  # bytes of a file's name
_LARGEST = 1 << 62  # of a count or an index: what arrays of integers can hold


class OutOfRangeError(ValueError, IndexError):
    """An index out of range: a ValueError as for wrong arguments, an IndexError as for lists."""


# -- what a message says ----------------------------------------------------------------------


def brief(value: Any) -> str:
    """A value for a message, shortened to one line."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim:
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"{kind} of shape {list(value.shape)}, {value.dtype}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr of somebody's own, or an integer of ten thousand digits
        return type(value).__name__
    if len(text) <= _SHOWN:
        return text
    length = f" of length {len(value)}" if isinstance(value, (str, bytes, Collection)) else ""
    return f"{text[: _SHOWN - 30]}... ({type(value).__name__}{length})"


def near(value: Any, known: Iterable[Any]) -> str:
    """``, did you mean 'uniform'?``, where a known name is similar to the one given."""
    names = [name for name in known if isinstance(name, str)]
    if not isinstance(value, str):
        return ""
    lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(value.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[found[0]]!r}?)" if found else ""


def plain(value: Any) -> Any:
    """A number or text of numpy's or torch's, without an axis, as Python's own."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:
        try:
            return value.item()
        except RuntimeError:  # a tensor without data
            return value
    return value


# -- one value ----------------------------------------------------------------------------------


def check_integers(**given: tuple[Any, int] | tuple[Any, int, int | float]) -> tuple[int, ...]:
    """Integers as Python's own, each given with its least and perhaps its greatest value.

    Without one it must fit into an array of integers.

    Raises:
        ValueError: not an integer, or one out of range.
    """
    out = []
    for name, (value, least, *most) in given.items():
        number, end = plain(value), most[0] if most else _LARGEST
        whole = isinstance(number, Integral) and not isinstance(number, bool)
        if not whole or not least <= number <= end:
            bounded = end < MANY or (whole and number > end)  # a far end is named if exceeded
            wanted = f"from {least} to {end}" if bounded else f">= {least}"
            raise ValueError(f"{name}: wanted an integer {wanted}; got {brief(value)}")
        out.append(int(number))
    return tuple(out)


def check_index(name: str, value: Any, n: int, what: str) -> int:
    """An index into ``n`` things.

    Raises:
        TypeError: not an integer.
        OutOfRangeError: there is no such thing.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{name}: wanted an index of {what}; got {brief(value)}")
    if not 0 <= int(number) < n:
        wanted = f"one of {n} {what}, from 0 to {n - 1}" if n else f"one of {what} (there are none)"
        raise OutOfRangeError(f"{name}: wanted {wanted}; got {brief(value)}")
    return int(number)


def check_booleans(**given: Any) -> tuple[bool, ...]:
    """True or False as Python's own: a text such as "no" would pass for yes.

    Raises:
        TypeError: anything else.
    """
    out = []
    for name, value in given.items():
        answer = plain(value)
        if not isinstance(answer, bool):
            raise TypeError(f"{name}: wanted True or False; got {brief(value)}")
        out.append(answer)
    return tuple(out)


def check_optional(**given: Any) -> tuple[bool | None, ...]:
    """True, False or None; as :func:`check_booleans`.

    Raises:
        TypeError: anything else.
    """
    for name, value in given.items():
        if value is not None and not isinstance(plain(value), bool):
            raise TypeError(f"{name}: wanted True, False or None; got {brief(value)}")
    return tuple(plain(value) for value in given.values())


def check_number(name: str, value: Any, wanted: str, fits: Callable[[float], bool]) -> float:
    """A number for which ``fits`` says yes, as Python's own.

    Raises:
        TypeError: not a number.
        ValueError: another number; NaN never fits.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name}: wanted {wanted}; got {brief(value)}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf if number > 0 else -math.inf
    if not fits(number):  # comparisons with NaN are false
        raise ValueError(f"{name}: wanted {wanted}; got {brief(plain(value))}")
    return number


def check_choice(name: str, value: Any, known: Iterable[str]) -> str:
    """One of some names.

    Raises:
        ValueError: anything else; the message suggests a similar name.
    """
    names, text = list(known), plain(value)
    if not isinstance(text, str) or text not in names:
        raise ValueError(f"{name}: wanted one of {names}; got {brief(value)}{near(text, names)}")
    return str(text)


def check_text(name: str, value: Any, wanted: str = "a text") -> str:
    """A text.

    Raises:
        TypeError: anything else.
    """
    text = plain(value)
    if not isinstance(text, str):
        raise TypeError(f"{name}: wanted {wanted}; got {brief(value)}")
    return str(text)


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse another kind of thing.

    Raises:
        TypeError: names what was wanted.
    """
    if not isinstance(value, kinds):
        got = brief(value) if isinstance(value, (str, Real, NoneType)) else type(value).__name__
        raise TypeError(f"{name}: wanted {wanted}; got {got}")


def check_tensor(name: str, value: Any, shape: tuple[int | None, ...], wanted: str) -> None:
    """Refuse anything but a floating-point tensor of this shape; None is any length.

    Raises:
        TypeError: not such a tensor.
        ValueError: another shape.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else brief(value)
        raise TypeError(f"{name}: wanted a tensor of floats {wanted}; got {got}")
    same = value.ndim == len(shape) and all(
        n in (None, m) for n, m in zip(shape, value.shape, strict=True)
    )
    if not same:
        raise ValueError(f"{name}: wanted a tensor {wanted}; got shape {list(value.shape)}")


def check_path(name: str, value: Any) -> Path:
    """A path.

    Raises:
        TypeError: neither a text nor a path.
        ValueError: an empty one, or one that no file can have.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(given := os.fspath(value), bytes):
        raise TypeError(f"{name}: wanted a path; got {brief(value)}")
    long = any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(given).parts)
    if not given or "\0" in given or long:
        raise ValueError(f"{name}: wanted a path that a file can have; got {brief(given)}")
    return Path(given)


def check_device(name: str, value: Any) -> Any:
    """A device that torch has here, or None.

    Raises:
        TypeError, ValueError: anything else; the message has torch's reason.
    """
    if value is None:
        return None
    wanted = "a device of torch, such as 'cpu' or 'cuda:0'"
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, (str, int, torch.device)):
        raise TypeError(f"{name}: wanted {wanted}; got {brief(value)}")
    try:
        torch.empty(1, device=given)
    except Exception as error:  # each backend has its own kinds
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"{name}: wanted {wanted}; got {brief(given)}: {reason:.200}") from error
    return given


def check_dtype(name: str, value: Any) -> Any:
    """A floating dtype of torch, or None.

    Raises:
        TypeError: anything else.
    """
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        wanted = "a floating dtype such as torch.float32"
        raise TypeError(f"{name}: wanted {wanted}; got {brief(value)}")
    return value


@contextmanager
def naming(name: str, wanted: str, path: Path) -> Iterator[None]:
    """Put the argument's name before what the system reports about a file.

    Raises:
        OSError: of the same kind.
    """
    try:
        yield
    except OSError as error:
        said = type(error)(f"{name}: wanted {wanted}; got {path}: {error.strerror or error}")
        said.errno = error.errno
        raise said from error


# -- several ------------------------------------------------------------------------------------


def read_list(name: str, value: Any, wanted: str) -> list[Any]:
    """The entries of a list, a tuple, an array or anything else that has some, read once.

    Raises:
        TypeError: a text, a mapping, or something without entries.
        ValueError: endless entries.
    """
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        try:
            entries = list(islice(value, _MOST_ENTRIES + 1))
        except TypeError:  # an array without an axis
            entries = None
        if entries is not None and len(entries) > _MOST_ENTRIES:
            raise ValueError(f"{name}: wanted {wanted}; got more than {_MOST_ENTRIES} entries")
        if entries is not None:
            return entries
    raise TypeError(f"{name}: wanted {wanted}; got {brief(value)}")


def read_array(name: str, value: Any, kinds: str, wanted: str) -> np.ndarray:
    """Numbers as a numpy array whose kind is one of ``kinds``.

    Raises:
        TypeError: anything else, lists of unequal lengths among them.
    """
    if not isinstance(value, (np.ndarray, Tensor, Real)):
        value = read_list(name, value, wanted)
    try:
        if isinstance(value, Tensor):
            there = value.detach().cpu()
            array = np.asarray(there.float() if there.dtype == torch.bfloat16 else there)
        else:
            array = np.asarray(float(value) if isinstance(value, Fraction) else value)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        array = np.asarray(None)
    if not array.size and not isinstance(value, (np.ndarray, Tensor)):
        array = array.astype(np.int64 if "i" in kinds else float)  # an empty list
    if array.dtype.kind not in kinds:
        raise TypeError(f"{name}: wanted {wanted}; got {brief(value)}")
    return array


def check_layers(layers: Any) -> tuple[int, ...]:
    """Layer indices as a tuple of ints.

    Raises:
        ValueError: none, one twice, or something that is not an integer.
    """
    wanted = "one or more indices in a list, each once"
    try:
        given = [plain(x) for x in read_list("layers", layers, wanted)]
    except TypeError as error:
        raise ValueError(str(error)) from None
    integers = all(isinstance(x, Integral) and not isinstance(x, bool) for x in given)
    if not given or not integers or len(set(given)) != len(given):
        raise ValueError(f"layers: wanted {wanted}; got {brief(layers)}")
    return tuple(int(x) for x in given)


# -- settings -----------------------------------------------------------------------------------


def check_fields(settings: Any) -> None:
    """The fields of a frozen dataclass, as plain values of the types that it declares.

    Integers are at least 0, numbers finite and at least 0: no setting has others.

    Raises:
        TypeError, ValueError: a field of another kind.
    """
    for name, kind in _hints(type(settings)).items():  # type: ignore[arg-type]
        object.__setattr__(settings, name, _field(name, getattr(settings, name), kind))


class Settings:
    """A frozen dataclass whose fields :func:`check_fields` has checked."""

    def __post_init__(self) -> None:
        check_fields(self)


@lru_cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _field(name: str, value: Any, kind: Any) -> Any:
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in of:
            return None
        return _field(name, value, next(k for k in of if k is not NoneType))
    if origin is Literal:
        return check_choice(name, value, of)
    if origin is tuple:
        return tuple(_field(name, x, of[0]) for x in read_list(name, value, "a list"))
    if kind is bool:
        return check_booleans(**{name: value})[0]
    if kind is int:
        return check_integers(**{name: (value, 0, SEEDS)})[0]
    if kind is float:
        return check_number(name, value, "a finite number >= 0", lambda x: 0 <= x < math.inf)
    if kind is str:
        return check_text(name, value)
    check_kind(name, value, kind, f"a {kind.__name__}")
    return value
