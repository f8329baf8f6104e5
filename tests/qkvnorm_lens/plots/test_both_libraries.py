"""matplotlib and plotly draw the same data, and it is that of the frames."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hooks
from qkvnorm_lens import plots
from tests.support import models
from tests.support.figures import lines_of, training_log
from tests.support.watching import shape_checks_off


@pytest.fixture(scope="module")
def spread_report() -> hooks.SpreadReport:
    return hooks.spread(models.tiny_gpt2(), models.tokens(2, 16))


@pytest.fixture(scope="module")
def interference_report() -> hooks.InterferenceReport:
    return hooks.interference(models.tiny_gpt2(qk_scale=20), models.tokens(2, 16), draws=2)


@pytest.fixture(scope="module")
def sweep_report() -> hooks.SweepReport:
    return hooks.sweep(
        models.tiny_gpt2(), models.tokens(2, 12), sigmas=[0.05, 0.2], replicates=2, progress=False
    )


def _sparsity() -> pd.DataFrame:
    low = np.round(np.arange(20) / 20, 2)
    rows = np.where(low < 0.1, 0, 100 * (1 + low))
    kinds = [pd.DataFrame({"kind": k, "low": low, "rows": rows / n}) for k, n in KINDS.items()]
    return pd.concat(kinds, ignore_index=True)


KINDS = {"content": 1, "sink": 3}


def _ranks() -> pd.DataFrame:
    sites = [f"{layer} {site}" for layer in range(4) for site in ("in", "mid", "out")]
    return pd.DataFrame(
        {
            "label": sites,
            "relative_mu": np.geomspace(0.9, 0.001, len(sites)),
            "stable_rank": np.linspace(8, 1, len(sites)),
        }
    )


def _spectrum() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"layer": np.repeat(range(3), 4), "head": np.tile(range(4), 3)})
    for name in ("s1", "s2", "uniform_s1", "uniform_s2", "edge"):
        frame[name] = rng.uniform(0.2, 1.5, len(frame))
    return frame


def _numbers(axes: Axes) -> list[tuple[str, np.ndarray]]:
    """Every line, with its label, of an axis of matplotlib's, without levels."""
    found = [
        (label, np.asarray(y, float))
        for label, (_, y) in lines_of(axes).items()
        if not label.startswith("_")
    ]
    return sorted(found, key=lambda pair: pair[0])


def _traces(figure: Any) -> list[tuple[str, np.ndarray]]:
    return sorted(
        (
            (trace.name, np.asarray(trace.y, float))
            for trace in figure.data
            if trace.name and trace.type == "scatter"
            if trace.fill is None
        ),
        key=lambda pair: pair[0],
    )


def _caches() -> hooks.CacheRisk:
    formats = ["fp8-e4m3", "fp8-e5m2"]
    return hooks.cache_risk(models.tiny_llama(), models.tokens(2), formats=formats, progress=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda f, **given: plots.collapse_curve(f["exact"], **given),
        lambda f, **given: plots.collapse_curve(f["sampled"], published=True, **given),
        lambda f, **given: plots.collapse_curve(f["exact"], by="layer", **given),
        lambda f, **given: plots.row_margins(f["exact"], **given),
        lambda f, **given: plots.spread_bands(f["spread"], **given),
        lambda f, **given: plots.interference_by_depth(f["interference"], **given),
        lambda f, **given: plots.cache_by_depth(_caches(), **given),
        lambda f, **given: plots.accuracy_curve(f["sweep"], **given),
        lambda f, **given: plots.accuracy_curve({"a": f["sweep"]}, metric="kl", **given),
        lambda f, **given: plots.sparsity_histogram(_sparsity(), **given),
        lambda f, **given: plots.rank_by_depth(_ranks(), **given),
        lambda f, **given: plots.rank_by_depth({"a": _ranks()}, measure="stable_rank", **given),
        lambda f, **given: plots.spectrum_by_depth(_spectrum(), **given),
    ],
)
def test_both_libraries_draw_the_same_and_axes_have_units(  # type: ignore[no-untyped-def]
    call: Any, exact, sampled, spread_report, sweep_report, interference_report
) -> None:
    plotly = pytest.importorskip("plotly.io")
    template = plotly.templates.default
    given = {"exact": exact, "sampled": sampled, "spread": spread_report, "sweep": sweep_report}
    given["interference"] = interference_report
    figure = call(given)
    (ax, *_) = figure.axes
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    other = call(given, backend="plotly")
    assert plotly.templates.default == template
    drawn, turned = _numbers(ax), _traces(other)
    assert [label for label, _ in drawn] == [label for label, _ in turned]
    for (_, y), (_, z) in zip(drawn, turned, strict=True):
        there = np.isfinite(z)  # what a log axis can't show is left out
        np.testing.assert_allclose(z[there], y[there], rtol=1e-12)
        assert not (y[~there] > 0).any()
    assert other.layout.xaxis.title.text == ax.get_xlabel()
    assert other.layout.yaxis.title.text.replace("<br>", "\n") == ax.get_ylabel()
    assert (other.layout.xaxis.type or "linear") == ax.get_xscale()
    assert (other.layout.yaxis.type or "linear") == ax.get_yscale()
    mine = Figure()
    assert call(given, ax=mine.subplots()) is mine
    with pytest.raises(ValueError, match="ax: wanted None"):
        call(given, ax=Figure().subplots(), backend="plotly")
    with pytest.raises(ValueError, match="backend: wanted"):
        call(given, backend="bokeh")


