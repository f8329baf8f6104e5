"""Charts drawn by matplotlib or plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qkvnorm_lens.plots.charts.chart import Backend, Chart, Number, axes_in, check_backend


def draw(
    charts: Sequence[Chart],
    ax: Any,
    backend: Backend,
    size: tuple[Number, Number],
    *,
    together: bool = False,
) -> Any:
    """A figure of these charts, side by side.

    Args:
        charts: what to draw.
        ax: a matplotlib axis for each chart (for one chart the axis itself), or None for a new
            figure.
        backend: the library that draws.
        size: of a new figure, inches.
        together: the charts show the same things: one legend, in the first.
    """
    check_backend(backend, ax)
    if backend == "plotly":
        from qkvnorm_lens.plots.charts.plotly_backend import draw_charts

        return draw_charts(charts, size, together=together)
    from qkvnorm_lens.plots.charts.matplotlib_backend import draw_chart
    from qkvnorm_lens.plots.charts.style import new_figure, top_figure

    if ax is None:
        figure = new_figure(size)
        axes = list(np.ravel(figure.subplots(1, len(charts))))
    else:
        axes = axes_in(ax, len(charts), "one for each chart")
        figure = top_figure(axes[0])
    for i, (chart, each) in enumerate(zip(charts, axes, strict=True)):
        draw_chart(chart, each, figure, with_legend=i == 0 or not together)
    return figure
