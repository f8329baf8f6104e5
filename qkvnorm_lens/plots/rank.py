"""Rank by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from hooks.arguments import check_choice
from qkvnorm_lens.plots.charts import RUNS, Axis, Backend, Chart, Line, check_backend, draw, numbers
from qkvnorm_lens.plots.frames import check_columns, frames_of, layer_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hooks import RankReport

_RANKS: Final = {
    "relative_mu": ("distance from the tokens' mean, μ(X) / |X|", "log"),
    "mu": ("distance from the tokens' mean, μ(X) (units of the stream)", "log"),
    "stable_rank": ("stable rank, |X|² / |X|₂²", "linear"),
    "effective_rank": ("effective rank", "linear"),
    "rank": ("rank", "linear"),
    "relative_least": ("least over largest singular value", "log"),
    "mean_cosine": ("mean |cosine| between tokens", "linear"),
}


def rank_by_depth(
    reports: RankReport | pd.DataFrame | Mapping[str, RankReport | pd.DataFrame],
    ax: Axes | None = None,
    *,
    measure: str = "relative_mu",
    backend: Backend = "matplotlib",
) -> Figure | Any:
    """How far the tokens are from being equal, by depth.

    Wu et al. 2024: mu(X) = || X - 1 mean(X)^T ||_F falls where attention makes tokens alike.

    Args:
        reports: what :func:`hooks.rank_profile` gave, or a frame (its ``to_frame()``: one row per
            site, in order, with ``label`` and the measure); or several by the name to show.
        ax: draw here; default: a new figure.
        measure: a column: ``"relative_mu"``, ``"mu"``, ``"stable_rank"``, ``"effective_rank"``,
            ``"rank"``, ``"relative_least"`` or ``"mean_cosine"``.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: neither such a report nor a frame.
        ValueError: another measure or ``backend``, no report, a frame without these columns.
    """
    check_backend(backend, ax)
    measure = check_choice("measure", measure, _RANKS)
    named = frames_of("reports", reports, "RankReport")
    label, scale = _RANKS[measure]
    lines = []
    for i, (name, frame) in enumerate(named.items()):
        check_columns(
            f"reports: frame {name!r}" if name else "reports: frame", frame, ("label", measure)
        )
        y = numbers("reports", frame, (measure,))[measure].to_numpy()
        colour = RUNS[i % len(RUNS)]
        lines.append(Line(np.arange(len(y)), y, name, colour, marker=2.5, width=1.4))
    longest = max(named.values(), key=len)
    chart = Chart(
        x=_sites(longest["label"].astype(str).tolist()),
        y=Axis(label, "log" if scale == "log" and _decades(lines) else "linear", ticks="plain"),
        lines=lines,
    )
    return draw([chart], ax, backend, (6.8, 3.6))


def _sites(labels: list[str]) -> Axis:
    """Sites by the layer that each begins; by name where labels have no layer."""
    of = [label.partition(" ")[0] for label in labels]
    first = [i for i in range(len(of)) if i == 0 or of[i] != of[i - 1]]
    said = "layer (its sites in order, from its input to its output)"
    axis = layer_axis([of[i] for i in first], said)
    return replace(axis, named=tuple((float(first[int(at)]), text) for at, text in axis.named))


def _decades(lines: Sequence[Line]) -> bool:
    """Whether the numbers are all positive and span more than one decade."""
    y = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    return bool(len(y) and y.min() > 0 and y.max() > 10 * y.min())
