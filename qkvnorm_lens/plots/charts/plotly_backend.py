"""Draws a chart with plotly, for turning and hovering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qkvnorm_lens.plots.charts.chart import Axis, Band, Chart, Line
from qkvnorm_lens.plots.charts.style import (
    GREY,
    GRID,
    INK,
    PUBLISHED,
    PUBLISHED_LABEL,
    ticks_between,
)

_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
_PIXELS = 110  # to an inch


def graph_objects() -> Any:
    """plotly.graph_objects.

    Raises:
        ImportError: plotly is not installed; names the extra.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError(
            "backend='plotly' needs plotly, which is not installed: "
            "pip install 'qkvnorm-lens[plots]'"
        ) from error
    return go


def draw_charts(charts: Sequence[Chart], size: tuple[float, float], *, together: bool) -> Any:
    """A plotly figure with the charts side by side."""
    go = graph_objects()
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(charts))
    for i, chart in enumerate(charts, 1):
        shown = (i == 1 or not together) and bool(chart.legend)
        for trace in _traces(go, chart, shown):
            figure.add_trace(trace, row=1, col=i)
        for height, colour in chart.levels:
            dotted = {"color": colour, "width": 1, "dash": "dot"}
            figure.add_hline(height, line=dotted, row=1, col=i)
        figure.update_xaxes(**_axis(chart.x), row=1, col=i)
        figure.update_yaxes(**_axis(chart.y), row=1, col=i)
        if chart.note:
            where = {"xref": "x domain", "yref": "y domain", "x": 0.5, "y": 0.5}
            figure.add_annotation(text=chart.note, showarrow=False, row=1, col=i, **where)
    lay_out(figure, charts[0].title, size)
    return figure


def lay_out(figure: Any, title: str, size: tuple[float, float]) -> None:
    """What every figure has in common."""
    figure.update_layout(
        width=_PIXELS * size[0],
        height=_PIXELS * size[1] + 40,
        title={"text": plain_text(title).replace("\n", "<br>"), "font": {"size": 13}, "x": 0.02},
        font={"size": 12, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 70, "r": 20, "t": 64 if title else 24, "b": 90},
        legend={"orientation": "h", "x": 0, "y": -0.2, "font": {"size": 11}},
        barmode="overlay",
        hovermode="closest",
    )


def plain_text(text: str) -> str:
    """Text that plotly shows as it is, markup included."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _traces(go: Any, chart: Chart, shown: bool) -> list[Any]:
    traces = [trace for band in chart.bands for trace in _band(go, band, shown)]
    traces += [
        go.Bar(
            x=bars.left + bars.width / 2,
            y=bars.height,
            width=bars.width,
            name=plain_text(bars.label),
            marker={"color": bars.colour, "opacity": 0.55, "line": {"width": 0}},
            showlegend=shown,
        )
        for bars in chart.bars
    ]
    traces += [_line(go, line, shown, chart) for line in chart.lines]
    if chart.marks:
        traces.append(
            go.Scatter(
                x=[mark.x for mark in chart.marks],
                y=[mark.y for mark in chart.marks],
                text=[plain_text(mark.text) for mark in chart.marks],
                mode="markers+text",
                textposition="bottom center",
                textfont={"size": 10},
                hovertemplate="%{text}<br>%{y:g}% at σ = %{x:g}%<extra></extra>",
                marker={"symbol": "diamond-open", "size": 9, "color": PUBLISHED},
                name=PUBLISHED_LABEL,
                showlegend=shown,
            )
        )
    return traces


def _line(go: Any, line: Line, shown: bool, chart: Chart) -> Any:
    mode = "+".join(
        word for word, there in (("lines", line.dash != "none"), ("markers", line.marker)) if there
    )
    y = np.where(line.y > 0, line.y, np.nan) if chart.y.scale == "log" else line.y
    return go.Scatter(
        x=line.x,
        y=y,
        mode=mode or "lines",
        name=plain_text(line.label),
        legendgroup=line.label,
        line={
            "color": line.colour,
            "width": 1.3 * line.width,
            "dash": _DASHES.get(line.dash, "solid"),
            "shape": "hv" if line.steps else "linear",
        },
        marker={"color": line.colour, "size": 1.7 * line.marker or 6},
        error_y=None
        if line.error is None
        else {"type": "data", "array": np.nan_to_num(line.error), "thickness": 1, "width": 3},
        showlegend=shown and bool(line.label),
    )


def _band(go: Any, band: Band, shown: bool) -> list[Any]:
    edge: dict[str, Any] = {"x": band.x, "mode": "lines", "line": {"width": 0}}
    red, green, blue = (int(band.colour[i : i + 2], 16) for i in (1, 3, 5))
    return [
        go.Scatter(y=band.low, showlegend=False, hoverinfo="skip", **edge),
        go.Scatter(
            y=band.high,
            fill="tonexty",
            fillcolor=f"rgba({red},{green},{blue},{band.opacity})",
            name=plain_text(band.label),
            showlegend=shown and bool(band.label),
            **edge,
        ),
    ]


def _axis(axis: Axis) -> dict[str, Any]:
    said: dict[str, Any] = {
        "title": {"text": plain_text(axis.label).replace("\n", "<br>")},
        "type": axis.scale,
        "gridcolor": GRID,
        "linecolor": GREY,
        "ticks": "outside",
        "zeroline": False,
    }
    log = axis.scale == "log"
    if axis.low is not None or axis.high is not None:
        ends = [axis.low, axis.high]
        said["range"] = [None if e is None else float(np.log10(e)) if log else e for e in ends]
    if axis.named:
        said |= {
            "tickvals": [at for at, _ in axis.named],
            "ticktext": [plain_text(text) for _, text in axis.named],
        }
    elif log and axis.low is not None and axis.high is not None:
        at = ticks_between(axis.low, axis.high)
        said |= {"tickvals": at, "ticktext": [f"{v:g}" for v in at]}
    elif axis.ticks == "thousands":
        said["tickformat"] = "~s"
    return said
