"""What the experiments' figures share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from qkvnorm_lens.experiments.core.stats import Mean
from qkvnorm_lens.plots.charts import BLUE, GREEN, GREY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final = {"none": GREEN, "pre": BLUE, "qkv": ORANGE, "": GREY}
PLACEMENT_NAMES: Final = {"none": "No-Norm", "pre": "Pre-Norm", "qkv": "QKV-Norm", "": ""}


def panels(
    rows: int, columns: int, *, width: float = 3.4, height: float = 3.0, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row."""
    figure = new_figure((width * columns, height * rows))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    return figure, list(axes.ravel())


def error_bar(ax: Axes, at: float, found: Mean, *, across: bool = False, **style: Any) -> None:
    """A mean with its 95% interval, in percent; ``across``: from left to right."""
    value, half = 100 * found.value, 0.0 if math.isnan(found.half) else 100 * found.half
    place: dict[str, Any] = {"x": at, "y": value, "yerr": half}
    if across:
        place = {"x": value, "y": at, "xerr": half}
    ax.errorbar(**{**place, "linestyle": "none", "capsize": 2, **style})


def legend_below(figure: Figure, ax: Axes, **more: Any) -> None:
    """One legend for all axes, that of one of them."""
    given = {"loc": "outside lower center", "ncols": 3, "fontsize": 8, **more}
    figure.legend(*ax.get_legend_handles_labels(), **given)


def groups(table: pd.DataFrame) -> list[str]:
    """Groups of models in the table's order."""
    return list(dict.fromkeys(table["group"]))


def label(group: str, placement: str) -> str:
    """How a group is called in a legend: its placement, and in brackets what it is."""
    name = PLACEMENT_NAMES.get(placement, "")
    return f"{name} ({group})" if name else group
