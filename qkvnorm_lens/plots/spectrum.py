"""Spectrum of attention by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.frames import check_columns, frames_of, layer_axis

if TYPE_CHECKING:
    from hooks import SpectrumReport

_SPECTRUM: Final = (
    ("s1", "first singular value", charts.BLUE, "-"),
    ("s2", "second singular value", charts.ORANGE, "-"),
    ("uniform_s1", "first, uniform matrix of the same mask", charts.BLUE, ":"),
    ("uniform_s2", "second, uniform matrix of the same mask", charts.ORANGE, ":"),
    ("edge", "bulk's edge 2/√T (random, without a mask)", charts.GREY, "--"),
)


def spectrum_by_depth(
    reports: SpectrumReport | pd.DataFrame | Mapping[str, SpectrumReport | pd.DataFrame],
    ax: charts.Axes | Sequence[charts.Axes] | np.ndarray | None = None,
    *,
    backend: charts.Backend = "matplotlib",
) -> charts.Figure | Any:
    """First two singular values of the attention matrices by layer, beside the uniform matrix's.

    Naderi et al. 2024: without a mask softmax attention has one singular value near 1 and a bulk
    below 2/sqrt(T); under a causal mask, compare with the uniform matrix of the same mask. The band
    spans the heads from least to greatest.

    Args:
        reports: what :func:`hooks.spectral_gap` gave, or a frame (its ``to_frame()``, by head or by
            layer: ``layer``, ``s1``, ``s2``, ``uniform_s1``, ``uniform_s2``, ``edge``); or several
            by the name to show, side by side.
        ax: draw here, with an axis for each of several; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: neither such a report nor a frame.
        ValueError: no report, other columns, another ``backend``, another number of axes, or an
            axis beside plotly.
    """
    charts.check_backend(backend, ax)
    named = frames_of("reports", reports, "SpectrumReport")
    ax = None if ax is None else charts.axes_in(ax, len(named), "one for each report")
    shown = [_spectrum_chart(name, frame) for name, frame in named.items()]
    return charts.draw(shown, ax, backend, (6.8 if len(shown) == 1 else 4.6 * len(shown), 3.8),
                together=True)  # fmt: skip


def _spectrum_chart(name: str, frame: pd.DataFrame) -> charts.Chart:
    names = [column for column, *_ in _SPECTRUM]
    check_columns(
        f"reports: frame {name!r}" if name else "reports: frame", frame, ("layer", *names)
    )
    frame = frame.assign(**charts.numbers("reports", frame, names))
    by_layer = frame.groupby("layer", sort=False)[names]
    mean, low, high = by_layer.mean(), by_layer.min(), by_layer.max()
    x = np.arange(len(mean))
    several = bool((frame.groupby("layer").size() > 1).any())
    bands = [
        charts.Band(x, low[n].to_numpy(float), high[n].to_numpy(float), "", colour, 0.15)
        for n, _, colour, _ in _SPECTRUM[:2]
        if several
    ]
    lines = [
        charts.Line(
            x, mean[n].to_numpy(float), label, colour, dash=dash, marker=3 if dash == "-" else 0
        )
        for n, label, colour, dash in _SPECTRUM
    ]
    top = max(1.0, float(high.to_numpy(float).max()), float(mean.to_numpy(float).max()))
    return charts.Chart(
        x=layer_axis([str(layer) for layer in mean.index]),
        y=charts.Axis("singular value of the attention matrix", "linear", 0, 1.6 * top),
        title=name,
        lines=lines,
        bands=bands,
        legend="upper left",  # above everything that is drawn
    )
