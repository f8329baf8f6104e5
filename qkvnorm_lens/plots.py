"""Figures of a collapse report: a report goes in, a matplotlib ``Figure`` comes out.

Nothing is shown and no global setting of matplotlib is read or changed: save a figure with
``figure.savefig(path)``; a notebook shows the one that a cell ends with (under ``%matplotlib
inline``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hooks import CollapseReport

# Okabe and Ito's colours, which people with colour-blindness can tell apart.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
_MAP = "viridis"
_NO_ROWS, _NEVER = "#F7F7F7", "#BDBDBD"
_DPI = 150
_LEAST_SHARE = 0.01  # percent; below this the curve counts less than one row in 10,000
_CURVE_POINTS = 60
_MOST_CELLS = 256  # beyond this a number in each cell can't be read


def collapse_curve(
    report: CollapseReport, ax: Axes | None = None, *, by: Literal["model", "layer"] = "model"
) -> Figure:
    """Share of sparse rows that collapse against sigma, both in percent on log axes.

    Menary et al. 2024, Fig. 3. Points are ``report.to_frame(by)``; rates below 0.01% lie under the
    axis.

    Args:
        report: what :func:`hooks.collapse_probe` gave.
        ax: draw here; default: a new figure.
        by: ``"model"``: collapse (with the exact curve behind the points where it was sampled),
            sinks left out, the centred gauge, and strict collapse with error bars over draws.
            ``"layer"``: collapse, a line per layer.

    Returns:
        The figure that holds the axis.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another ``by``.
    """
    if by not in ("model", "layer"):
        raise ValueError(f"by: wanted 'model' or 'layer'; got {by!r}")
    figure, ax = _axes(ax, (6.4, 4.2))
    if by == "model":
        _model_lines(report, ax)
    else:
        _layer_lines(report, figure, ax)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(_LEAST_SHARE, 100)
    ax.axhline(1, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xlabel("RMS of the relative change of norms, σ (%)")
    ax.set_ylabel("sparse rows whose arg max moves (%)")
    _log_ticks(ax.xaxis)
    ax.yaxis.set_major_formatter(_plain)
    ax.grid(visible=True, which="major", color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)
    _title(report, ax)
    if not report.n_sparse:
        ax.text(0.5, 0.5, "no sparse rows", transform=ax.transAxes, ha="center", color=_GREY)
    return figure


def head_map(
    report: CollapseReport,
    rate: float = 0.01,
    ax: Axes | None = None,
    *,
    content: bool = False,
    min_rows: int = 20,
) -> Figure:
    """Sigma at which a share ``rate`` of a head's sparse rows collapses, layers by heads.

    The cells are ``report.sigma_at(rate, by="head")`` in percent, on a logarithmic colour scale:
    dark heads go first. Grey: never within the law. Pale: no sparse rows. A number in brackets, or
    a dot in a large map, stands for fewer than ``min_rows`` sparse rows.

    Args:
        report: what :func:`hooks.collapse_probe` gave.
        rate: share of a head's sparse rows.
        ax: draw here; default: a new figure.
        content: leave attention sinks out.
        min_rows: heads with fewer sparse rows are marked.

    Returns:
        The figure that holds the axis.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: from :meth:`hooks.CollapseReport.sigma_at`.
    """
    sigma = report.sigma_at(rate, by="head", content=content)
    assert isinstance(sigma, pd.DataFrame)
    values = 100 * sigma.to_numpy()
    n_layers, n_heads = values.shape
    size = (min(3.0 + 0.45 * n_heads, 12.0), min(1.8 + 0.36 * n_layers, 12.0))
    figure, ax = _axes(ax, (max(size[0], 5.6), max(size[1], 2.8)))
    counts = (report.rows[..., 0] if content else report.rows.sum(-1)).sum(-1)
    image = _cells(ax, values)
    _marks(ax, values, counts, min_rows, image)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    _integer_ticks(ax, n_heads, [str(layer) for layer in sigma.index])
    rows = "sparse rows without sinks" if content else "sparse rows"
    bar = figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
    bar.set_label(f"σ at which {100 * rate:g}% of a head's\n{rows} collapse (%)")
    _log_ticks(bar.ax.yaxis)
    _title(report, ax)
    return figure


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """The given axis with its top figure, or new ones that pyplot does not know of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures want matplotlib, which is not installed: pip install 'qkvnorm-lens[plots]'"
        ) from error
    if ax is None:
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        return figure, figure.subplots()
    parent: Any = ax.figure
    while not isinstance(parent, Figure):  # a figure within a figure
        parent = parent.figure
    return parent, ax


def _title(report: CollapseReport, ax: Axes) -> None:
    settings = report.settings
    prompts = f"{len(report.tokens)} prompt{'s' * (len(report.tokens) != 1)}"
    ax.set_title(
        f"{report.model['name']}: {settings.law} noise on {', '.join(settings.on)}; "
        f"{report.n_sparse:,} sparse rows of {prompts}",
        fontsize=9,
        loc="left",
    )


