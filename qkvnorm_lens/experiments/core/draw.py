"""What the experiments' figures share."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments.core.stats import Mean
from qkvnorm_lens.plots.charts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RUNS,
    Axes as Axes,
    Figure as Figure,
    Number,
    grid,
    new_figure,
    plain,
)

COLOURS: Final = {"none": GREEN, "pre": BLUE, "qk": RUNS[3], "qkv": ORANGE, "": GREY}
PLACEMENT_NAMES: Final = {
    "none": "No-Norm", "pre": "Pre-Norm", "qk": "QK-norm", "qkv": "QKV-Norm", "": "",
}  # fmt: skip


def panels(
    rows: int, columns: int, *, width: float = 3.4, height: float = 3.0, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row."""
    figure = new_figure((width * columns, height * rows))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    return figure, list(axes.ravel())


def finish(ax: Axes, title: str = "", *, size: Number = 10, **settings: Any) -> None:
    """Set labels, scales and ends (as ``Axes.set`` does, in their order), a title and a grid."""
    ax.set(**settings)
    if title:
        ax.set_title(title, fontsize=size)
    grid(ax)


def percents(ax: Axes, which: str, top: Number) -> None:
    """Axes ("x", "y", "xy") in percent, linear up to 0.1 and logarithmic above."""
    for name in which:
        getattr(ax, f"set_{name}scale")("symlog", linthresh=0.1, linscale=0.5)
        getattr(ax, f"set_{name}ticks")([0, 0.1, 1, 10, 100])
        getattr(ax, f"{name}axis").set_major_formatter(plain)
        getattr(ax, f"set_{name}lim")(-0.03, top)


def whole_numbers(ax: Axes) -> None:
    """Ticks of the x axis at integers alone."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def error_bar(ax: Axes, at: Number, found: Mean, *, across: bool = False, **style: Any) -> None:
    """A mean with its 95% interval, in percent; ``across``: from left to right."""
    value, sides = 100 * found.value, [[100 * side] for side in found.sides]
    place: dict[str, Any] = {"x": at, "y": value, "yerr": sides}
    if across:
        place = {"x": value, "y": at, "xerr": sides}
    ax.errorbar(**{**place, "linestyle": "none", "capsize": 2, **style})


def key(ax: Axes, **more: Any) -> None:
    """A small legend within an axis."""
    ax.legend(**{"fontsize": 7, "frameon": False, **more})


def legend_below(figure: Figure, *axes: Axes, **more: Any) -> None:
    """One legend for all axes, of what some of them show (or of ``handles``)."""
    given = {"loc": "outside lower center", "ncols": 3, "fontsize": 8, **more}
    if axes:
        both = [zip(*ax.get_legend_handles_labels()[::-1], strict=True) for ax in axes]
        shown = {name: handle for each in both for name, handle in each}
        given |= {"handles": list(shown.values()), "labels": list(shown)}
    figure.legend(**given)


def groups(table: pd.DataFrame) -> list[str]:
    """Groups of models in the table's order."""
    return list(dict.fromkeys(table["group"]))


def label(group: str, placement: str) -> str:
    """How a group is called in a legend: its placement, and in brackets what it is."""
    name = PLACEMENT_NAMES.get(placement, "")
    return f"{name} ({group})" if name else group
