"""How sparse the rows are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.frames import check_columns


def sparsity_histogram(
    table: pd.DataFrame, ax: charts.Axes | None = None, *, backend: charts.Backend = "matplotlib"
) -> charts.Figure | Any:
    """Histogram of the largest weight of each attention row, content and sinks apart.

    Menary et al. 2024, Fig. 25 to 27: the sharp peak at 1 is Pre-Norm's; sparse rows are right of
    0.95.

    Args:
        table: columns ``low`` (a bin's lower end), ``rows`` (how many), and where there are two
            kinds of row ``kind``; for one model, as in the experiment ``sparsity``'s table where
            ``what`` is ``"histogram"``.
        ax: draw here; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of thing.
        ValueError: other columns, no rows, or several models in one table.
    """
    charts.check_backend(backend, ax)
    charts.check_report("table", table, "DataFrame")
    check_columns("table", table, ("low", "rows"))
    frame = table[table["what"] == "histogram"] if "what" in table else table
    frame = frame.assign(**charts.numbers("table", frame, ("low", "rows")))
    kinds = list(dict.fromkeys(frame["kind"])) if "kind" in frame else [None]
    models = sorted(map(str, set(frame["model"]))) if "model" in frame else []
    if len(models) > 1:
        raise ValueError(f"table: wanted one model; got {models}")
    total = float(frame["rows"].sum())
    if not total > 0:
        raise ValueError("table: wanted rows of attention; got none")
    bars = []
    for kind, colour in zip(kinds, (charts.BLUE, charts.ORANGE, charts.GREEN), strict=False):
        mine = (frame if kind is None else frame[frame["kind"] == kind]).sort_values("low")
        left = mine["low"].to_numpy(float)
        width = float(np.diff(left).min()) if len(left) > 1 else 1.0
        height = 100 * mine["rows"].to_numpy(float) / total
        label = {None: "rows", "content": "rows on content", "sink": "rows on the first token"}
        bars.append(charts.Bars(left, width, height, label.get(kind, str(kind)), colour))
    top = max(float(b.height.max()) for b in bars)
    least = min(0.01, *(float(b.height[b.height > 0].min()) for b in bars if b.height.any()))
    chart = charts.Chart(
        x=charts.Axis("largest weight of the row, max a", "linear", 0, 1),
        y=charts.Axis(
            "share of rows per bin (%)", "log", max(least / 1.5, 1e-4), 2 * top, ticks="plain"
        ),
        bars=bars,
        title=str(models[0]) if models else "",
        legend="upper left",
    )
    return charts.draw([chart], ax, backend, (6.0, 3.4))
