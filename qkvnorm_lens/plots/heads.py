"""The map of heads: at which noise each of them collapses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hooks.arguments import brief, check_integers, check_number, read_list
from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.collapse import title_of

if TYPE_CHECKING:
    from hooks import CollapseReport

NO_ROWS, NEVER = "#F7F7F7", "#BDBDBD"
_MAP = "viridis"
_MOST_CELLS = 256  # beyond this a number in each cell can't be read


@dataclass(frozen=True, eq=False)
class HeadCells:
    """What the map shows: sigma in percent and sparse rows, layers by heads."""

    sigma: np.ndarray
    counts: np.ndarray
    few: np.ndarray
    layers: list[str]
    bar: str
    title: str
    few_means: str

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the colour scale."""
        return _ends([self])


def _ends(maps: Sequence[HeadCells]) -> tuple[float, float]:
    """The ends of a colour scale for all of these maps."""
    sigma = np.concatenate([cells.sigma.ravel() for cells in maps])
    finite = sigma[np.isfinite(sigma) & (sigma > 0)]
    low, high = (finite.min(), finite.max()) if finite.size else (1.0, 50.0)
    if high < 1.05 * low:
        low, high = low / 1.5, high * 1.5
    return float(low), float(high)


def head_cells(
    report: CollapseReport, rate: float = 0.01, *, content: bool = False, min_rows: int = 20
) -> HeadCells:
    """The numbers behind :func:`head_map`."""
    sigma = report.sigma_at(rate, by="head", content=content)
    rate = float(rate)
    assert isinstance(sigma, pd.DataFrame)
    values = 100 * sigma.to_numpy()
    counts = (report.rows[..., 0] if content else report.rows.sum(-1)).sum(-1)
    rows = "sparse rows without sinks" if content else "sparse rows"
    return HeadCells(
        sigma=values,
        counts=counts,
        few=counts < min_rows,
        # Block numbers alone, but for stacks: E, D and X for encoder, decoder, cross-attention.
        layers=[label.removeprefix("L") for label in report.model["labels"]],
        bar=f"σ at which {100 * rate:g}% of a head's\n{rows} collapse (%)",
        title=title_of(report),
        few_means=f"fewer than {min_rows} sparse rows",
    )


