"""What the experiments' figures share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pandas as pd

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


def groups(table: pd.DataFrame) -> list[str]:
    """Groups of models in the table's order."""
    return list(dict.fromkeys(table["group"]))


def label(group: str, placement: str) -> str:
    """How a group is called in a legend: its placement, and in brackets what it is."""
    name = PLACEMENT_NAMES.get(placement, "")
    return f"{name} ({group})" if name else group
