"""Training curves are the columns of the logs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from qkvnorm_lens import plots
from qkvnorm_lens.experiments import curves as training_page
from qkvnorm_lens.models.config import named_config
from qkvnorm_lens.models.shipped import checkpoint_path, checkpoints
from qkvnorm_lens.training.addition import get_split
from qkvnorm_lens.training.run import Run
from qkvnorm_lens.training.trainer import train
from tests.support.figures import both_axes, lines_of, training_log
from tests.support.paths import ROOT


def test_training_curves_are_the_columns_of_the_logs() -> None:
    logs = {"slow": training_log(7, rate=0.9), "fast": training_log(6, rate=0.3, every=3)}
    loss, accuracy = map(lines_of, both_axes(plots.training_curves(logs)))
    assert list(loss) == list(accuracy) == ["slow", "fast"]
    for name, log in logs.items():
        np.testing.assert_array_equal(loss[name], (log["sequences"], log["loss"]))
        there = log["per_token"].notna()
        wanted = (log["sequences"][there], 100 * log["per_token"][there])
        assert len(wanted[0]) in (2, 3)
        np.testing.assert_array_equal(accuracy[name], wanted)


def test_training_curves_name_what_they_show() -> None:
    figure = plots.training_curves({"slow": training_log(rate=0.9), "fast": training_log(rate=0.3)})
    loss, accuracy = both_axes(figure)
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
    figure = plots.training_curves({"a": training_log()})
    figure.savefig(tmp_path / "figure.png")
    loss, _ = both_axes(figure)
    pixels = loss.transData.transform(np.asarray(loss.lines[0].get_xydata(), float))
    steps = np.diff(pixels, axis=0)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), rtol=1e-6)
    assert steps[0, 0] > 0 > steps[0, 1]


def test_runs_differ_in_colour_and_keep_it_in_both_axes() -> None:
    figure = plots.training_curves({f"run {i}": training_log() for i in range(10)})
    looks = [
        [(line.get_color(), line.get_linestyle()) for line in ax.lines] for ax in both_axes(figure)
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
    loss, accuracy = both_axes(figure)
    log = pd.read_csv(path)
    assert list(log["step"]) == [2, 4, 5]
    np.testing.assert_array_equal(lines_of(loss)["a"], (log["sequences"], log["loss"]))
    np.testing.assert_array_equal(
        lines_of(accuracy)["a"], (log["sequences"], 100 * log["per_token"])
    )


def test_training_curves_are_drawn_on_given_axes() -> None:
    outer = Figure()
    inner = outer.subfigures(1, 2)[1]
    for pair in (inner.subplots(2, 1), list(inner.subplots(1, 2))):
        assert plots.training_curves({"a": training_log(), "b": training_log()}, pair) is outer
        assert [len(ax.lines) for ax in pair] == [2, 2]
    one = Figure().subplots()
    with pytest.raises(ValueError, match=r"ax: wanted 2 of .* axes, for loss and accuracy; got 1"):
        plots.training_curves({"a": training_log()}, one)  # type: ignore[arg-type]
    assert not one.lines


def test_a_log_is_left_as_it_was() -> None:
    log = training_log()
    before = log.copy(deep=True)
    plots.training_curves({"a": log})
    pd.testing.assert_frame_equal(log, before)


@pytest.mark.parametrize("gone", ["sequences", "loss", "per_token"])
def test_a_log_without_the_columns_is_refused(gone: str, tmp_path: Path) -> None:
    log = training_log().drop(columns=gone)
    log.to_csv(tmp_path / "log.csv", index=False)
    for given in (log, tmp_path / "log.csv"):
        with pytest.raises(ValueError, match=f"^logs: log of 'mine': .* got none named {gone}$"):
            plots.training_curves({"good": training_log(), "mine": given})


def test_logs_that_show_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logs: wanted at least one; got none"):
        plots.training_curves({})
    with pytest.raises(ValueError, match="log of 'a': wanted rows; got none"):
        plots.training_curves({"a": training_log(0)})
    with pytest.raises(FileNotFoundError):
        plots.training_curves({"a": tmp_path / "log.csv"})


def test_a_run_that_was_not_measured_says_so(tmp_path: Path) -> None:
    """A loss that is not a number leaves a gap, not an error."""
    log = training_log(every=100)
    log.loc[2, "loss"] = np.nan
    figure = plots.training_curves({"a": log})
    figure.savefig(tmp_path / "figure.png")
    loss, accuracy = both_axes(figure)
    assert [text.get_text() for text in accuracy.texts] == ["not measured"]
    np.testing.assert_array_equal(lines_of(loss)["a"][1], log["loss"])
    assert not both_axes(plots.training_curves({"a": log, "b": training_log()}))[1].texts


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