def head_map(
    report: CollapseReport | Mapping[str, CollapseReport],
    rate: float = 0.01,
    ax: charts.Axes | Sequence[charts.Axes] | np.ndarray | None = None,
    *,
    content: bool = False,
    min_rows: int = 20,
    limits: Sequence[charts.Number] | None = None,
    backend: charts.Backend = "matplotlib",
) -> charts.Figure | Any:
    """Sigma at which a share ``rate`` of a head's sparse rows collapses, layers by heads.

    The cells are ``report.sigma_at(rate, by="head")`` in percent, on a logarithmic colour scale:
    dark heads collapse first. Grey: never within the law. Pale: no sparse rows. A number in
    brackets, or a dot in a large map, means fewer than ``min_rows`` sparse rows.

    Args:
        report: what :func:`hooks.collapse_probe` gave, or several by the name to show: side by
            side, on one scale.
        rate: share of a head's sparse rows.
        ax: draw here, with an axis for each of several; default: a new figure.
        content: leave attention sinks out.
        min_rows: heads with fewer sparse rows are marked.
        limits: ends of the colour scale in percent, for maps drawn one by one; default: those of
            the cells.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Returns:
        The figure that holds the axis, or a figure of plotly's.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of report.
        ValueError: from :meth:`hooks.CollapseReport.sigma_at`; no report, limits that do not rise,
            another ``backend``, another number of axes, or an axis beside plotly.
    """
    charts.check_backend(backend, ax)
    (min_rows,) = check_integers(min_rows=(min_rows, 0))
    maps = []
    for name, each in charts.named_reports(report, "report").items():
        charts.check_report("report", each, "CollapseReport")
        cells = head_cells(each, rate, content=content, min_rows=min_rows)
        maps.append(replace(cells, title=name or cells.title))
    ends = _ends(maps) if limits is None else _read_limits(limits)
    n_layers = max(len(cells.layers) for cells in maps)
    width = sum(min(3.0 + 0.45 * cells.sigma.shape[1], 12.0) for cells in maps)
    size = (max(width, 5.6), max(min(1.6 + 0.25 * n_layers, 10.0), 3.2))
    if backend == "plotly":
        return _with_plotly(maps, ends, size)
    if ax is None:
        figure = charts.new_figure(size)
        axes = list(np.ravel(figure.subplots(1, len(maps))))
    else:
        axes = charts.axes_in(ax, len(maps), "one for each map")
        figure = charts.top_figure(axes[0])
    images = [_map(each, cells, ends) for each, cells in zip(axes, maps, strict=True)]
    bar = figure.colorbar(images[-1], ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(maps[0].bar)
    charts.log_ticks(bar.ax.yaxis, ends)
    return figure


def _map(ax: charts.Axes, cells: HeadCells, ends: tuple[float, float]) -> Any:
    """One map with its key; returns the image."""
    image = _cells(ax, cells, ends)
    few = _marks(ax, cells, image)
    _key(ax, cells.sigma, f"{few}  {cells.few_means}" if few else "")
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    _integer_ticks(ax, cells.sigma.shape[1], cells.layers)
    ax.set_title(cells.title, fontsize=9, loc="left")
    return image


def _read_limits(limits: Any) -> tuple[float, float]:
    wanted = "two rising numbers > 0, percent"
    given = [
        check_number("limits", x, wanted, lambda x: x > 0)
        for x in read_list("limits", limits, wanted)
    ]
    if len(given) != 2 or given[0] >= given[1]:
        raise ValueError(f"limits: wanted {wanted}; got {brief(limits)}")
    return given[0], given[1]


def _with_plotly(
    maps: Sequence[HeadCells], ends: tuple[float, float], size: tuple[float, float]
) -> Any:
    from qkvnorm_lens.plots.charts import graph_objects, lay_out

    graph_objects()
    from plotly.subplots import make_subplots

    names = [charts.plain_text(cells.title) for cells in maps] if len(maps) > 1 else None
    figure = make_subplots(rows=1, cols=len(maps), subplot_titles=names)
    for col, cells in enumerate(maps, 1):
        _traces(figure, col, cells, ends, last=col == len(maps))
    lay_out(figure, "" if names else maps[0].title, size)
    figure.update_layout(plot_bgcolor=NO_ROWS)
    figure.update_xaxes(title="head", showgrid=False, zeroline=False)
    figure.update_yaxes(title="layer", showgrid=False, zeroline=False)
    return figure


def _traces(
    figure: Any, col: int, cells: HeadCells, ends: tuple[float, float], *, last: bool
) -> None:
    """One map's cells, with the colour bar beside the last."""
    from qkvnorm_lens.plots.charts import graph_objects

    go = graph_objects()
    values = cells.sigma
    low, high = ends
    shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    text = [
        [_in_words(value, int(n)) for value, n in zip(row, counts, strict=True)]
        for row, counts in zip(values, cells.counts, strict=True)
    ]
    ticks = charts.ticks_between(low, high)
    never = np.where(np.isinf(values), 1.0, np.nan)
    grey = {"colorscale": [[0, NEVER], [1, NEVER]], "showscale": False}
    bar = {
        "title": {"text": cells.bar.replace("\n", "<br>"), "side": "right"},
        "tickvals": [math.log10(t) for t in ticks],
        "ticktext": [f"{t:g}" for t in ticks],
    }
    scale = {
        "colorscale": "Viridis",
        "zmin": math.log10(low),
        "zmax": math.log10(high),
        "showscale": last,
    }
    n_layers, n_heads = values.shape
    shared = {"x": np.arange(n_heads), "y": np.arange(n_layers), "xgap": 1, "ygap": 1}
    shared["hovertemplate"] = "layer %{y}, head %{x}<br>%{text}<extra></extra>"
    for z, given in ((never, grey), (np.log10(shown), {**scale, "colorbar": bar})):
        figure.add_trace(go.Heatmap(z=z, text=text, **shared, **given), row=1, col=col)
    figure.update_yaxes(tickvals=list(range(n_layers)), ticktext=cells.layers, row=1, col=col)


def _in_words(value: float, rows: int) -> str:
    said = "never" if math.isinf(value) else f"σ = {value:.3g}%"
    return "no sparse rows" if math.isnan(value) else f"{said}, {rows:,} sparse rows"


def _cells(ax: charts.Axes, cells: HeadCells, ends: tuple[float, float]) -> Any:
    """The image; "never" and "no rows" have their own colours."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    values = cells.sigma
    shown = np.where(np.isinf(values), 1e9, np.clip(values, *ends))
    image = ax.imshow(
        np.ma.masked_invalid(shown),
        cmap=colormaps[_MAP].with_extremes(bad=NO_ROWS, over=NEVER),
        norm=LogNorm(*ends),
        aspect="auto",
        interpolation="nearest",
        origin="lower",
    )
    for at in range(1, values.shape[1]):
        ax.axvline(at - 0.5, color="white", linewidth=0.5)
    for at in range(1, values.shape[0]):
        ax.axhline(at - 0.5, color="white", linewidth=0.5)
    return image


def _marks(ax: charts.Axes, cells: HeadCells, image: Any) -> str:
    """Sigma as a number in each cell where there is room; few rows in brackets, or a dot.

    Returns the mark of few rows, if there is one.
    """
    written = cells.sigma.size <= _MOST_CELLS
    mark = ""
    for (layer, head), value in np.ndenumerate(cells.sigma):
        few = cells.few[layer, head]
        if not math.isfinite(value) or not (written or few):
            continue
        dark = sum(image.cmap(image.norm(value))[:3]) < 1.5
        text = (f"{value:.2g}" if value < 9.95 else f"{value:.0f}") if written else "·"
        if few:
            mark = "( )" if written else "·"
            text = f"({text})" if written else text
        ink = "white" if dark else "black"
        ax.text(head, layer, text, ha="center", va="center", fontsize=7, color=ink)
    return mark


def _key(ax: charts.Axes, values: np.ndarray, few: str) -> None:
    """What grey, pale and marked cells mean, under the map."""
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    handles = [
        Patch(facecolor=colour, edgecolor=charts.GREY, linewidth=0.5, label=label)
        for colour, label, there in (
            (NEVER, "never", np.isinf(values).any()),
            (NO_ROWS, "no sparse rows", np.isnan(values).any()),
        )
        if there
    ]
    if few:
        handles.append(Patch(facecolor="none", edgecolor="none", label=few))
    if not handles:
        return
    top: Any = ax.figure
    width = ax.get_position().width * top.get_size_inches()[0]  # a narrow map has a narrow key
    below = ScaledTranslation(0, -0.42, top.dpi_scale_trans)  # inches: clear of the axis label
    ax.legend(
        handles=handles,
        frameon=False,
        fontsize=8,
        ncols=3 if width > 4 else 1,
        handlelength=1.5,
        columnspacing=1.2,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=ax.transAxes + below,
        borderaxespad=0,
    )


def _integer_ticks(ax: charts.Axes, n_heads: int, layers: list[str]) -> None:
    across, up = (1 + (n - 1) // 16 for n in (n_heads, len(layers)))
    ax.set_xticks(range(0, n_heads, across))
    ax.set_yticks(range(0, len(layers), up), layers[::up])
