"""Accuracy under noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hooks.arguments import check_choice
from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.collapse import SIGMA

if TYPE_CHECKING:
    from hooks import SweepReport


_METRICS: Final = {
    "accuracy": ("accuracy per scored token (%)", 100.0),
    "top1_agreement": ("same arg max as without noise (%)", 100.0),
    "loss": ("loss (nats per scored token)", 1.0),
    "kl": ("KL from the clean output (nats per token)", 1.0),
}


def accuracy_curve(
    reports: SweepReport | Mapping[str, SweepReport],
    ax: charts.Axes | None = None,
    *,
    metric: str | None = None,
    backend: charts.Backend = "matplotlib",
) -> charts.Figure | Any:
    """What the model's output loses under noise in all layers at once, against sigma.

    Points are ``report.to_frame()`` with standard errors over draws; the dotted line is the model
    without noise. The axis begins before the first change that is a hundredth of the largest.
    Menary et al. 2024, Fig. 2.

    Args:
        reports: what :func:`hooks.sweep` gave, or several by the name to show.
        ax: draw here; default: a new figure.
        metric: ``"accuracy"``, ``"top1_agreement"``, ``"loss"`` or ``"kl"``; default: the accuracy,
            or the agreement of sweeps without targets.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of thing.
        ValueError: another ``metric`` or ``backend``, no report, an axis beside plotly, or a report
            without that number (accuracy and loss need targets).
    """
    charts.check_backend(backend, ax)
    named = charts.named_reports(reports)
    for report in named.values():
        charts.check_report("reports", report, "SweepReport")
    scored = all(report.targets.any() for report in named.values())
    usual = "accuracy" if scored else "top1_agreement"
    metric = check_choice("metric", usual if metric is None else metric, _METRICS)
    label, unit = _METRICS[metric]
    lines, levels, begins = [], [], []
    for i, (name, report) in enumerate(named.items()):
        frame = report.to_frame()
        if frame[metric].isna().all():
            raise ValueError(
                f"metric: wanted a number that the report has; got {metric!r} of a sweep without "
                "targets"
            )
        noisy, colour = frame[frame["sigma"] > 0], charts.RUNS[i % len(charts.RUNS)]
        x, y, error = (noisy[c].to_numpy(float) for c in ("sigma", metric, f"se_{metric}"))
        name = name or f"noise on {', '.join(report.settings.on)}"
        lines.append(
            charts.Line(100 * x, unit * y, name, colour, marker=3.5, bars=True, error=unit * error)
        )
        change = np.abs(y - float(frame[metric].iloc[0]))
        begins.append(charts.begin(100 * x, change > np.nanmax(change) / 100))
        levels.append((unit * float(frame[metric].iloc[0]), colour))
    known = np.concatenate([line.x for line in lines])
    chart = charts.Chart(
        x=charts.Axis(SIGMA, "log", min(begins) / 1.15, float(known.max()) * 1.15, ticks="log"),
        y=charts.Axis(label),
        lines=lines,
        levels=levels,
        title=next(iter(named.values())).model["name"] if len(named) == 1 else "",
    )
    return charts.draw([chart], ax, backend, (6.0, 3.8))