def test_training_curves_with_plotly_have_the_same_lines() -> None:
    pytest.importorskip("plotly")
    logs = {"slow": training_log(7, rate=0.9), "fast": training_log(6, rate=0.3, every=3)}
    figure = plots.training_curves(logs, backend="plotly")
    assert [trace.name for trace in figure.data] == ["slow", "fast"] * 2
    assert [trace.showlegend for trace in figure.data] == [True, True, False, False]
    for trace, log in zip(figure.data[:2], logs.values(), strict=True):
        np.testing.assert_array_equal(trace.y, log["loss"])
    assert figure.layout.yaxis.type == "log"


def test_the_map_with_plotly_is_sigma_at(exact) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("plotly")
    figure = plots.head_map(exact, backend="plotly")
    sigma = 100 * exact.sigma_at(0.01, by="head").to_numpy()
    never, shown = (np.asarray(trace.z, float) for trace in figure.data)
    np.testing.assert_allclose(10 ** shown[np.isfinite(sigma)], sigma[np.isfinite(sigma)])
    np.testing.assert_array_equal(np.isfinite(never), np.isinf(sigma))


def test_margins_count_the_rows_that_noise_can_move(exact) -> None:  # type: ignore[no-untyped-def]
    """At each point, independently: the share of rows whose certificate lies below."""
    (ax,) = plots.row_margins(exact).axes
    frame = exact.fragile(len(exact.table))
    for kind, name in enumerate(("rows on content", "rows on the first token")):
        total = int(exact.rows[..., kind].sum())
        x, y = lines_of(ax)[f"{name} ({total:,})"]
        mine = 100 * frame.loc[frame["sink"] == bool(kind), "sigma"].to_numpy()
        for at, share in list(zip(x, y, strict=True))[:-1:3]:
            assert share == pytest.approx(100 * (mine <= at * (1 + 1e-6)).sum() / total, abs=1.5)
        assert (np.diff(y) >= 0).all()


def test_bands_and_points_of_spread_are_its_frame(spread_report) -> None:  # type: ignore[no-untyped-def]
    (ax,) = plots.spread_bands(spread_report).axes
    wide = ax.collections[0].get_paths()[0].vertices
    frame = spread_report.to_frame("layer", share=0.9)
    assert np.asarray(wide)[:, 1].min() == pytest.approx(100 * (frame["low"].min() - 1))
    assert np.asarray(wide)[:, 1].max() == pytest.approx(100 * (frame["high"].max() - 1))
    _, y = lines_of(ax)["each head's 90% band, ±"]
    np.testing.assert_allclose(y, 100 * spread_report.to_frame("head")["band"])


