"""Figures of a collapse report: the curve, and the rows' own margins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from hooks.arguments import check_booleans, check_choice
from qkvnorm_lens.plots import charts

if TYPE_CHECKING:
    from hooks import CollapseReport

SIGMA = "RMS of the relative change of norms, σ (%)"
LEAST_SHARE = 0.01  # percent; below this the curve counts less than one row in 10,000
PUBLISHED: Final = (
    charts.Mark(11, 1, "Baseline"),
    charts.Mark(7.5, 1, "Alternate"),
    charts.Mark(5.5, 1, "Large"),
    charts.Mark(17, 1, "Baseline, strict"),
)
"""Where 1% of the sparse rows collapse: Menary et al. 2024, Fig. 3, Pre-Norm models."""
_CURVE_POINTS = 60
_MARGIN_POINTS = 400


def collapse_curve(
    report: CollapseReport,
    ax: charts.Axes | None = None,
    *,
    by: Literal["model", "layer"] | str = "model",
    published: bool = False,
    backend: charts.Backend = "matplotlib",
) -> charts.Figure | Any:
    """Share of sparse rows that collapse against sigma, both in percent on log axes.

    Menary et al. 2024, Fig. 3. Points are ``report.to_frame(by)``; rates below 0.01% are below the
    axis, which begins where the first curve does.

    Args:
        report: what :func:`hooks.collapse_probe` gave.
        ax: draw here; default: a new figure.
        by: ``"model"``: collapse (with the exact curve behind the points where it was sampled),
            sinks left out, the centred gauge, and strict collapse, with bars up to its farther
            bound or, where it was sampled, of its standard error over draws.
            ``"layer"``: collapse, a line per layer.
        published: mark the sigmas at which 1% collapse in the paper's Pre-Norm models.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Returns:
        The figure that holds the axis, or a figure of plotly's.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of report.
        ValueError: another ``by`` or ``backend``, or an axis beside plotly.
    """
    check_choice("by", by, ("model", "layer"))
    (published,) = check_booleans(published=published)
    charts.check_backend(backend, ax)
    charts.check_report("report", report, "CollapseReport")
    chart = collapse_chart(report, by, published=published)
    return charts.draw([chart], ax, backend, (6.4, 4.2))


def collapse_chart(report: CollapseReport, by: str, *, published: bool = False) -> charts.Chart:
    """What :func:`collapse_curve` draws."""
    lines = _model_lines(report) if by == "model" else _layer_lines(report)
    chosen = report.settings.layers
    many = by == "layer" and len(chosen) > 6
    return charts.Chart(
        x=charts.Axis(SIGMA, "log", *_ends(lines, PUBLISHED if published else ()), ticks="log"),
        y=charts.Axis(
            "sparse rows whose arg max moves (%)",
            "log",
            LEAST_SHARE,
            100 if any((line.y > 10).any() for line in lines) else 10,
            ticks="plain",
        ),
        title=title_of(report),
        lines=lines,
        levels=[(1, charts.GREY)],
        marks=PUBLISHED if published else (),
        note="" if report.n_sparse else "no sparse rows",
        legend="upper left",
        scale=(min(chosen), max(chosen), "layer") if many else None,
    )


def row_margins(
    report: CollapseReport, ax: charts.Axes | None = None, *, backend: charts.Backend = "matplotlib"
) -> charts.Figure | Any:
    """Share of sparse rows that noise of a given size can move at all, against that size.

    A row's critical sigma is a / sqrt(3), a the smallest half-width with which factors in
    [1 - a, 1 + a] can move its arg max: a certificate from clean scores, whatever the draw. The
    curves end where the report's table does, at the latest at a = 1.

    Args:
        report: what :func:`hooks.collapse_probe` gave.
        ax: draw here; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Returns:
        The figure that holds the axis, or a figure of plotly's.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of report.
        ValueError: another ``backend``, or an axis beside plotly.
    """
    charts.check_backend(backend, ax)
    charts.check_report("report", report, "CollapseReport")
    return charts.draw([margins_chart(report)], ax, backend, (6.4, 3.8))


def margins_chart(report: CollapseReport) -> charts.Chart:
    """What :func:`row_margins` draws."""
    table = report.table
    end = 100 * min(1.0, float(table.cutoff)) / math.sqrt(3)
    counts = report.rows.sum((0, 1, 2))
    lines = []
    for kind, colour, name in (
        (0, charts.BLUE, "rows on content"),
        (1, charts.ORANGE, "rows on the first token"),
    ):
        mine = table.half_width[report.is_first(table.prompt, table.key) == bool(kind)].astype(
            float
        )
        if not counts[kind]:
            continue
        x = np.sort(100 * mine[np.isfinite(mine)] / math.sqrt(3))
        y = 100 * np.arange(1, len(x) + 1) / counts[kind]
        at = np.unique(np.linspace(0, max(len(x) - 1, 0), _MARGIN_POINTS).astype(int))
        x, y = (x[at], y[at]) if len(x) else (x, y)
        x, y = np.append(x, end), np.append(y, y[-1:] if len(y) else 0.0)
        label = f"{name} ({counts[kind]:,})"
        lines.append(charts.Line(x, y, label, colour, width=1.5, steps=True))
    everything = np.concatenate([line.x for line in lines]) if lines else np.array([1.0, end])
    return charts.Chart(
        x=charts.Axis(
            "critical noise: least σ that can move the row (%)",
            "log",
            max(0.05, float(everything.min()) / 1.3),
            end,
            ticks="log",
        ),
        y=charts.Axis("sparse rows at or below (%)", "linear", 0, 100),
        title=title_of(report),
        lines=lines,
        note="" if report.n_sparse else "no sparse rows",
        legend="upper left",
    )


def name_of(report: CollapseReport) -> str:
    """The model's name; for a local directory its last part."""
    name = str(report.model["name"])
    return Path(name).name if Path(name).is_absolute() else name


