"""Symmetry by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.frames import layer_axis

if TYPE_CHECKING:
    from hooks import SymmetryReport

VARIANTS: Final = ("as is", "positions removed", "mask removed", "both removed")


def symmetry_by_depth(
    reports: SymmetryReport | Mapping[str, SymmetryReport],
    ax: charts.Axes | Sequence[charts.Axes] | np.ndarray | None = None,
    *,
    backend: charts.Backend = "matplotlib",
) -> charts.Figure | Any:
    """How much permuting the earlier tokens changes the last position's stream, by depth.

    The mean of |y - y_pi| / |y| after each block, as the model is and without positions, mask or
    both, beside what rounding does to the same stream (dashed, the largest of its runs): a line on
    or below its dashed one means no gap. A change of exactly zero has no point on the log axis. Zuo
    & Guerzhoy 2024.

    Args:
        reports: what :func:`hooks.symmetry_gap` gave, or several by the name to show, side by side.
        ax: draw here, with an axis for each of several; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: no such report.
        ValueError: no report, another ``backend``, another number of axes, or an axis beside
            plotly.
    """
    charts.check_backend(backend, ax)
    named = charts.named_reports(reports)
    for report in named.values():
        charts.check_report("reports", report, "SymmetryReport")
    ax = None if ax is None else charts.axes_in(ax, len(named), "one for each report")
    shown = [_symmetry_chart(name, report) for name, report in named.items()]
    # One scale for all: a panel of nothing but rounding must not look like the others.
    y = np.concatenate([line.y for chart in shown for line in chart.lines])
    seen = y[np.isfinite(y) & (y > 0)]
    if len(seen):
        low, high = float(seen.min()) / 2, float(seen.max()) * 2
        shown = [replace(chart, y=replace(chart.y, low=low, high=high)) for chart in shown]
    return charts.draw(shown, ax, backend, (6.8 if len(shown) == 1 else 4.6 * len(shown), 3.8))


def _symmetry_chart(name: str, report: SymmetryReport) -> charts.Chart:
    frame = report.to_frame("layer")
    lines = []
    for variant, colour in zip(
        VARIANTS, ("#000000", charts.BLUE, charts.ORANGE, charts.GREEN), strict=True
    ):
        mine = frame[frame["variant"] == variant]
        if not len(mine):
            continue
        x = np.arange(len(mine))
        change, floor = (mine[c].to_numpy(float) for c in ("stream", "floor_stream"))
        change = np.where(change > 0, change, np.nan)
        lines.append(charts.Line(x, change, variant, colour, marker=3.5, width=1.4))
        lines.append(charts.Line(x, floor, f"{variant}: rounding", colour, dash="--", width=0.8))
    labels = frame[frame["variant"] == frame["variant"].iloc[0]]["label"].astype(str).tolist()
    return charts.Chart(
        x=layer_axis(labels, "after the block of layer (embed: before the first)"),
        y=charts.Axis("change of the stream, |y − y′| / |y|", "log"),
        lines=lines,
        title=name or str(report.model["name"]),
    )
