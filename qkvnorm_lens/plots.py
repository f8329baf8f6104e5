"""Figures of a collapse report, and of training logs: a matplotlib ``Figure`` comes out.

Nothing is shown and no global setting of matplotlib is read or changed: save a figure with
``figure.savefig(path)``; a notebook shows the one that a cell ends with (under ``%matplotlib
inline``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pandas as pd

from qkvnorm_lens._plot_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RUNS,
    axes_of,
    grid,
    log_ticks,
    new_figure,
    plain,
    top_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hooks import CollapseReport

_MAP = "viridis"
_NO_ROWS, _NEVER = "#F7F7F7", "#BDBDBD"
_LEAST_SHARE = 0.01  # percent; below this the curve counts less than one row in 10,000
_CURVE_POINTS = 60
_MOST_CELLS = 256  # beyond this a number in each cell can't be read
_LOG_COLUMNS: Final = ("sequences", "loss", "per_token")
_DASHES: Final = ("-", "--", ":", "-.")


def collapse_curve(
    report: CollapseReport, ax: Axes | None = None, *, by: Literal["model", "layer"] | str = "model"
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
    figure, ax = axes_of(ax, (6.4, 4.2))
    if by == "model":
        _model_lines(report, ax)
    else:
        _layer_lines(report, figure, ax)
    _log_scales(ax)
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xlabel("RMS of the relative change of norms, σ (%)")
    ax.set_ylabel("sparse rows whose arg max moves (%)")
    log_ticks(ax.xaxis)
    ax.yaxis.set_major_formatter(plain)
    grid(ax)
    _title(report, ax)
    if not report.n_sparse:
        ax.text(0.5, 0.5, "no sparse rows", transform=ax.transAxes, ha="center", color=GREY)
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
    size = (min(3.0 + 0.45 * n_heads, 12.0), min(1.6 + 0.25 * n_layers, 10.0))
    figure, ax = axes_of(ax, (max(size[0], 5.6), max(size[1], 3.2)))
    counts = (report.rows[..., 0] if content else report.rows.sum(-1)).sum(-1)
    image = _cells(ax, values)
    few = _marks(ax, values, counts < min_rows, image)
    _key(ax, values, f"{few}  fewer than {min_rows} sparse rows" if few else "")
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    # Block numbers alone, but for stacks: E, D and X for encoder, decoder and cross-attention.
    _integer_ticks(ax, n_heads, [label.removeprefix("L") for label in report.model["labels"]])
    rows = "sparse rows without sinks" if content else "sparse rows"
    bar = figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
    bar.set_label(f"σ at which {100 * rate:g}% of a head's\n{rows} collapse (%)")
    log_ticks(bar.ax.yaxis)
    _title(report, ax)
    return figure


def training_curves(
    logs: Mapping[str, pd.DataFrame | str | PathLike[str]],
    ax: Sequence[Axes] | np.ndarray | None = None,
) -> Figure:
    """Loss (log axis) and accuracy per token against sequences seen, a colour per run.

    Points are the logs' own columns ``sequences``, ``loss`` and ``per_token``; accuracy has points
    where it was measured. Beyond seven runs the colours come again with other dashes.

    Args:
        logs: by the name to show, what training wrote: a frame, or the path of a ``log.csv``.
        ax: draw on these two, loss and accuracy; default: a new figure.

    Returns:
        The figure that holds the axes.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: no such file.
        ValueError: no log, one without these columns or without rows, other than two axes.
    """
    frames = {name: _log(name, log) for name, log in logs.items()}
    if not frames:
        raise ValueError("logs: wanted at least one; got none")
    if ax is None:
        figure = new_figure((8.4, 3.4))
        pair: Any = figure.subplots(1, 2)
    else:
        pair = np.ravel(np.asarray(ax, dtype=object))
        if len(pair) != 2:
            raise ValueError(f"ax: wanted two axes, for loss and accuracy; got {len(pair)}")
        figure = top_figure(pair[0])
    loss, accuracy = pair
    for i, (name, frame) in enumerate(frames.items()):
        drawn: dict[str, Any] = {
            "color": RUNS[i % len(RUNS)],
            "linestyle": _DASHES[i // len(RUNS) % len(_DASHES)],
            "linewidth": 1.4,
            "label": name,
        }
        loss.plot(frame["sequences"], frame["loss"], **drawn)
        measured = frame[frame["per_token"].notna()]
        x, y = measured["sequences"], 100 * measured["per_token"]
        accuracy.plot(x, y, marker="o", markersize=3.5, **drawn)
    loss.set_yscale("log", nonpositive="mask")
    log_ticks(loss.yaxis)
    loss.set_ylabel("loss (nats per scored token)")
    loss.legend(frameon=False, fontsize=9)
    accuracy.set_ylabel("accuracy per token (%)")
    if not any(frame["per_token"].notna().any() for frame in frames.values()):
        accuracy.text(
            0.5, 0.5, "not measured", transform=accuracy.transAxes, ha="center", color=GREY
        )
    for each in pair:
        _sequence_axis(each)
    return figure


def _log(name: str, log: pd.DataFrame | str | PathLike[str]) -> pd.DataFrame:
    """The columns that are drawn, as numbers."""
    frame = log if isinstance(log, pd.DataFrame) else pd.read_csv(log)
    lacking = [column for column in _LOG_COLUMNS if column not in frame.columns]
    if lacking:
        raise ValueError(
            f"log of {name!r}: wanted columns {', '.join(_LOG_COLUMNS)}; got none named "
            f"{' nor '.join(lacking)}"
        )
    if frame.empty:
        raise ValueError(f"log of {name!r}: wanted rows; got none")
    return frame.loc[:, list(_LOG_COLUMNS)].astype(float)


def _sequence_axis(ax: Axes) -> None:
    """Sequences from none on, as 400k and 1.2M."""
    from matplotlib.ticker import EngFormatter

    ax.set_xlim(left=0)
    ax.set_xlabel("sequences seen")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    grid(ax)


def _title(report: CollapseReport, ax: Axes) -> None:
    settings, n = report.settings, len(report.tokens)
    name = str(report.model["name"])
    name = Path(name).name if Path(name).is_absolute() else name
    ax.set_title(
        f"{name}\n{settings.law} noise on {', '.join(settings.on)}; {report.n_sparse:,} sparse "
        f"rows, {n} prompt{'s' * (n != 1)}",
        fontsize=9,
        loc="left",
    )


def _model_lines(report: CollapseReport, ax: Axes) -> None:
    frame = report.to_frame("model")
    x = 100 * frame["sigma"].to_numpy()
    shown = {name: 100 * frame[name].to_numpy() for name in frame.columns if name != "sigma"}
    draws = report.settings.draws
    handles: list[Any] = []
    if report.settings.method == "sample":
        handles += _exact_line(report, ax, x)
        handles.append(
            _points(ax, x, shown["loose"], shown["se"], BLUE, f"collapse, {draws} draws", "none")
        )
    else:
        handles.append(_points(ax, x, shown["loose"], None, BLUE, "collapse", "-"))
    for name, style, colour, label in (
        ("loose_content", "--", GREEN, "sinks left out"),
        ("loose_centred", ":", GREY, "centred gauge (control)"),
    ):
        handles += ax.plot(x, shown[name], color=colour, linestyle=style, label=label)
    if draws:
        label = f"strict: onto another sparse maximum, {draws} draws"
        handles.append(_points(ax, x, shown["strict"], shown["se_strict"], ORANGE, label, "-"))
    ax.legend(handles=handles, frameon=False, fontsize=8, loc="upper left")


def _exact_line(report: CollapseReport, ax: Axes, x: np.ndarray) -> list[Any]:
    """The computed curve from the rows that a sampled report keeps."""
    positive = x[x > 0]
    if not report.n_sparse or not len(positive):
        return []
    dense = np.geomspace(positive.min(), positive.max(), _CURVE_POINTS)
    rows = np.arange(len(report.table))
    exact = [100 * report.exact_rate(s / 100, rows).sum() / report.n_sparse for s in dense]
    return ax.plot(dense, exact, color=BLUE, linewidth=1, label="collapse, exact")


def _points(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    error: np.ndarray | None,
    colour: str,
    label: str,
    line: str,
) -> Any:
    """Points with error bars; on a log axis a bar that reaches zero ends below the axis."""
    bars = None
    if error is not None:
        error = np.nan_to_num(error)
        bars = np.stack([np.clip(error, 0, np.maximum(y - _LEAST_SHARE / 10, 0)), error])
    return ax.errorbar(
        x,
        y,
        yerr=bars,
        color=colour,
        label=label,
        linestyle=line,
        linewidth=1.2,
        marker="o",
        markersize=3.5,
        capsize=2,
        elinewidth=1,
    )


def _layer_lines(report: CollapseReport, figure: Figure, ax: Axes) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    chosen = report.settings.layers
    colours = ListedColormap(colormaps[_MAP](np.linspace(0, 0.9, 256)))  # yellow is lost on white
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
    """The image; never and no rows are colours of their own."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

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
    return image


