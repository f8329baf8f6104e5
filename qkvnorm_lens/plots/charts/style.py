"""What the figures share: colours, the axes to draw on, ticks on log axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:  # matplotlib is optional: annotations alone do not import it
    Axes = Figure = Any

# Okabe and Ito's colours, which people with colour-blindness can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
RUNS: Final = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GRID: Final = "#E5E5E5"
INK: Final = "#222222"
PUBLISHED: Final = "#000000"
PUBLISHED_LABEL: Final = "published (Menary et al. 2024)"
_DPI = 150


def top_figure(ax: Axes) -> Figure:
    """The figure that holds an axis, at any depth."""
    from matplotlib.figure import Figure

    parent: Any = ax.figure
    while not isinstance(parent, Figure):  # a figure within a figure
        parent = parent.figure
    return parent


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure unknown to pyplot that a notebook shows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from qkvnorm_lens.plots.charts.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install 'qkvnorm-lens[plots]'"
        ) from error
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes_of(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """The given axis with its top figure, or new ones."""
    if ax is not None:
        return top_figure(ax), ax
    figure = new_figure(size)
    return figure, figure.subplots()


def grid(ax: Axes) -> None:
    """Faint lines at the major ticks, behind what is drawn."""
    ax.grid(visible=True, which="major", color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def log_ticks(axis: Any, ends: tuple[float | int, float | int] | None = None) -> None:
    """Round numbers, plainly written: between known ends at least two of them."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    given = ends is not None
    locator = FixedLocator(ticks_between(*ends)) if given else LogLocator(subs=(1, 2, 3, 5))  # type: ignore[misc]
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(plain)


def plain(value: float, position: Any = None) -> str:
    """A number without an exponent."""
    return f"{value:g}"


def ticks_between(low: float | int, high: float | int) -> list[float]:
    """Round numbers from ``low`` to ``high`` for a log axis, at least two of them.

    1, 2, 5 and their multiples by ten (only 1 over many decades); more where they are too few.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))

    def between(steps: tuple[float, ...], powers: range) -> list[float]:
        values = [round(step * 10.0**power, 12) for power in powers for step in steps]
        return [v for v in values if low * 0.999 <= v <= high * 1.001]

    usual = (1.0,) if last - first > 4 else (1.0, 2.0, 5.0)
    for steps in (usual, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        found = between(steps, range(first, last + 1))
        if len(found) > 3:
            return found
    power = math.floor(math.log10(high - low))
    for size in (10.0**power, 10.0**power / 2, 10.0**power / 5):
        found = [
            round(n * size, 12) for n in range(math.ceil(low / size), math.floor(high / size) + 1)
        ]
        if len(found) > 1:
            return found
    return [float(low), float(high)]


def printable(text: str) -> str:
    """Text in the figures' font: other characters become their code points."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else f"\\u{ord(c):04x}" for c in text)
