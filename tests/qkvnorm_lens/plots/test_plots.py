"""Figures hold the numbers of the report or the log, and touch nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from qkvnorm_lens.experiments import curves as training_page
from qkvnorm_lens.models.config import named_config
from qkvnorm_lens.models.shipped import checkpoint_path, checkpoints
from qkvnorm_lens.training.addition import get_split
from qkvnorm_lens.training.run import Run
from qkvnorm_lens.training.trainer import train
from tests.support import models
from tests.support.paths import ROOT
from tests.support.watching import shape_checks_off

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


# -- training logs ----------------------------------------------------------------------------


def _log(n: int = 6, *, rate: float = 0.5, every: int = 2) -> pd.DataFrame:
    """Loss 2 rate^i; accuracy 1 - loss / 4 at each ``every``-th row, as training leaves it."""
    loss = 2 * rate ** np.arange(n)
    measured = (np.arange(n) + 1) % every == 0
    return pd.DataFrame(
        {
            "step": 100 * (np.arange(n) + 1),
            "sequences": 12_800 * (np.arange(n) + 1),
            "loss": loss,
            "per_token": np.where(measured, 1 - loss / 4, np.nan),
        }
    )


def _both(figure: Figure) -> tuple[Axes, Axes]:
    loss, accuracy = figure.axes
    return loss, accuracy


def test_training_curves_are_the_columns_of_the_logs() -> None:
    logs = {"slow": _log(7, rate=0.9), "fast": _log(6, rate=0.3, every=3)}
    loss, accuracy = map(_curves, _both(plots.training_curves(logs)))
    assert list(loss) == list(accuracy) == ["slow", "fast"]
    for name, log in logs.items():
        np.testing.assert_array_equal(loss[name], (log["sequences"], log["loss"]))
        there = log["per_token"].notna()
        wanted = (log["sequences"][there], 100 * log["per_token"][there])
        assert len(wanted[0]) in (2, 3)
        np.testing.assert_array_equal(accuracy[name], wanted)


def test_training_curves_name_what_they_show() -> None:
    figure = plots.training_curves({"slow": _log(rate=0.9), "fast": _log(rate=0.3)})
    loss, accuracy = _both(figure)
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == (
        "loss (nats per scored token)",
        "accuracy per token (%)",
    )
    for ax in (loss, accuracy):
        assert (ax.get_xscale(), ax.get_xlabel()) == ("linear", "sequences seen")
        assert ax.get_xlim()[0] == 0
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["slow", "fast"]  # type: ignore[union-attr]


def test_a_straight_line_is_exponential_decay(tmp_path: Path) -> None:
    """On the picture itself: pixels of a loss that halves at each row."""
    figure = plots.training_curves({"a": _log()})
    figure.savefig(tmp_path / "figure.png")
    loss, _ = _both(figure)
    pixels = loss.transData.transform(np.asarray(loss.lines[0].get_xydata(), float))
    steps = np.diff(pixels, axis=0)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), rtol=1e-6)
    assert steps[0, 0] > 0 > steps[0, 1]


def test_runs_differ_in_colour_and_keep_it_in_both_axes() -> None:
    figure = plots.training_curves({f"run {i}": _log() for i in range(10)})
    looks = [
        [(line.get_color(), line.get_linestyle()) for line in ax.lines] for ax in _both(figure)
    ]
    assert looks[0] == looks[1]
    assert len(set(looks[0])) == 10
    assert len({colour for colour, _ in looks[0][:7]}) == 7
    assert {style for _, style in looks[0][:7]} == {"-"}


@pytest.mark.parametrize("kind", [str, Path])
def test_a_log_is_read_from_what_training_wrote(kind: type, tmp_path: Path) -> None:
    run = Run(
        named_config("study", "pre", d_model=8, n_layers=1, n_heads=2, d_mlp=8, d_head=4),
        get_split("pairs-train"),
        steps=5,
        log_every=2,
        eval_every=2,
        eval_rows=20,
    )
    train(run, tmp_path)
    path = tmp_path / "log.csv"
    figure = plots.training_curves({"a": kind(path)})
    loss, accuracy = _both(figure)
    log = pd.read_csv(path)
    assert list(log["step"]) == [2, 4, 5]
    np.testing.assert_array_equal(_curves(loss)["a"], (log["sequences"], log["loss"]))
    np.testing.assert_array_equal(
        _curves(accuracy)["a"], (log["sequences"], 100 * log["per_token"])
    )


def test_training_curves_are_drawn_on_given_axes() -> None:
    outer = Figure()
    inner = outer.subfigures(1, 2)[1]
    for pair in (inner.subplots(2, 1), list(inner.subplots(1, 2))):
        assert plots.training_curves({"a": _log(), "b": _log()}, pair) is outer
        assert [len(ax.lines) for ax in pair] == [2, 2]
    one = Figure().subplots()
    with pytest.raises(ValueError, match=r"ax: wanted 2 of .* axes, for loss and accuracy; got 1"):
        plots.training_curves({"a": _log()}, one)  # type: ignore[arg-type]
    assert not one.lines


def test_a_log_is_left_as_it_was() -> None:
    log = _log()
    before = log.copy(deep=True)
    plots.training_curves({"a": log})
    pd.testing.assert_frame_equal(log, before)


@pytest.mark.parametrize("gone", ["sequences", "loss", "per_token"])
def test_a_log_without_the_columns_is_refused(gone: str, tmp_path: Path) -> None:
    log = _log().drop(columns=gone)
    log.to_csv(tmp_path / "log.csv", index=False)
    for given in (log, tmp_path / "log.csv"):
        with pytest.raises(ValueError, match=f"^logs: log of 'mine': .* got none named {gone}$"):
            plots.training_curves({"good": _log(), "mine": given})


def test_logs_that_show_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logs: wanted at least one; got none"):
        plots.training_curves({})
    with pytest.raises(ValueError, match="log of 'a': wanted rows; got none"):
        plots.training_curves({"a": _log(0)})
    with pytest.raises(FileNotFoundError):
        plots.training_curves({"a": tmp_path / "log.csv"})


def test_a_run_that_was_not_measured_says_so(tmp_path: Path) -> None:
    """A loss that is not a number leaves a gap, not an error."""
    log = _log(every=100)
    log.loc[2, "loss"] = np.nan
    figure = plots.training_curves({"a": log})
    figure.savefig(tmp_path / "figure.png")
    loss, accuracy = _both(figure)
    assert [text.get_text() for text in accuracy.texts] == ["not measured"]
    np.testing.assert_array_equal(_curves(loss)["a"][1], log["loss"])
    assert not _both(plots.training_curves({"a": log, "b": _log()}))[1].texts


def test_the_figure_of_the_shipped_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command draws each log; the picture in docs is small."""
    given: dict[str, Path] = {}

    def draw(logs: dict[str, Path]) -> Figure:
        given.update(logs)
        return plots.training_curves(logs)

    monkeypatch.setattr(training_page, "training_curves", draw)
    out = tmp_path / "new" / "training.png"
    assert training_page.main(["--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert given == {name: checkpoint_path(name) / "log.csv" for name in checkpoints()}
    assert (ROOT / "docs/figures/training.png").stat().st_size < 150_000
    with pytest.raises(SystemExit):
        training_page.main(["no-such", "--out", str(tmp_path / "none.png")])
    assert "wanted one of ['addition" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


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


@pytest.fixture(scope="module")
def spread_report() -> hooks.SpreadReport:
    return hooks.spread(models.tiny_gpt2(), models.tokens(2, 16))


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
        for label, (_, y) in _curves(axes).items()
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


@pytest.mark.parametrize(
    "call",
    [
        lambda f, **given: plots.collapse_curve(f["exact"], **given),
        lambda f, **given: plots.collapse_curve(f["sampled"], published=True, **given),
        lambda f, **given: plots.collapse_curve(f["exact"], by="layer", **given),
        lambda f, **given: plots.row_margins(f["exact"], **given),
        lambda f, **given: plots.spread_bands(f["spread"], **given),
        lambda f, **given: plots.accuracy_curve(f["sweep"], **given),
        lambda f, **given: plots.accuracy_curve({"a": f["sweep"]}, metric="kl", **given),
        lambda f, **given: plots.sparsity_histogram(_sparsity(), **given),
        lambda f, **given: plots.rank_by_depth(_ranks(), **given),
        lambda f, **given: plots.rank_by_depth({"a": _ranks()}, measure="stable_rank", **given),
        lambda f, **given: plots.spectrum_by_depth(_spectrum(), **given),
    ],
)
def test_both_libraries_draw_the_same_and_axes_have_units(  # type: ignore[no-untyped-def]
    call: Any, exact, sampled, spread_report, sweep_report
) -> None:
    plotly = pytest.importorskip("plotly.io")
    template = plotly.templates.default
    given = {"exact": exact, "sampled": sampled, "spread": spread_report, "sweep": sweep_report}
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
    logs = {"slow": _log(7, rate=0.9), "fast": _log(6, rate=0.3, every=3)}
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
        x, y = _curves(ax)[f"{name} ({total:,})"]
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
    _, y = _curves(ax)["each head's 90% band, ±"]
    np.testing.assert_allclose(y, 100 * spread_report.to_frame("head")["band"])


def test_accuracy_is_the_sweeps(sweep_report) -> None:  # type: ignore[no-untyped-def]
    (ax,) = plots.accuracy_curve({"a": sweep_report}).axes
    frame = sweep_report.to_frame()
    x, y = _curves(ax)["a"]
    np.testing.assert_allclose(x, [5, 20])
    np.testing.assert_allclose(y, 100 * frame["accuracy"].iloc[1:])
    levels = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert 100 * frame["accuracy"].iloc[0] in levels
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
    np.testing.assert_allclose(_curves(ax)["first singular value"][1], means)
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
    curves = _curves(ax)
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
