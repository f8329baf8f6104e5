"""Checks that values of a report's file are those that a call gives; else they raise `Unsound`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import numpy as np

from hooks.reports.files import Unsound

MOST: Final = 1 << 53
"""What no count reaches."""
_INDEX: Final = 1 << 31
_HUGE: Final = 1e100  # a number whose square still is one
_SOMETIMES: Final = {"given": tuple[str, ...], "centred": tuple[str, ...]}
"""Facts that few models have."""


# -- the header -------------------------------------------------------------------------------


def as_kind(kind: Any, value: Any, field: str) -> Any:
    """A JSON value as a type: lists become tuples, objects settings; the rest is not converted."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        some = next(k for k in inner if k is not NoneType)
        return None if value is None else as_kind(some, value, field)
    if origin is Literal:
        if value not in inner or not isinstance(value, str):
            raise _unlike(field, f"one of {list(inner)}", value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _unlike(field, "a list", value)
        return tuple(as_kind(inner[0], x, f"{field}[{i}]") for i, x in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _as_settings(kind, value, field)
    plain = {Mapping: dict}.get(origin, kind)
    if plain is dict and isinstance(value, dict) and inner[1:] not in ((), (Any,)):
        for name, one in value.items():
            as_kind(inner[1], one, f"{field}.{name}")
    if type(value) is not plain:
        raise _unlike(
            field, {dict: "an object"}.get(plain, f"a value of type {plain.__name__}"), value
        )
    if plain is float and not math.isfinite(value):
        raise _unlike(field, "a finite number", value)
    return value


def _as_settings(kind: Any, value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        raise _unlike(field, "an object", value)
    hints = get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    for name in sorted(needed - {*value}):
        raise Unsound(f"{field}.{name}", wanted="a value", got="none")
    for name in sorted({*value} - {*hints}):
        raise Unsound(field, wanted=f"only {sorted(hints)}", got=f"{name!r:.80}")
    return kind(**{n: as_kind(hints[n], x, f"{field}.{n}") for n, x in value.items()})


def check_facts(model: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Check that the facts that a report reads exist and have their types; others may be any."""
    for name, kind in facts.items():
        if name not in model:
            raise Unsound(f"model.{name}", wanted="a value", got="none")
        as_kind(kind, model[name], f"model.{name}")
    for name in _SOMETIMES.keys() & model.keys():
        as_kind(_SOMETIMES[name], model[name], f"model.{name}")


def check_texts(head: Mapping[str, Any]) -> None:
    """Check for as many decoder texts as prompts, or none, and for valid indices."""
    prompts = len(head["tokens"])
    if not prompts and not getattr(head["settings"], "pooled", False):  # a shard may have none
        raise Unsound("tokens", wanted="one prompt or more", got="none")
    if len(head.get("decoder_tokens", ())) not in (0, prompts):
        got = str(len(head["decoder_tokens"]))
        raise Unsound("decoder_tokens", wanted=f"none, or those of {prompts} prompts", got=got)
    _check_documents(head.get("starts", ()), head["tokens"])
    if not 0 <= head.get("first_prompt", 0) < _INDEX:
        raise _unlike("first_prompt", f"an integer from 0 to {_INDEX - 1}", head["first_prompt"])
    layers = getattr(head["settings"], "layers", ())
    if layers is not None and not all(0 <= layer < _INDEX for layer in layers):
        raise _unlike("settings.layers", "block indices", layers)


def _check_documents(starts: Sequence[Sequence[int]], tokens: Sequence[Sequence[str]]) -> None:
    """Check that each prompt's first tokens ascend from 0, or that there are none."""
    if starts and len(starts) != len(tokens):
        raise Unsound("starts", wanted=f"those of {len(tokens)} prompts", got=str(len(starts)))
    for mine, row in zip(starts, tokens, strict=False):
        rising = all(a < b for a, b in pairwise(mine))
        # A pooled report leaves out the tokens of most prompts.
        if not mine or mine[0] != 0 or not rising or (row and mine[-1] >= len(row)):
            raise _unlike("starts", f"positions from 0 on, ascending, of {len(row)} tokens", mine)


def per_layer(settings: Any, model: Mapping[str, Any], *names: str) -> None:
    """Check facts of which each layer has one."""
    n = len(settings.layers)
    if not n:
        raise Unsound("settings.layers", wanted="one or more", got="none")
    for name in names:
        values = model[name]
        if len(values) != n:
            raise Unsound(f"model.{name}", wanted=f"{n}, one for each layer", got=f"{len(values)}")
        if not all(value and (isinstance(value, str) or 0 < value < _INDEX) for value in values):
            raise _unlike(f"model.{name}", "names, or numbers above 0", values)


def _unlike(field: str, wanted: str, value: Any) -> Unsound:
    try:
        said = f"{value!r:.80}"
    except ValueError:  # an integer of more digits than Python prints
        said = "a number of thousands of digits"
    return Unsound(field, wanted=wanted, got=said)


# -- arrays -----------------------------------------------------------------------------------


def check_numbers(
    field: str,
    array: Any,
    least: Any = -_HUGE,
    most: Any = _HUGE,
    *,
    nan: Any = False,
    infinite: bool = False,
) -> None:
    """Refuse numbers outside [least, most].

    Args:
        field: its name.
        array: the numbers.
        least, most: a number, or as many as the array.
        nan: whether, or where, NaN is allowed.
        infinite: whether infinity is allowed, whatever the range.
    """
    # A comparison in float32 could not even hold the ends of the range.
    values = np.atleast_1d(array.astype(float) if array.dtype.kind == "f" else array)
    low, high = (np.broadcast_to(x, values.shape) for x in (least, most))
    good = (values >= low) & (values <= high)
    if values.dtype.kind == "f":
        good |= np.isnan(values) & nan
        if infinite:
            good |= np.isposinf(values)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        wanted = f"a number from {low[at]:.6g} to {high[at]:.6g}"
        raise Unsound(f"{field}{list(at)}", wanted=wanted, got=f"{values[at]}")


def check_counts(report: Any, *names: str, most: Any = MOST) -> None:
    """Refuse counts that are negative or too large."""
    for name in names:
        check_numbers(name, getattr(report, name), 0, most)


def check_sums(report: Any, *names: str, most: Any) -> None:
    """Refuse sums of probabilities that are negative or too large by more than rounding."""
    for name in names:
        check_numbers(name, getattr(report, name), -1e-6, most * (1 + 1e-6) + 1e-6)


def check_word(field: str, word: str, known: Sequence[str]) -> None:
    """Refuse any word but these."""
    if word not in known:
        raise _unlike(field, f"one of {list(known)}", word)


def check_ascending(field: str, numbers: Sequence[Any]) -> None:
    """Refuse numbers that do not ascend, and an empty array."""
    if not numbers or any(b <= a for a, b in pairwise(numbers)):
        raise _unlike(field, "one or more numbers, ascending", list(numbers))


def check_starts(field: str, start: np.ndarray, rows: int, entries: int, *, least: Any = 1) -> None:
    """Check where each row's entries begin: from 0 to all of them, at least ``least`` per row."""
    if len(start) != rows + 1:
        raise Unsound(field, wanted=f"{rows + 1} edges of {rows} rows", got=f"{len(start)}")
    ends = (int(start[0]), int(start[-1]))
    if ends != (0, entries) or (start < 0).any() or (start > entries).any():
        raise Unsound(field, wanted=f"edges from 0 to {entries}", got=f"{ends[0]} to {ends[1]}")
    check_numbers(f"{field}: entries of row ", np.diff(start), least, max(entries, 1))