def title_of(report: CollapseReport) -> str:
    """The model, the noise, and how much was measured."""
    settings, n = report.settings, len(report.tokens)
    return (
        f"{name_of(report)}\n{settings.law} noise on {', '.join(settings.on)}; "
        f"{report.n_sparse:,} sparse rows, {n} prompt{'s' * (n != 1)}"
    )


def _model_lines(report: CollapseReport) -> list[charts.Line]:
    frame = report.to_frame("model")
    x = 100 * frame["sigma"].to_numpy()
    shown = {name: 100 * frame[name].to_numpy() for name in frame.columns if name != "sigma"}
    draws = report.settings.draws
    lines: list[charts.Line] = []
    points: dict[str, Any] = {"marker": 3.5, "bars": True}
    if report.settings.method == "sample":
        lines += exact_line(report)
        label = f"collapse, {draws} draws"
        lines.append(
            charts.Line(
                x, shown["loose"], label, charts.BLUE, dash="none", error=shown["se"], **points
            )
        )
    else:
        lines.append(charts.Line(x, shown["loose"], "collapse", charts.BLUE, **points))
    for name, dash, colour, label in (
        ("loose_content", "--", charts.GREEN, "sinks left out"),
        ("loose_centred", ":", charts.GREY, "centred gauge (control)"),
    ):
        lines.append(charts.Line(x, shown[name], label, colour, dash=dash, width=1.5))
    if report.settings.strict == "computed":
        label = "strict: onto another sparse maximum"
        away = np.maximum(
            shown["strict_high"] - shown["strict"], shown["strict"] - shown["strict_low"]
        )
        lines.append(charts.Line(x, shown["strict"], label, charts.ORANGE, error=away, **points))
    elif draws:
        label = f"strict: onto another sparse maximum, {draws} draws"
        lines.append(
            charts.Line(
                x, shown["strict"], label, charts.ORANGE, error=shown["se_strict"], **points
            )
        )
    return lines


def exact_line(report: CollapseReport) -> list[charts.Line]:
    """The computed curve from the rows that a sampled report keeps."""
    sigmas = np.asarray(report.settings.sigmas)
    positive = 100 * sigmas[sigmas > 0]
    if not report.n_sparse or not len(positive):
        return []
    dense = np.geomspace(positive.min(), positive.max(), _CURVE_POINTS)
    rows = np.arange(len(report.table))
    exact = [100 * report.exact_rate(s / 100, rows).sum() / report.n_sparse for s in dense]
    return [charts.Line(dense, np.asarray(exact), "collapse, exact", charts.BLUE, width=1)]


def _layer_lines(report: CollapseReport) -> list[charts.Line]:
    from matplotlib.colors import Normalize, to_hex

    from qkvnorm_lens.plots.charts import layer_colours

    chosen = report.settings.layers
    colours = layer_colours()
    scale = Normalize(min(chosen), max(max(chosen), min(chosen) + 1))
    frames = report.to_frame("layer")
    lines = []
    for layer in chosen:
        frame = frames[frames["layer"] == layer]
        x, y = (100 * frame[name].to_numpy() for name in ("sigma", "loose"))
        colour = to_hex(colours(scale(layer)))
        lines.append(charts.Line(x, y, f"layer {layer}", colour, marker=2.5))
    return lines


def _ends(lines: list[charts.Line], marks: Sequence[charts.Mark]) -> tuple[float, float]:
    """The sigmas that a log axis shows: from where the first curve begins."""
    known = [x for line in lines for x in line.x if x > 0] or [1.0, 50.0]
    begins = [float(mark.x) for mark in marks]
    for line in lines:
        shown = line.y[line.x > 0] >= LEAST_SHARE
        begins += [charts.begin(line.x[line.x > 0], shown)] if shown.any() else []
    return float(min(begins or known)) / 1.15, float(max(known)) * 1.15
