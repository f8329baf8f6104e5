"""What a figure shows, separate from how it is drawn: prepared once, drawn by two libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hooks.arguments import brief, check_choice, check_kind, read_list

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Backend = Literal["matplotlib", "plotly"] | str
Number = float | int
Legend = Literal["best", "upper left"]
Ticks = Literal["auto", "log", "plain", "thousands"]


@dataclass(frozen=True)
class Axis:
    """One axis: its label with unit, its scale, its ends and its ticks."""

    label: str
    scale: Literal["linear", "log"] = "linear"
    low: Number | None = None
    high: Number | None = None
    ticks: Ticks = "auto"
    named: tuple[tuple[Number, str], ...] = ()  # ticks of their own, with these names


@dataclass(frozen=True, eq=False)
class Line:
    """Points, a line through them, or both, perhaps with error bars."""

    x: np.ndarray
    y: np.ndarray
    label: str
    colour: str
    dash: str = "-"  # as in matplotlib; "none": points alone
    width: Number = 1.2
    marker: Number = 0  # size; 0 for none
    bars: bool = False  # drawn as points with error bars, also where the error is None
    error: np.ndarray | None = None
    steps: bool = False


@dataclass(frozen=True, eq=False)
class Band:
    """The area between two curves."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    label: str
    colour: str
    opacity: Number = 0.25


@dataclass(frozen=True, eq=False)
class Bars:
    """A histogram: its bins' left ends, their width, their heights."""

    left: np.ndarray
    width: Number
    height: np.ndarray
    label: str
    colour: str


@dataclass(frozen=True)
class Mark:
    """A published number: a diamond with a name beside it."""

    x: Number
    y: Number
    text: str


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    x: Axis
    y: Axis
    title: str = ""
    lines: Sequence[Line] = ()
    bands: Sequence[Band] = ()
    bars: Sequence[Bars] = ()
    marks: Sequence[Mark] = ()
    levels: Sequence[tuple[Number, str]] = ()  # horizontal lines: height, colour
    note: str = ""  # shown in the middle where there is nothing to draw
    legend: Legend | None = "best"
    scale: tuple[Number, Number, str] | None = None  # a colour bar in the legend's place
    extra: dict[str, Any] = field(default_factory=dict)


def check_backend(backend: str, ax: Axes | Sequence[Axes] | np.ndarray | None) -> None:
    """Refuse an unknown library, and a matplotlib axis beside plotly.

    Raises:
        ValueError: either of them.
    """
    check_choice("backend", backend, ("matplotlib", "plotly"))
    if backend == "plotly" and ax is not None:
        raise ValueError("ax: wanted None with backend='plotly', which makes its own; got an axis")


def axes_in(ax: Any, n: int, what: str, *, more: bool = False) -> list[Any]:
    """This many matplotlib axes (or more), from one or from several in a list or an array.

    Raises:
        TypeError: something else.
        ValueError: another number of them.
    """
    from matplotlib.axes import Axes

    wanted = f"{n} of matplotlib's axes, {what}"
    if isinstance(ax, Axes):
        found = [ax]
    elif isinstance(ax, np.ndarray):
        found = list(ax.ravel())
    else:
        found = read_list("ax", ax, wanted)
    for each in found:
        check_kind("ax", each, Axes, wanted)
    if len(found) < n or (len(found) > n and not more):
        raise ValueError(f"ax: wanted {wanted}; got {len(found)}")
    return found


def begin(x: np.ndarray, happens: np.ndarray) -> float:
    """The point before the first at which something happens; the first where nothing does."""
    return float(x[max(0, int(np.argmax(happens)) - 1)])


def named_reports(given: Any, what: str = "reports") -> dict[str, Any]:
    """Several reports by the name to show; one has no name. ``what``: the argument's name.

    Raises:
        ValueError: none.
    """
    named = dict(given) if isinstance(given, Mapping) else {"": given}
    if not named:
        raise ValueError(f"{what}: wanted at least one; got none")
    return {str(name): report for name, report in named.items()}


def numbers(what: str, frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """These columns as numbers.

    Raises:
        ValueError: a column of something else.
    """
    try:
        return frame.loc[:, list(columns)].astype(float)
    except (ValueError, TypeError) as error:
        wanted = f"numbers in the columns {', '.join(columns)}"
        raise ValueError(f"{what}: wanted {wanted}; got {brief(str(error))}") from error


def check_report(what: str, given: Any, *wanted: str) -> None:
    """Refuse what a figure can't draw: it draws reports of `hooks`, or a DataFrame.

    Raises:
        TypeError: names what was wanted.
    """
    import pandas as pd

    import hooks

    kinds = tuple(pd.DataFrame if n == "DataFrame" else getattr(hooks, n) for n in wanted)
    if not isinstance(given, kinds):
        raise TypeError(f"{what}: wanted a {' or a '.join(wanted)}; got {type(given).__name__}")
