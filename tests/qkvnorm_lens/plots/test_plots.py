"""Figures hold the numbers of the report or the log, and touch nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import hooks
from qkvnorm_lens import plots
from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.html import shown_rows
from tests.support import models
from tests.support.figures import SIGMAS, lines_of, small_report
from tests.support.watching import shape_checks_off


def test_the_curve_is_the_frame(exact) -> None:  # type: ignore[no-untyped-def]
    assert exact.n_sparse > 20
    figure = plots.collapse_curve(exact)
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    curves, frame = lines_of(ax), exact.to_frame("model")
    for label, column in (
        ("collapse", "loose"),
        ("sinks left out", "loose_content"),
        ("centred gauge (control)", "loose_centred"),
        ("strict: onto another sparse maximum", "strict"),
    ):
        x, y = curves[label]
        np.testing.assert_array_equal(x, 100 * frame["sigma"])
        np.testing.assert_array_equal(y, 100 * frame[column])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert "%" in ax.get_xlabel()
    assert "%" in ax.get_ylabel()


def test_a_sampled_curve_has_error_bars_and_the_exact_curve(exact, sampled) -> None:  # type: ignore[no-untyped-def]
    (ax,) = plots.collapse_curve(sampled).axes
    curves, frame = lines_of(ax), sampled.to_frame("model")
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
    curves, frame = lines_of(ax), exact.to_frame("layer")
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


def test_maps_side_by_side_have_one_scale(exact, sampled) -> None:  # type: ignore[no-untyped-def]
    figure = plots.head_map({"a": exact, "b": exact}, 0.2)
    first, second = (ax.images[0] for ax in figure.axes[:2])
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["a", "b"]
    assert first.norm.vmin == second.norm.vmin
    alone = plots.head_map(exact, 0.2, limits=(1, 57)).axes[0].images[0]
    assert (alone.norm.vmin, alone.norm.vmax) == (1, 57)
    pair = Figure().subplots(1, 2)
    plots.head_map({"a": exact, "b": sampled}, ax=pair)
    both = np.concatenate([ax.images[0].get_array().compressed() for ax in pair])
    both = both[both < 1e8]  # never
    assert {ax.images[0].norm.vmin for ax in pair} == {both.min()}
    assert {ax.images[0].norm.vmax for ax in pair} == {both.max()}
    for wrong in ((3, 2), (1,), (0, 1)):
        with pytest.raises(ValueError, match="limits: wanted"), shape_checks_off():
            plots.head_map(exact, limits=wrong)
    cells = sum(
        trace.z.size for trace in plots.head_map({"a": exact, "b": exact}, backend="plotly").data
    )
    assert cells == 4 * exact.rows.sum((-1, -2)).size


@settings(max_examples=200)
@given(low=st.floats(1e-3, 1e3), ratio=st.floats(1.05, 1e4))
def test_a_log_scale_has_two_ticks(low: float, ratio: float) -> None:
    ticks = charts.ticks_between(low, low * ratio)
    assert 2 <= len(ticks) <= 20
    assert ticks == sorted(set(ticks))
    assert low * 0.99 <= ticks[0] <= ticks[-1] <= low * ratio * 1.01


def test_the_axis_begins_where_a_curve_does() -> None:
    sigmas = (0.001, 0.002, 0.004, 0.1, 0.2, 0.4)
    report: Any = small_report("exact", sigmas=sigmas)
    seen = 100 * report.to_frame("model")[["loose", "loose_content", "loose_centred", "strict"]]
    first = int((seen >= 0.01).any(axis=1).to_numpy().argmax())
    assert first > 1
    (ax,) = plots.collapse_curve(report).axes
    assert 100 * sigmas[first - 2] < ax.get_xlim()[0] < 100 * sigmas[first - 1]
    (ax,) = plots.collapse_curve(report, published=True).axes
    assert ax.get_xlim()[0] < 5.5


def test_tokens_left_out_are_marked() -> None:
    report: Any = hooks.collapse_probe(
        models.tiny_gpt2(), models.tokens(1, 64), sigmas=[0.1], progress=False
    )
    for row, ax in zip(shown_rows(report, 8), plots.attention_rows(report, 8).axes, strict=False):
        (weights,) = (image.get_array() for image in ax.images)
        names = [label.get_text() for label in ax.get_xticklabels()]
        gaps = [i for i, name in enumerate(names) if name == "⋯"]
        assert (np.diff(row.positions, prepend=-1) > 1).sum() == len(gaps)
        assert np.ma.getmaskarray(weights)[:, gaps].all()
        assert weights.shape[1] == len(row.positions) + len(gaps)
        if gaps:
            assert [int(n.split()[-1]) for n in names if n != "⋯"] == list(row.positions)


def test_a_figure_of_kept_rows_says_why_there_are_none(nothing_sparse, exact) -> None:  # type: ignore[no-untyped-def]
    values: Any = hooks.collapse_probe(
        models.tiny_gpt2(), models.tokens(2, 16), on="v", sigmas=[0.1], progress=False
    )
    sinks = replace(exact, kept=replace(exact.kept, key=np.zeros_like(exact.kept.key)))
    for report, content, why in (
        (nothing_sparse, False, "no row has a maximum >= 0.95"),
        (values, False, "noise on v can move none"),
        (sinks, True, "all attend to the first token"),
    ):
        with pytest.raises(ValueError, match=why):
            plots.attention_rows(report, content=content)


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
        report = small_report(method, sigmas=sigmas)
        plots.collapse_curve(report).savefig(tmp_path / "a.png")  # type: ignore[arg-type]
        plots.collapse_curve(report, by="layer").savefig(tmp_path / "b.png")  # type: ignore[arg-type]


# -- matplotlib -------------------------------------------------------------------------------


def test_without_matplotlib_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
from qkvnorm_lens.plots.charts import axes_of
try:
    axes_of(None, (1, 1))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'qkvnorm-lens[plots]'" in done.stdout


def test_pyplot_is_not_imported() -> None:
    code = """