def _marks(ax: Axes, values: np.ndarray, few: np.ndarray, image: Any) -> str:
    """Sigma as a number in each cell where there is room; few rows in brackets, or a dot.

    Returns the mark of few rows, if there is one.
    """
    written = values.size <= _MOST_CELLS
    mark = ""
    for (layer, head), value in np.ndenumerate(values):
        if not math.isfinite(value) or not (written or few[layer, head]):
            continue
        dark = sum(image.cmap(image.norm(value))[:3]) < 1.5
        text = (f"{value:.2g}" if value < 9.95 else f"{value:.0f}") if written else "·"
        if few[layer, head]:
            mark = "(5)" if written else "·"
            text = f"({text})" if written else text
        ax.text(
            head,
            layer,
            text,
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )
    return mark


def _key(ax: Axes, values: np.ndarray, few: str) -> None:
    """What grey, pale and marked cells mean, under the map."""
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    handles = [
        Patch(facecolor=colour, edgecolor=GREY, linewidth=0.5, label=label)
        for colour, label, there in (
            (_NEVER, "never", np.isinf(values).any()),
            (_NO_ROWS, "no sparse rows", np.isnan(values).any()),
        )
        if there
    ]
    if few:
        handles.append(Patch(facecolor="none", edgecolor="none", label=few))
    if not handles:
        return
    top: Any = ax.figure
    below = ScaledTranslation(0, -0.42, top.dpi_scale_trans)  # inches: clear of the axis label
    ax.legend(
        handles=handles,
        frameon=False,
        fontsize=8,
        ncols=3,
        handlelength=1.5,
        columnspacing=1.2,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=ax.transAxes + below,
        borderaxespad=0,
    )


def _integer_ticks(ax: Axes, n_heads: int, layers: list[str]) -> None:
    across, up = (1 + (n - 1) // 16 for n in (n_heads, len(layers)))
    ax.set_xticks(range(0, n_heads, across))
    ax.set_yticks(range(0, len(layers), up), layers[::up])


def _log_scales(ax: Axes) -> None:
    """Log axes around what can be shown there: no sigma of zero, no share below 0.01%."""
    x, y = (
        np.array([v for line in ax.lines for v in np.asarray(line.get_data()[i], float)])
        for i in (0, 1)
    )
    x = x[x > 0] if (x > 0).any() else np.array([1.0, 50.0])
    ax.set_xlim(x.min() / 1.15, x.max() * 1.15)
    ax.set_ylim(_LEAST_SHARE, 100 if (y > 10).any() else 10)
    ax.set_xscale("log")
    ax.set_yscale("log", nonpositive="mask")