@pytest.mark.parametrize("content", [False, True])
def test_interference_is_the_frames(  # type: ignore[no-untyped-def]
    interference_report, content: bool
) -> None:
    (ax,) = plots.interference_by_depth(interference_report, content=content).axes
    frame, kind = interference_report.to_frame("layer"), "_content" if content else ""
    frame = frame[(frame["on"] == frame["on"].iloc[0]) & (frame["constant"] == 1)]
    curves = lines_of(ax)
    assert len({*curves} - {"_nolegend_"}) == 3
    for label, column in (
        ("moved", "moved"),
        ("the same", "permuted"),
        ("independent", "predicted"),
    ):
        (y,) = (y for name, (_, y) in curves.items() if name.startswith(label))
        np.testing.assert_array_equal(y, 100 * frame[column + kind])


def test_accuracy_is_the_sweeps(sweep_report) -> None:  # type: ignore[no-untyped-def]
    (ax,) = plots.accuracy_curve({"a": sweep_report}).axes
    frame = sweep_report.to_frame()
    x, y = lines_of(ax)["a"]
    np.testing.assert_allclose(x, [5, 20])
    np.testing.assert_allclose(y, 100 * frame["accuracy"].iloc[1:])
    levels = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert 100 * frame["accuracy"].iloc[0] in levels
    blind = replace(sweep_report, targets=0 * sweep_report.targets)
    (ax,) = plots.accuracy_curve(blind).axes
    assert "same arg max" in ax.get_ylabel()
    with pytest.raises(ValueError, match="metric: wanted one of"):
        plots.accuracy_curve(sweep_report, metric="speed")
    with pytest.raises(ValueError, match="at least one"):
        plots.accuracy_curve({})


def test_a_histogram_shows_every_row() -> None:
    table = _sparsity()
    (ax,) = plots.sparsity_histogram(table).axes
    total = 0.0
    for patch in ax.patches:
        values, edges, baseline = patch.get_data()  # type: ignore[attr-defined]
        np.testing.assert_allclose(np.diff(edges), 0.05)
        total += float(np.asarray(values)[np.asarray(values) > baseline].sum())
    assert total == pytest.approx(100, rel=1e-6)
    for wrong, said in (
        (table.drop(columns="low"), "none named low"),
        (table.assign(rows=0.0), "got none"),
        (table.assign(model=["a"] * 20 + ["b"] * 20), "one model"),
        (table.iloc[:0], "got none"),
    ):
        with pytest.raises(ValueError, match=said):
            plots.sparsity_histogram(wrong)


def test_rank_and_spectrum_take_what_hooks_gives() -> None:
    from hooks.measures.rank.measure import rank_profile
    from hooks.measures.spectrum.measure import spectral_gap

    model, ids = models.tiny_gpt2(), models.tokens(1, 10)
    frame = rank_profile(model, ids).to_frame()
    (ax,) = plots.rank_by_depth(frame, measure="mean_cosine").axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), frame["mean_cosine"])
    heads = spectral_gap(model, ids).to_frame()
    (ax,) = plots.spectrum_by_depth(heads).axes
    means = heads.groupby("layer")["s1"].mean()
    np.testing.assert_allclose(lines_of(ax)["first singular value"][1], means)
    with pytest.raises(ValueError, match="measure: wanted one of"):
        plots.rank_by_depth(frame, measure="size")
    with pytest.raises(ValueError, match="none named s1"):
        plots.spectrum_by_depth(heads.drop(columns="s1"))


def test_reports_are_drawn_as_their_frames() -> None:
    from hooks import rank_profile, spectral_gap

    model, ids = models.tiny_gpt2(), models.tokens(1, 10)
    for draw, report in (
        (plots.rank_by_depth, rank_profile(model, ids)),
        (plots.spectrum_by_depth, spectral_gap(model, ids)),
    ):
        frame = report.to_frame()
        (wanted,), (got,) = draw(frame).axes, draw(report).axes
        for a, b in zip(wanted.lines, got.lines, strict=True):
            np.testing.assert_array_equal(a.get_ydata(), b.get_ydata())
        both = draw({"a": report, "b": frame})
        seen = [np.asarray(line.get_ydata()).tolist() for ax in both.axes for line in ax.lines]
        for line in wanted.lines:
            assert seen.count(np.asarray(line.get_ydata()).tolist()) >= 2
        with pytest.raises(ValueError, match="reports: wanted at least one"):
            draw({})
    with pytest.raises(ValueError, match=r"ax: wanted 2 of .* axes, one for each report; got 1"):
        plots.spectrum_by_depth({"a": frame, "b": frame}, wanted)


