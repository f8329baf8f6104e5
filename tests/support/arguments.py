"""Wrong and right arguments, and the rule for what a call makes of them.

A call gives a result, or refuses: ValueError, TypeError or OSError, whose message has the
argument's name, what was wanted and what was got, on one line of bounded length. Users run without
the shape checks that the tests have, and so does this.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.watching import shape_checks_off

LONGEST = 600  # characters of a message


class Odd:
    """A thing of no use, whose repr is broken too."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def _endless() -> Iterator[int]:
    while True:
        yield 1


POOL: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1": lambda: 1,
    "2": lambda: 2,
    "99": lambda: 99,
    "2**70": lambda: 2**70,
    "-2**70": lambda: -(2**70),
    "10**5000": lambda: 10**5000,
    "0.5": lambda: 0.5,
    "1.5": lambda: 1.5,
    "-0.5": lambda: -0.5,
    "1e400": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "nan": lambda: float("nan"),
    "1j": lambda: 1j,
    "Fraction": lambda: Fraction(1, 4),
    "Decimal": lambda: Decimal("0.25"),
    "empty text": lambda: "",
    "text": lambda: "a",
    "long text": lambda: "a" * 100_000,
    "near": lambda: "modle",
    "null": lambda: "a\0b",
    "bytes": lambda: b"q",
    "empty list": list,
    "[0]": lambda: [0],
    "[0, 0]": lambda: [0, 0],
    "[0.1]": lambda: [0.1],
    "[0.1, 'a']": lambda: [0.1, "a"],
    "[nan]": lambda: [float("nan")],
    "[None]": lambda: [None],
    "['a']": lambda: ["a"],
    "[[0, 1], [2]]": lambda: [[0, 1], [2]],
    "long list": lambda: list(range(10_000)),
    "tuple": lambda: (1, 0),
    "range": lambda: range(2),
    "generator": lambda: (i for i in (0, 1)),
    "endless": _endless,
    "set": lambda: {0},
    "dict": lambda: {"a": 1},
    "empty dict": dict,
    "object": object,
    "odd": Odd,
    "class": lambda: str,  # both can be called with anything
    "function": lambda: repr,
    "Path": lambda: Path("nowhere"),
    "here": lambda: ".",
    "np.int64": lambda: np.int64(2),
    "np.float32": lambda: np.float32(0.25),
    "np.bool_": lambda: np.bool_(True),
    "np.str_": lambda: np.str_("a"),
    "array()": lambda: np.array(2),
    "array(0.25)": lambda: np.array(0.25),
    "array[2]": lambda: np.array([0, 1]),
    "array[2, 2]": lambda: np.zeros((2, 2)),
    "array of objects": lambda: np.array([None, "a"], dtype=object),
    "tensor()": lambda: torch.tensor(2),
    "tensor(0.25)": lambda: torch.tensor(0.25),
    "tensor[1]": lambda: torch.tensor([0.25]),
    "tensor[2, 2]": lambda: torch.ones(2, 2),
    "meta": lambda: torch.empty((), device="meta"),
    "nan tensor": lambda: torch.full((2, 2), float("nan")),
}

REFUSALS = (ValueError, TypeError, OSError)


@dataclass(frozen=True)
class Call:
    """A public call with arguments that are right, of which one at a time is replaced.

    Attributes:
        call: what is called.
        right: its arguments by name.
        names: what a message may call an argument that is not its own name.
        slow: values of the pool that would only take long, by argument.
        skip: arguments that are not tried.
    """

    call: Callable[..., Any]
    right: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    slow: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skip: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Every argument but what takes any name."""
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        parameters = inspect.signature(self.call).parameters.values()
        return [p.name for p in parameters if p.kind not in kinds and p.name not in self.skip]

    def values(self, argument: str) -> list[str]:
        """Names of the values that are tried for an argument."""
        return [v for v in POOL if v not in self.slow.get(argument, ())]


def outcome(call: Call, argument: str, value: str) -> tuple[str, Any]:
    """``("result", it)``, ``("refused", message)``, or what breaks the rule as another word."""
    given = {name: make() for name, make in call.right.items()} | {argument: POOL[value]()}
    with shape_checks_off(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return "result", call.call(**given)
        except REFUSALS as error:
            message = str(error)
            name = call.names.get(argument, re.escape(argument))
            if not re.search(rf"(^|\W)({name})\b.*wanted.*; got ", message):
                return "unnamed", f"{type(error).__name__}: {message[:300]}"
            if "\n" in message or len(message) > LONGEST:
                return "long", message[:LONGEST]
            return "refused", message
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return "raw", f"{type(error).__name__}: {str(error)[:200]}"
