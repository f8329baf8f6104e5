"""What reports show in a notebook, and the heads in order."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2LMHeadModel

import hooks
from hooks.reports import MOST, SavedReport
from hooks.reports.notebook import card
from tests.support import models
from tests.support.watching import shape_checks_off


class Page(HTMLParser):
    """Tags, attributes and cells of a text in which every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny_gpt2(qk_scale=20)


@pytest.fixture(scope="module")
def report(model: Any) -> hooks.CollapseReport:
    return hooks.collapse_probe(model, models.tokens(6))


MEASURES = {
    "probe": hooks.collapse_probe,
    "sweep": lambda model, tokens: hooks.sweep(model, tokens, sigmas=(0.1, 0.3), replicates=2),
    "spread": hooks.spread,
    "interference": hooks.interference,
    "cache": hooks.cache_risk,
    "rank": hooks.rank_profile,
    "spectrum": hooks.spectral_gap,
    "symmetry": lambda model, tokens: hooks.symmetry_gap(model, tokens, permutations=2),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_every_report_shows_words_and_a_small_table(model: Any, measure: str) -> None:
    made: SavedReport = MEASURES[measure](model, models.tokens(2))
    page = Page(made._repr_html_())
    frame, curves = made.glance()
    assert page.tags.count("td") == min(len(frame), MOST) * len(frame.columns) > 0
    assert page.tags.count("th") == len(frame.columns)
    assert page.tags.count("polyline") == (len(curves) if measure in ("probe", "sweep") else 0)
    assert page.tags.count("p") >= len(made.summary().splitlines())
    # Static, offline, and of no colour of its own but the page's.
    assert not {"script", "link", "img", "style", "iframe"} & {*page.tags}
    assert not [v for n, v in page.attributes if n in ("src", "href") or n.startswith("on")]
    assert "#" not in "".join(v or "" for _, v in page.attributes)


def test_texts_are_escaped(report: hooks.CollapseReport) -> None:
    frame = pd.DataFrame({"<b>": ["<script>alert(1)</script>"], "n": [1234], "x": [math.nan]})
    html = card('"<i>&', frame, {"<u>": (np.array([0.1, 0.2]), np.array([0.0, 0.5]))})
    page = Page(html)
    assert page.cells == ["<script>alert(1)</script>", "1,234", "-"]
    assert not {"script", "i", "b", "u"} & {*page.tags}


def test_the_curve_is_the_reports(report: hooks.CollapseReport) -> None:
    """Points lie where sigma and share are, on the axes that the labels name."""
    curve = report.to_frame("model")
    loose = curve["loose"].to_numpy()
    begin = max(0, int(np.argmax(loose > 0)) - 1)
    points = re.findall(r'points="([^"]*)"', report._repr_html_())[0].split()
    at = np.array([[float(x) for x in point.split(",")] for point in points])
    assert len(at) == len(curve) - begin
    sigma, share = curve["sigma"].to_numpy()[begin:], loose[begin:]
    for drawn, wanted in ((at[:, 0], sigma), (-at[:, 1], share)):
        scaled = (drawn - drawn[0]) / (drawn[-1] - drawn[0])
        np.testing.assert_allclose(
            scaled, (wanted - wanted[0]) / (wanted[-1] - wanted[0]), atol=2e-3
        )


def test_nothing_to_show_is_no_error() -> None:
    none, one, two = np.array([math.nan, math.nan]), np.array([0.1]), np.array([0.1, 0.2])
    page = Page(card("No rows.", pd.DataFrame(), {"one": (one, one), "none": (two, none)}))
    assert page.tags == ["div", "p"]


# -- heads in order -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [False, True])
def test_heads_come_most_fragile_first(report: hooks.CollapseReport, content: bool) -> None:
    every = report.heads(min_rows=0, content=content)
    by = "sigma_at_content" if content else "sigma_at"
    assert len(every) == sum(report.model["heads"])
    known = every[by].dropna()
    assert known.is_monotonic_increasing
    assert every[by].isna().tolist() == [False] * len(known) + [True] * (len(every) - len(known))
    at = report.sigma_at(0.01, by="head", content=content)
    assert isinstance(at, pd.DataFrame)
    for row in every.to_dict("records"):
        np.testing.assert_equal(row[by], at.loc[row["layer"], row["head"]])
    counted = every["rows"] - every["sinks"] if content else every["rows"]
    bar = int(counted.median()) + 1
    ranked = report.heads(min_rows=bar, content=content)
    assert ranked["label"].tolist() == every.loc[counted >= bar, "label"].tolist()
    assert 0 < len(ranked) < len(every)


@pytest.mark.usefixtures("unchecked")
def test_heads_refuses_what_it_cannot_read(report: hooks.CollapseReport) -> None:
    with pytest.raises(ValueError, match="rate: wanted a share between 0 and 1; got 2"):
        report.heads(2.0)
    with pytest.raises(ValueError, match="min_rows: wanted"):
        report.heads(min_rows=-1)
    with pytest.raises(TypeError, match="content: wanted True or False"):
        report.heads(content="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", MEASURES)
def test_a_model_goes_by_the_name_it_is_given(measure: str) -> None:
    calls = {"probe": "collapse_probe", "cache": "cache_risk", "rank": "rank_profile"}
    calls |= {"spectrum": "spectral_gap", "symmetry": "symmetry_gap"}
    call = getattr(hooks, calls.get(measure, measure))
    assert inspect.signature(call).parameters["name"].default is None
    few = {"sweep": {"sigmas": (0.1,), "replicates": 2}, "symmetry": {"permutations": 2}}
    made = call(models.tiny_gpt2(), models.tokens(1), name="mine", **few.get(measure, {}))
    assert made.model["name"] == "mine"
    assert made.summary().startswith("mine: ")
    with shape_checks_off(), pytest.raises(TypeError, match="name: wanted a text; got 3"):
        call(models.tiny_gpt2(), models.tokens(1), name=3)


def test_a_bridge_of_a_module_is_called_what_it_is(tmp_path: Path) -> None:
    """TransformerLens calls each of them "external"."""
    hf = models.tiny_hf(GPT2LMHeadModel, models.tiny_gpt2_config())
    hf.save_pretrained(tmp_path / "mine")

    def named(model: Any) -> str:
        return hooks.collapse_probe(model, models.tokens(1), sigmas=[0.1]).model["name"]

    bridge = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config, device="cpu")
    assert bridge.cfg.model_name == "external"
    assert named(bridge) == "GPT2LMHeadModel"
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "mine")
    bridge = build_bridge_from_module(
        again, "GPT2LMHeadModel", hf_config=again.config, device="cpu"
    )
    assert named(bridge) == "mine"