def test_a_symmetry_report_is_drawn_by_layer() -> None:
    from hooks import symmetry_gap

    plotly = pytest.importorskip("plotly.graph_objects")
    report = symmetry_gap(models.tiny_gpt2(), models.tokens(2, 10), permutations=2, progress=False)
    frame = report.to_frame("layer")
    (ax,) = plots.symmetry_by_depth(report).axes
    assert ax.get_yscale() == "log"
    assert "|y − y′| / |y|" in ax.get_ylabel()
    curves = lines_of(ax)
    for variant in report.settings.variants:
        mine = frame[frame["variant"] == variant]
        change = mine["stream"].where(mine["stream"] > 0)
        np.testing.assert_allclose(curves[variant][1], change)
        np.testing.assert_allclose(curves[f"{variant}: rounding"][1], mine["floor_stream"])
    assert len(plots.symmetry_by_depth({"a": report, "b": report}).axes) == 2
    turned = plots.symmetry_by_depth(report, backend="plotly")
    assert isinstance(turned, plotly.Figure)
    assert len(turned.data) == len(curves)
    with pytest.raises(ValueError, match="reports: wanted at least one"):
        plots.symmetry_by_depth({})
    with pytest.raises(ValueError, match=r"ax: wanted 2 of .* axes, one for each report; got 1"):
        plots.symmetry_by_depth({"a": report, "b": report}, ax)


@pytest.mark.parametrize(
    ("draw", "wanted"),
    [
        (plots.rank_by_depth, "reports: wanted a RankReport or a DataFrame; got SpreadReport"),
        (plots.spectrum_by_depth, "reports: wanted a SpectrumReport or a DataFrame; got Spread"),
        (plots.symmetry_by_depth, "reports: wanted a SymmetryReport; got SpreadReport"),
        (plots.attention, "report: wanted a CollapseReport; got SpreadReport"),
        (plots.attention_rows, "report: wanted a CollapseReport; got SpreadReport"),
        (plots.fragile_text, "report: wanted a CollapseReport; got SpreadReport"),
        (plots.collapse_curve, "report: wanted a CollapseReport; got SpreadReport"),
        (plots.head_map, "report: wanted a CollapseReport; got SpreadReport"),
        (plots.row_margins, "report: wanted a CollapseReport; got SpreadReport"),
        (plots.accuracy_curve, "reports: wanted a SweepReport; got SpreadReport"),
        (plots.sparsity_histogram, "table: wanted a DataFrame; got SpreadReport"),
        (lambda other: plots.spread_bands([other]), "report: wanted a SpreadReport; got list"),
    ],
)
def test_another_report_is_refused_by_name(draw: Any, wanted: str, spread_report: Any) -> None:
    with shape_checks_off(), pytest.raises(TypeError, match=wanted):
        draw(spread_report)


def test_a_notebook_shows_a_figure_without_pyplot() -> None:
    """In a process of its own: pyplot, once used, would teach IPython to show any figure."""
    done = subprocess.run(
        [sys.executable, "-c", _SHOWN], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


_SHOWN = """
import sys
import pandas
from IPython.core.formatters import DisplayFormatter
from qkvnorm_lens import plots
table = pandas.DataFrame({"low": [0.0, 0.5], "rows": [1, 2]})
shown, _ = DisplayFormatter().format(plots.sparsity_histogram(table))
print(shown["image/png"].startswith(b"\\x89PNG"), "matplotlib.pyplot" in sys.modules)
"""


def test_panels_of_symmetry_share_their_scale() -> None:
    ids = models.tokens(2, 10)
    made = (models.tiny_gpt2(), models.tiny_llama())
    reports = {
        str(i): hooks.symmetry_gap(model, ids, permutations=2, progress=False)
        for i, model in enumerate(made)
    }
    alone = [plots.symmetry_by_depth(report).axes[0].get_ylim() for report in reports.values()]
    assert len(set(alone)) == 2
    figure = plots.symmetry_by_depth(reports)
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
