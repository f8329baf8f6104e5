"""What cache formats cost, by depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.frames import layer_axis

if TYPE_CHECKING:
    from hooks import CacheRisk

_DASHES = ("-", "--", ":")


def cache_by_depth(
    report: CacheRisk,
    ax: charts.Axes | None = None,
    *,
    backend: charts.Backend = "matplotlib",
) -> charts.Figure | Any:
    """Nats per token that each format costs in each layer, keys and values together.

    Without samples: the RMS error of the scores, modulo each row's constant.

    Args:
        report: what :func:`hooks.cache_risk` gave.
        ax: draw here; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of report.
        ValueError: another ``backend``, or an axis beside plotly.
    """
    charts.check_backend(backend, ax)
    charts.check_report("report", report, "CacheRisk")
    column, what = ("risk", "predicted KL (nats per token)") if report.settings.samples else (
        "score", "error of the scores (RMS)"
    )  # fmt: skip
    frame = report.to_frame("layer")
    lines = []
    for i, name in enumerate(report.settings.formats):
        y = frame[frame["format"] == name][column].to_numpy(float)
        y = np.where(y > 0, y, np.nan)
        if np.isfinite(y).any():
            look = {"dash": _DASHES[i // len(charts.RUNS) % len(_DASHES)], "marker": 3}
            colour = charts.RUNS[i % len(charts.RUNS)]
            lines.append(charts.Line(np.arange(len(y)), y, name, colour, **look))  # type: ignore[arg-type]
    labels = frame[frame["format"] == report.settings.formats[0]]["label"].tolist()
    chart = charts.Chart(
        x=layer_axis(labels),
        y=charts.Axis(what, scale="log" if lines else "linear"),
        title=f"{report.model['name']}: a cache in one layer at a time",
        lines=lines,
        note="" if lines else "nothing is lost",
    )
    return charts.draw([chart], ax, backend, (6.4, 3.8))