def test_rows_too_few_to_name_a_head_are_told(model: Any) -> None:
    few = hooks.collapse_probe(model, models.tokens(1, 12), sigmas=[0.1])
    assert few.rows.sum((-1, -2)).max() < 20 <= few.n_sparse
    assert few.heads().empty
    assert "heads(min_rows=1) lists all heads" in few.summary()
    assert len(few.heads(min_rows=1))


# -- the figure -------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_every_report_draws_itself(model: Any, measure: str) -> None:
    made: Any = MEASURES[measure](model, models.tokens(2))
    figure = made.plot()
    assert isinstance(figure, Figure)
    assert any(ax.lines or ax.collections for ax in figure.axes)
    (ax,) = Figure().subplots(1, 1, squeeze=False).ravel()
    assert made.plot(ax=ax) is ax.figure
    with pytest.raises(ValueError, match="backend: wanted"):
        made.plot(backend="gnuplot")


def test_hooks_loads_a_figure_only_when_asked(report: hooks.CollapseReport, tmp_path: Path) -> None:
    """Nothing of qkvnorm_lens is imported before, and without it the package is named."""
    path = report.save(tmp_path / "report.safetensors")
    code = f"""
import sys
import importlib.metadata
from hooks import CollapseReport
report = CollapseReport.load({str(path)!r})
assert "qkvnorm_lens" not in sys.modules and "matplotlib" not in sys.modules
report.plot()
assert "qkvnorm_lens" in sys.modules
from hooks.reports import figures
figures.entry_points = lambda group: ()
try:
    report.plot()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.match(
        r"plot: wanted a package .* CollapseReport .*; got none: pip install", done.stdout
    )
