"""Spread of lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.frames import layer_axis

if TYPE_CHECKING:
    from hooks import SpreadReport


def spread_bands(
    report: SpreadReport, ax: charts.Axes | None = None, *, backend: charts.Backend = "matplotlib"
) -> charts.Figure | Any:
    """Spread of the norms that attention reads, over each head's median, by layer.

    Bands hold 50% and 90% of the attention's weight; points are the single heads' 90% band, the
    smallest b with 90% of the weight in |r - 1| <= b. Menary et al. 2024, Fig. 1.

    Args:
        report: what :func:`hooks.spread` gave.
        ax: draw here; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of thing.
        ValueError: another ``backend``, or an axis beside plotly.
    """
    charts.check_backend(backend, ax)
    charts.check_report("report", report, "SpreadReport")
    bands = []
    for share, opacity in ((0.9, 0.22), (0.5, 0.35)):
        frame = report.to_frame("layer", share=share)
        x = np.arange(len(frame))
        low, high = (100 * (frame[name].to_numpy(float) - 1) for name in ("low", "high"))
        bands.append(
            charts.Band(x, low, high, f"{100 * share:g}% of the weight", charts.BLUE, opacity)
        )
    heads = report.to_frame("head")
    order = {layer: i for i, layer in enumerate(report.settings.layers)}
    at = heads["layer"].map(order).to_numpy(float)
    each = 100 * heads["band"].to_numpy(float)
    points = charts.Line(
        at, each, "each head's 90% band, ±", charts.ORANGE, dash="none", marker=2.5
    )
    chart = charts.Chart(
        x=layer_axis(frame["label"].tolist()),
        y=charts.Axis("norm over the head's median, less 1 (%)"),
        title=f"{report.model['name']}: L2 norms of {_OF[report.settings.of]}",
        bands=bands,
        lines=[points],
        levels=[(0, charts.GREY)],
        legend="best",
    )
    return charts.draw([chart], ax, backend, (6.4, 3.8))


_OF: Final = {"stream": "the stream", "q": "queries", "k": "keys", "v": "values"}