def _model_lines(report: CollapseReport, ax: Axes) -> None:
    frame = report.to_frame("model")
    x = 100 * frame["sigma"].to_numpy()
    shown = {name: 100 * frame[name].to_numpy() for name in frame.columns if name != "sigma"}
    sampled = report.settings.method == "sample"
    if sampled and report.n_sparse:
        dense = np.geomspace(x[x > 0].min(), x.max(), _CURVE_POINTS) if (x > 0).any() else x
        rows = np.arange(len(report.table))
        exact = [100 * report.exact_rate(s / 100, rows).sum() / report.n_sparse for s in dense]
        ax.plot(dense, exact, color=_BLUE, linewidth=1, label="collapse, exact")
    label = f"collapse, {report.settings.draws} draws" if sampled else "collapse"
    _points(ax, x, shown["loose"], shown["se"] if sampled else None, _BLUE, label, line=not sampled)
    ax.plot(x, shown["loose_content"], color=_GREEN, linestyle="--", label="sinks left out")
    ax.plot(x, shown["loose_centred"], color=_GREY, linestyle=":", label="centred gauge (control)")
    if report.settings.draws:
        strict = "strict: onto another sparse maximum"
        _points(ax, x, shown["strict"], shown["se_strict"], _ORANGE, strict, line=True)
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def _points(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    error: np.ndarray | None,
    colour: str,
    label: str,
    *,
    line: bool,
) -> None:
    ax.errorbar(
        x,
        y,
        yerr=error,
        color=colour,
        label=label,
        linestyle="-" if line else "none",
        linewidth=1.2,
        marker="o",
        markersize=3.5,
        capsize=2,
        elinewidth=1,
    )


def _layer_lines(report: CollapseReport, figure: Figure, ax: Axes) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    chosen = report.settings.layers
    colours = colormaps[_MAP]
    scale = Normalize(min(chosen), max(max(chosen), min(chosen) + 1))
    frames = report.to_frame("layer")
    for layer in chosen:
        frame = frames[frames["layer"] == layer]
        ax.plot(
            100 * frame["sigma"].to_numpy(),
            100 * frame["loose"].to_numpy(),
            color=colours(scale(layer)),
            linewidth=1.2,
            marker="o",
            markersize=2.5,
            label=f"layer {layer}",
        )
    if len(chosen) <= 6:
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    else:
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=ax, fraction=0.05, pad=0.02)
        bar.set_label("layer")


def _cells(ax: Axes, values: np.ndarray) -> Any:
    """The image; never and no rows are colours of their own, named under the map."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    finite = values[np.isfinite(values) & (values > 0)]
    low, high = (finite.min(), finite.max()) if finite.size else (1.0, 50.0)
    if high < 1.05 * low:
        low, high = low / 1.5, high * 1.5
    colours = colormaps[_MAP].with_extremes(bad=_NO_ROWS, over=_NEVER)
    image = ax.imshow(
        np.ma.masked_invalid(np.where(np.isinf(values), 1e9, values)),
        cmap=colours,
        norm=LogNorm(low, high),
        aspect="auto",
        interpolation="nearest",
        origin="lower",
    )
    for at in range(1, values.shape[1]):
        ax.axvline(at - 0.5, color="white", linewidth=0.5)
    for at in range(1, values.shape[0]):
        ax.axhline(at - 0.5, color="white", linewidth=0.5)
    handles = [
        Patch(facecolor=colour, edgecolor=_GREY, linewidth=0.5, label=label)
        for colour, label, there in (
            (_NEVER, "never", np.isinf(values).any()),
            (_NO_ROWS, "no sparse rows", np.isnan(values).any()),
        )
        if there
    ]
    if handles:
        ax.legend(
            handles=handles,
            frameon=False,
            fontsize=8,
            ncols=2,
            loc="upper left",
            bbox_to_anchor=(0, -0.16),
            borderaxespad=0,
        )
    return image


def _marks(ax: Axes, values: np.ndarray, counts: np.ndarray, min_rows: int, image: Any) -> None:
    """Sigma as a number in each cell where there is room; few rows in brackets, or a dot."""
    written = values.size <= _MOST_CELLS
    for (layer, head), value in np.ndenumerate(values):
        few = counts[layer, head] < min_rows
        if not math.isfinite(value) or not (written or few):
            continue
        dark = sum(image.cmap(image.norm(value))[:3]) < 1.5
        text = f"{value:.2g}" if value < 9.95 else f"{value:.0f}"
        ax.text(
            head,
            layer,
            (f"({text})" if few else text) if written else "·",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )


def _integer_ticks(ax: Axes, n_heads: int, layers: list[str]) -> None:
    across, up = (1 + (n - 1) // 16 for n in (n_heads, len(layers)))
    ax.set_xticks(range(0, n_heads, across))
    ax.set_yticks(range(0, len(layers), up), layers[::up])


def _log_ticks(axis: Any) -> None:
    """1, 2, 3, 5 and their multiples by ten, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_plain)


def _plain(value: float, position: float) -> str:
    return f"{value:g}"