import sys
import pandas
from qkvnorm_lens import plots
assert "matplotlib" not in sys.modules
frame = pandas.DataFrame({"sequences": [1], "loss": [1.0], "per_token": [0.5]})
plots.training_curves({"a": frame})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the same data behind both libraries ------------------------------------------------------


def test_a_narrow_map_has_a_narrow_key(exact) -> None:  # type: ignore[no-untyped-def]
    """Side by side, the keys don't squeeze the maps."""

    def mixed(rate: float) -> bool:
        sigma = exact.sigma_at(rate, by="head").to_numpy()
        return bool(np.isinf(sigma).any() and np.isfinite(sigma).any())

    rate = next(r for r in np.linspace(0.05, 0.9, 40).tolist() if mixed(r))

    def widths(*, keys: bool) -> list[float]:
        figure = Figure(figsize=(8, 4), layout="constrained")
        for ax in figure.subplots(1, 2):
            plots.head_map(exact, rate=rate, min_rows=1000, ax=ax)
            assert len(ax.get_legend().get_texts()) > 1
            if not keys:
                ax.get_legend().remove()
        figure.draw_without_rendering()
        return [ax.get_position().width for ax in figure.axes if ax.get_xlabel() == "head"]

    assert widths(keys=True) == pytest.approx(widths(keys=False), rel=0.05)


def test_wrong_numbers_of_rows_and_prompts_are_refused(exact: Any) -> None:
    with shape_checks_off():
        for draw in (plots.attention, plots.attention_rows):
            for wrong in (1.5, 0, "a", True):
                with pytest.raises(ValueError, match="n: wanted an integer >= 1"):
                    draw(exact, wrong)
        for wrong in ("ab", 1.5, [0.5], None):
            with pytest.raises(ValueError, match="prompts: wanted an in"):
                plots.fragile_text(exact, wrong)


def test_published_marks_are_the_papers(exact) -> None:  # type: ignore[no-untyped-def]
    (ax,) = plots.collapse_curve(exact, published=True).axes
    marks = [line for line in ax.lines if line.get_marker() == "D"]
    assert len(marks) == 1
    assert sorted(np.asarray(marks[0].get_xdata(), float)) == [5.5, 7.5, 11, 17]
    assert set(np.asarray(marks[0].get_ydata(), float)) == {1}
    assert marks[0].get_label() in [text.get_text() for text in ax.get_legend().get_texts()]
    (ax,) = plots.collapse_curve(exact).axes
    assert not [line for line in ax.lines if line.get_marker() == "D"]


def test_rows_on_paper_are_the_kept_ones(exact, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    figure = plots.attention_rows(exact, 3)
    strips = [ax for ax in figure.axes if ax.images]
    assert len(strips) == 3
    for i, ax in enumerate(strips):
        np.testing.assert_array_equal(ax.images[0].get_array(), exact.kept.weights(i))
        (before,), (after,) = (np.asarray(line.get_xdata(), int) for line in ax.lines)
        assert (before, after) == (exact.kept.key[i], exact.kept.lands[i])
    hostile = replace(exact, tokens=(("$x_", "\u202e", "שלום", "𒀀", "<b>", "\\", "{") * 3,) * 2)
    plots.attention_rows(hostile, 3).savefig(tmp_path / "rows.png")
    pair = Figure().subplots(2, 1)
    assert plots.attention_rows(exact, 2, pair) is pair[0].figure
    with pytest.raises(ValueError, match="wanted 3 of"):
        plots.attention_rows(exact, 3, pair)


@pytest.mark.parametrize("library", ["plotly", "matplotlib"])
def test_a_missing_library_is_named_with_its_extra(  # type: ignore[no-untyped-def]
    library: str, exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}.*qkvnorm-lens\[plots\]"):
        plots.row_margins(exact, backend=library)  # type: ignore[arg-type]
