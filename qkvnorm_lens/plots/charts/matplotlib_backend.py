"""Draws a chart with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkvnorm_lens.plots.charts.chart import Axis, Chart, Line, Number
from qkvnorm_lens.plots.charts.style import (
    GREY,
    INK,
    PUBLISHED,
    PUBLISHED_LABEL,
    grid,
    log_ticks,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP = "viridis"
_FEW = 6  # names that a legend inside the axes has room for


def draw_chart(chart: Chart, ax: Axes, figure: Figure, *, with_legend: bool = True) -> None:
    """Draw on one axis."""
    handles: list[Any] = []
    for band in chart.bands:
        look: dict[str, Any] = {"color": band.colour, "alpha": band.opacity, "linewidth": 0}
        handles.append(ax.fill_between(band.x, band.low, band.high, label=band.label, **look))
    for bars in chart.bars:
        edges = np.append(bars.left, bars.left[-1:] + bars.width)
        least = float(chart.y.low or 0.0)  # a log axis has no zero to stand on
        height = np.maximum(bars.height, least)
        fill: dict[str, Any] = {"fill": True, "alpha": 0.55, "linewidth": 0}
        handles.append(ax.stairs(height, edges, baseline=least, color=bars.colour, **fill))
        handles[-1].set_label(bars.label)
    handles += [_line(line, ax, chart.y.low) for line in chart.lines]
    for height, colour in chart.levels:
        ax.axhline(height, color=colour, linewidth=0.8, linestyle=":", zorder=0)
    _scale(ax, chart)
    for name, axis in (("x", chart.x), ("y", chart.y)):
        _axis(ax, name, axis)
    handles += _marks(ax, chart)
    grid(ax)
    if chart.title:
        ax.set_title(chart.title, fontsize=9, loc="left")
    if chart.note:
        ax.text(0.5, 0.5, chart.note, transform=ax.transAxes, ha="center", color=GREY)
    if chart.scale is not None:
        _colour_bar(chart.scale, ax, figure)
        return
    named = [h for h in handles if not str(h.get_label()).startswith("_")]
    if with_legend and chart.legend and named:
        size = 9 if chart.extra.get("large") else 8
        place: dict[str, Any] = {"loc": chart.legend}
        if len(named) > _FEW:  # so many would cover the curves
            place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        ax.legend(handles=named, frameon=False, fontsize=size, **place)


def _line(line: Line, ax: Axes, floor: Number | None) -> Any:
    style: dict[str, Any] = {"color": line.colour, "label": line.label, "linewidth": line.width}
    style["linestyle"] = line.dash
    if line.marker:
        style |= {"marker": "o", "markersize": line.marker}
    if line.bars:
        bars = None
        if line.error is not None:
            # On a log axis a bar that reaches zero ends below the axis.
            error = np.nan_to_num(line.error)
            least = 0.0 if floor is None else floor / 10
            bars = np.stack([np.clip(error, 0, np.maximum(line.y - least, 0)), error])
        return ax.errorbar(line.x, line.y, yerr=bars, capsize=2, elinewidth=1, **style)
    if line.steps:
        style["drawstyle"] = "steps-post"
    return ax.plot(line.x, line.y, **style)[0]


def _scale(ax: Axes, chart: Chart) -> None:
    if chart.x.low is not None or chart.x.high is not None:
        ax.set_xlim(chart.x.low, chart.x.high)
    if chart.y.low is not None or chart.y.high is not None:
        ax.set_ylim(chart.y.low, chart.y.high)
    for axis, scale in ((chart.x, ax.set_xscale), (chart.y, ax.set_yscale)):  # ends come first
        if axis.scale == "log":
            scale("log", nonpositive="mask")


def _axis(ax: Axes, name: str, axis: Axis) -> None:
    from matplotlib.ticker import EngFormatter

    of_it: Any = getattr(ax, f"{name}axis")
    if axis.named:
        of_it.set_ticks([at for at, _ in axis.named], [text for _, text in axis.named])
    elif axis.ticks == "log":
        known = axis.low is not None and axis.high is not None
        log_ticks(of_it, (axis.low, axis.high) if known else None)  # type: ignore[arg-type]
    elif axis.ticks == "plain":
        of_it.set_major_formatter(plain)
    elif axis.ticks == "thousands":
        of_it.set_major_formatter(EngFormatter(sep=""))
    of_it.set_label_text(axis.label)


def _marks(ax: Axes, chart: Chart) -> list[Any]:
    if not chart.marks:
        return []
    x, y = ([getattr(mark, n) for mark in chart.marks] for n in "xy")
    look: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": PUBLISHED}
    points = ax.plot(x, y, "D", markersize=5, zorder=5, label=PUBLISHED_LABEL, **look)
    beside: dict[str, Any] = {"xytext": (3, -5), "textcoords": "offset points", "fontsize": 7}
    beside |= {"rotation": -40, "rotation_mode": "anchor", "ha": "left", "va": "top"}
    for mark in chart.marks:
        ax.annotate(mark.text, (mark.x, mark.y), color=INK, **beside)
    return points


def _colour_bar(scale: tuple[float, float, str], ax: Axes, figure: Figure) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high, label = scale
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, high), layer_colours()), ax=ax, fraction=0.05, pad=0.02
    )
    bar.set_label(label)


def layer_colours() -> Any:
    """Dark for the first layers, light for the last."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[MAP](np.linspace(0, 0.9, 256)))  # yellow is lost on white
