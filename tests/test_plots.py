"""Figures hold the report's own numbers, and touch nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import hooks
from qkvnorm_lens import plots
from tests import models

SIGMAS = (0.05, 0.2, 0.4)


def _probe(method: str, *, sigmas: tuple[float, ...] = SIGMAS, qk_scale: float = 6) -> object:
    return hooks.collapse_probe(
        models.tiny_gpt2(qk_scale=qk_scale),
        models.tokens(2, 16),
        sigmas=sigmas,
        draws=3,
        method=method,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def exact() -> object:
    return _probe("exact")


@pytest.fixture(scope="module")
def sampled() -> object:
    return _probe("sample")


@pytest.fixture(scope="module")
def nothing_sparse() -> object:
    return _probe("exact", qk_scale=0.01)


@pytest.fixture(autouse=True)
def _nothing_global():  # type: ignore[no-untyped-def]
    """No figure of pyplot's, no setting changed."""
    before, open_ = dict(mpl.rcParams), pyplot.get_fignums()
    yield
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == open_


def _curves(ax: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label to (x, y) of lines and of points with error bars."""
    found = {}
    for line in ax.lines:
        found[str(line.get_label())] = line.get_data()
    for container in ax.containers:
        assert isinstance(container, ErrorbarContainer)
        found[str(container.get_label())] = container.lines[0].get_data()
    return {label: (np.asarray(x), np.asarray(y)) for label, (x, y) in found.items()}


def test_the_curve_is_the_frame(exact) -> None:  # type: ignore[no-untyped-def]
    assert exact.n_sparse > 20
    figure = plots.collapse_curve(exact)
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    curves, frame = _curves(ax), exact.to_frame("model")
    for label, column in (
        ("collapse", "loose"),
        ("sinks left out", "loose_content"),
        ("centred gauge (control)", "loose_centred"),
        ("strict: onto another sparse maximum, 3 draws", "strict"),
    ):
        x, y = curves[label]
        np.testing.assert_array_equal(x, 100 * frame["sigma"])
        np.testing.assert_array_equal(y, 100 * frame[column])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert "%" in ax.get_xlabel()
    assert "%" in ax.get_ylabel()


def test_a_sampled_curve_has_error_bars_and_the_exact_curve(exact, sampled) -> None:  # type: ignore[no-untyped-def]
    (ax,) = plots.collapse_curve(sampled).axes
    curves, frame = _curves(ax), sampled.to_frame("model")
    np.testing.assert_array_equal(curves["collapse, 3 draws"][1], 100 * frame["loose"])
    x, y = curves["collapse, exact"]
    assert len(x) > len(SIGMAS)
    at = [np.abs(x - 100 * sigma).argmin() for sigma in (SIGMAS[0], SIGMAS[-1])]
    wanted = exact.to_frame("model")["loose"].iloc[[0, -1]]
    np.testing.assert_allclose(y[at], 100 * wanted, rtol=1e-5, atol=1e-9)
    (bars,) = (c for c in ax.containers if c.get_label() == "collapse, 3 draws")
    assert isinstance(bars, ErrorbarContainer)
    (segments,) = bars.lines[2]
    for segment, (_, row) in zip(segments.get_segments(), frame.iterrows(), strict=True):
        assert segment[1, 1] == pytest.approx(100 * (row["loose"] + row["se"]))
        assert segment[0, 1] >= 0


def test_a_line_per_layer(exact) -> None:  # type: ignore[no-untyped-def]
    ax = plots.collapse_curve(exact, by="layer").axes[0]
    curves, frame = _curves(ax), exact.to_frame("layer")
    for layer in exact.settings.layers:
        mine = frame[frame["layer"] == layer]
        np.testing.assert_array_equal(curves[f"layer {layer}"][1], 100 * mine["loose"])
    with pytest.raises(ValueError, match="'head'"):
        plots.collapse_curve(exact, by="head")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("rate", [0.01, 0.2])
def test_the_map_is_sigma_at(exact, rate: float, content: bool) -> None:  # type: ignore[no-untyped-def]
    figure = plots.head_map(exact, rate, content=content)
    (image,) = figure.axes[0].images
    shown = image.get_array()
    wanted = exact.sigma_at(rate, by="head", content=content)
    assert isinstance(wanted, pd.DataFrame)
    values = 100 * wanted.to_numpy()
    assert isinstance(shown, np.ma.MaskedArray)
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), np.isnan(values))
    finite = np.isfinite(values)
    np.testing.assert_array_equal(shown.data[finite], values[finite])
    assert f"{100 * rate:g}%" in figure.axes[1].get_ylabel()


def test_heads_with_few_rows_are_marked(exact) -> None:  # type: ignore[no-untyped-def]
    counts = exact.rows.sum((-1, -2))
    limit = int(counts.max())
    ax = plots.head_map(exact, min_rows=limit).axes[0]
    for text in ax.texts:
        head, layer = map(int, text.get_position())
        assert text.get_text().startswith("(") == (counts[layer, head] < limit)
    assert any("fewer than" in t.get_text() for t in ax.get_legend().get_texts())  # type: ignore[union-attr]


def test_a_given_axis_is_drawn_on(exact) -> None:  # type: ignore[no-untyped-def]
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plots.collapse_curve(exact, left) is figure
    assert plots.head_map(exact, ax=right) is figure
    assert left.containers
    assert right.images
    inner = Figure()
    ax = inner.subfigures(1, 2)[0].subplots()
    assert plots.collapse_curve(exact, ax) is inner


def test_without_sparse_rows_the_figure_says_so(nothing_sparse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert nothing_sparse.n_sparse == 0
    figure = plots.collapse_curve(nothing_sparse)
    assert any("no sparse rows" in text.get_text() for text in figure.axes[0].texts)
    for drawn in (figure, plots.head_map(nothing_sparse)):
        drawn.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sigmas", [(0.1,), (0.0, 0.1), (0.0,)])
def test_short_grids_can_be_drawn(sigmas: tuple[float, ...], tmp_path: Path) -> None:
    for method in ("exact", "sample"):
        report = _probe(method, sigmas=sigmas)
        plots.collapse_curve(report).savefig(tmp_path / "a.png")  # type: ignore[arg-type]
        plots.collapse_curve(report, by="layer").savefig(tmp_path / "b.png")  # type: ignore[arg-type]


def test_without_matplotlib_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
from qkvnorm_lens import plots
try:
    plots._axes(None, (1, 1))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'qkvnorm-lens[plots]'" in done.stdout


def test_pyplot_is_not_imported() -> None:
    code = """
import sys
from qkvnorm_lens import plots
assert "matplotlib" not in sys.modules
plots._axes(None, (1, 1))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
