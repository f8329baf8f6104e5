"""The report's page: the report's numbers, nothing from anywhere, and prompts that stay text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import hooks
from hooks import CollapseReport
from qkvnorm_lens import cli, plots, tables
from qkvnorm_lens.page import svg
from qkvnorm_lens.page.report import caveats, html_report, write_html
from qkvnorm_lens.plots.charts.chart import Axis, Chart, Line
from qkvnorm_lens.plots.html import offline, rows, safe
from tests.support import models
from tests.support.pages import HOSTILE, Reader, hostile

SIGMAS = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def report() -> CollapseReport:
    return hooks.collapse_probe(
        models.tiny_gpt2(), models.tokens(2, 16), sigmas=SIGMAS, draws=3, progress=False
    )


@pytest.fixture(scope="module")
def page(report: CollapseReport) -> str:
    return html_report(report, source="some text")


# -- text is data -----------------------------------------------------------------------------


def test_other_words_change_no_element_and_no_script(report: CollapseReport, page: str) -> None:
    bad = html_report(hostile(report), source=HOSTILE[0])
    one, other = Reader(page), Reader(bad)
    assert {tag for tag, _ in other.elements} == {tag for tag, _ in one.elements}
    run = [
        [s for s, a in zip(r.scripts, r.of("script"), strict=True) if not a.get("type")]
        for r in (one, other)
    ]
    assert run[0] == run[1]
    assert "49" not in "".join(t for t in other.text if "7*7" in t or t == "49")
    for reader in (one, other):
        names = {name for _, attributes in reader.elements for name in attributes}
        assert not {n for n in names if n.startswith("on")} | names & {"src", "href", "srcset"}
    assert safe.visible(HOSTILE[0]) in "".join(other.text)


@settings(max_examples=60)
@given(text=st.text())
def test_any_text_comes_back_as_it_was(text: str) -> None:
    reader = Reader(str(safe.token(text)))
    assert [tag for tag, _ in reader.elements] == ["bdi"]
    assert "".join(reader.text) == (safe.visible(text) or "∅")
    assert safe.visible(text).isprintable()
    assert len(safe.visible(text)) <= 10 * 40
    island = Reader(str(safe.island("x", {text: [text]})))
    assert [tag for tag, _ in island.elements] == ["script"]
    assert json.loads(island.scripts[0]) == {text: [text]}
    assert not set("<>&") & set(island.scripts[0])


@settings(max_examples=30)
@given(
    words=st.lists(st.text(max_size=12), min_size=1, max_size=6),
    name=st.text(min_size=1, max_size=20),
)
def test_svg_escapes_what_it_is_given(words: list[str], name: str) -> None:
    x = np.array([1.0, 10.0])
    chart = Chart(
        x=Axis(words[0], "log", 1.0, 10.0),
        y=Axis(words[-1], "log", 0.1, 10.0),
        lines=[Line(x, x, word, "#0072B2", marker=2.0) for word in words],
        note=words[0],
    )
    reader = Reader(str(svg.curve(chart, name)))
    known = {"svg", "defs", "clippath", "rect", "line", "text", "g", "path", "circle", "title"}
    assert {tag for tag, _ in reader.elements} <= known | {"ul", "li"}


def test_only_the_pages_own_scripts_may_run(page: str) -> None:
    """The policy lists exactly the scripts that are there, and lets nothing be loaded."""
    import base64
    import hashlib

    reader = Reader(page)
    (policy,) = (
        a["content"] for a in reader.of("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy
    (allowed,) = re.findall(r"script-src ([^;]*);", policy)
    own = [s for s, a in zip(reader.scripts, reader.of("script"), strict=True) if not a.get("type")]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in own]
    assert allowed.split() == [f"'sha256-{h}'" for h in hashes]
    assert 2 <= len(own) <= 3


def test_a_script_that_would_end_its_element_is_refused() -> None:
    with pytest.raises(ValueError, match="closing tag"):
        safe.script("const a = '</SCRIPT >'")


# -- what is said -----------------------------------------------------------------------------


def test_the_page_holds_the_reports_numbers(report: CollapseReport, page: str) -> None:
    text = " ".join(" ".join(Reader(page).text).split())
    sigma = report.sigma_at(0.01)
    assert isinstance(sigma, float)
    assert tables.percent(sigma) in text
    for line in report.summary().splitlines()[1:]:
        assert line in text
    assert "some text" in text
    for name, version in report.model["versions"].items():
        assert f"{name} {version}" in text
    assert report.model["fingerprint"] in text
    for row in report.fragile(5).to_dict("records"):
        assert f"{100 * row['sigma']:.3g}%" in text
    joined = "".join(Reader(page).text)
    for row in rows.shown_rows(report, 3):
        assert row.sentence() in joined


def test_tables_sort_by_numbers_that_they_show(page: str) -> None:
    for shown, value in re.findall(r'<td data-value="([^"]*)">([^<]*)</td>', page):
        number, said = shown, value
        if said in ("-", "never"):
            assert (number == "") == (said == "-")
        elif said.endswith("%") and not said.startswith("&lt;"):
            assert 100 * float(number) == pytest.approx(float(said[:-1]), rel=6e-3)


@pytest.mark.parametrize("shape", ["broad", "narrow"])
def test_points_lie_where_the_curve_is(report: CollapseReport, page: str, shape: str) -> None:
    """Pixels of the picture, back to numbers."""
    page = page.split(f'class="curve {shape}"')[1].split("</svg>")[0]
    frame = report.to_frame("model")
    found = {
        float(x): float(y)
        for y, x in re.findall(r"<title>collapse: ([\d.e-]+)% at σ = ([\d.]+)%</title>", page)
    }
    for row in frame.to_dict("records"):
        if row["loose"] > 1e-4:
            assert found[round(100 * row["sigma"], 6)] == pytest.approx(
                100 * row["loose"], rel=6e-3
            )
    up = [
        (float(cy), float(y))
        for cy, y in re.findall(r'cy="([\d.]+)"[^>]*><title>[^:<]*: ([\d.e+-]+)% at', page)
    ]
    assert len(up) >= 4
    slopes = np.polyfit(np.log10([y for _, y in up]), [cy for cy, _ in up], 1)
    residual = np.polyval(slopes, np.log10([y for _, y in up])) - [cy for cy, _ in up]
    assert np.abs(residual).max() < 0.6
    assert slopes[0] < 0


def test_caveats_are_those_of_the_model(report: CollapseReport) -> None:
    plain = " ".join(caveats(report))
    assert "Attention sinks" in plain
    assert "Score level" in plain
    assert "QK-norm" not in plain
    options: dict[str, Any] = {"sigmas": [0.1], "draws": 2, "progress": False}
    normed = hooks.collapse_probe(models.tiny_qwen3(), models.tokens(1, 12), **options)
    assert "normalises q and k" in " ".join(caveats(normed))
    assert "One prompt" in " ".join(caveats(normed))
    sampled = hooks.collapse_probe(
        models.tiny_gpt2(), models.tokens(1, 12), method="sample", **options
    )
    assert "counted over 2 draws" in " ".join(caveats(sampled))


@pytest.mark.parametrize(
    "options",
    [
        {"on": "v"},
        {"sparse": 1.0},
        {"keep_rows": 0},
        {"draws": 0},
        {"method": "sample"},
        {"law": "gaussian", "sigmas": [0.1]},
        {"keep": 3},
    ],
    ids=str,
)
def test_reports_with_little_in_them_have_a_page(options: dict[str, Any]) -> None:
    given = {"sigmas": [0.1, 0.3], "draws": 2, "progress": False} | options
    report = hooks.collapse_probe(models.tiny_gpt2(), models.tokens(2, 10), **given)
    page = html_report(report, views=False)
    assert "nan" not in " ".join(Reader(page).text).lower().split()


def test_without_tokens_positions_stand_for_them(report: CollapseReport) -> None:
    silent = replace(report, tokens=((),) * len(report.tokens))
    page = html_report(silent, views=False)
    Reader(page)
    assert 'data-tab="text"' not in page


def test_it_is_small_and_has_no_views_where_none_are_wanted(
    report: CollapseReport, page: str
) -> None:
    assert len(page) < 2_000_000
    without = html_report(report, views=False)
    assert len(without) < 200_000
    assert "CircuitsVis" not in without
    assert 'data-tab="attention"' not in without


def test_a_long_prompt_does_not_make_it_large(report: CollapseReport) -> None:
    long = replace(report, tokens=(("<&>" * 40,) * 60_000, ("b",) * 60_000))
    page = html_report(long)
    assert len(page.encode()) < 5_000_000
    assert "57000 more" in page
    assert "Prompts not shown: 1." in page


def test_without_circuitsvis_the_page_has_no_views(
    report: CollapseReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    assert "CircuitsVis" not in html_report(report)
    for call in (lambda: html_report(report, views=True), lambda: plots.attention(report)):
        with pytest.raises(ImportError, match=r"qkvnorm-lens\[plots\]"):
            call()


@pytest.mark.slow
def test_the_page_wants_neither_matplotlib_nor_plotly(
    report: CollapseReport, tmp_path: Path
) -> None:
    saved = report.save(tmp_path / "report.safetensors")
    code = f"""
import sys
for name in ("matplotlib", "plotly", "circuitsvis"):
    sys.modules[name] = None
from hooks import CollapseReport
from qkvnorm_lens.page.report import html_report
print(len(html_report(CollapseReport.load({str(saved)!r}))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10_000


# -- views ------------------------------------------------------------------------------------


def test_views_have_the_kept_rows_and_nothing_else(report: CollapseReport) -> None:
    shown = rows.shown_rows(report)
    for view in rows.circuits(shown, report):
        mine = [row for row in shown if row.prompt == view["prompt"] and row.moved]
        matrices = np.asarray(view["attention"])
        assert matrices.shape[0] == len(view["attentionHeadNames"])
        assert matrices.shape[1:] == (len(view["tokens"]),) * 2
        marked = {i for i, token in enumerate(view["tokens"]) if token.startswith("▸")}
        for i in marked:  # numbered as everywhere else
            at = int(view["tokens"][i].rpartition("(")[2][:-1])
            assert at in {row.query for row in mine}
        filled = set(np.flatnonzero(matrices.any((0, 2))).tolist())
        assert filled == marked
        assert len(marked) == len({row.query for row in mine})
        for row in mine:
            before = view["attentionHeadNames"].index(f"{row.label} before")
            assert np.abs(matrices[before].max(1) - row.clean.max()).min() < 1e-3


def test_long_rows_show_what_carries_weight() -> None:
    report = hooks.collapse_probe(
        models.tiny_gpt2(), models.tokens(1, 64), sigmas=[0.1], draws=0, progress=False
    )
    long = [row for row in rows.shown_rows(report) if row.query > rows.MOST_TOKENS]
    assert long
    for row in long:
        assert len(row.positions) <= rows.MOST_TOKENS
        assert {row.key, row.rival, row.lands} - {-1} <= set(row.positions)
        whole, _ = report.kept.weights(
            next(
                i
                for i, r in enumerate(report.kept_rows().to_dict("records"))
                if (r["label"], r["query_pos"]) == (row.label, row.query)
            )
        )
        left_out = np.setdiff1d(np.arange(len(whole)), row.positions)
        assert whole[left_out].max() <= row.clean.max()
        assert row.clean.sum() > 0.95


@settings(max_examples=60)
@given(positions=st.sets(st.integers(0, 60), min_size=1))
def test_gaps_stand_for_exactly_what_is_left_out(positions: set[int]) -> None:
    shown = rows.with_gaps(sorted(positions))
    assert [p for p in shown if isinstance(p, int)] == sorted(positions)
    assert len({str(p) for p in shown}) == len(shown)  # circuitsvis looks them up by name
    left_out: set[int] = set()
    for gap in (p for p in shown if isinstance(p, str)):
        first, _, last = gap.removeprefix("⋯ ").partition(" to ")
        left_out |= set(range(int(first), int(last or first) + 1))
    assert left_out == set(range(max(positions) + 1)) - positions


def test_a_view_is_a_page_that_loads_nothing(report: CollapseReport, tmp_path: Path) -> None:
    for view in (plots.attention(hostile(report), 3), plots.fragile_text(hostile(report))):
        reader = Reader(view.save(tmp_path / "view.html").read_text(encoding="utf-8"))
        assert not {n for _, a in reader.elements for n in a} & {"src", "href"}
        frame = Reader(view._repr_html_())
        ((tag, attributes),) = frame.elements
        assert (tag, attributes["sandbox"], attributes["srcdoc"]) == (
            "iframe",
            "allow-scripts",
            view.html,
        )
        assert type(view.html) is str


def test_tokens_are_coloured_by_the_least_noise(report: CollapseReport) -> None:
    for prompt in range(2):
        found = rows.fragile_tokens(report, prompt)
        everything = report.fragile(len(report.table))
        mine = everything[(everything["prompt"] == prompt) & np.isfinite(everything["sigma"])]
        least = mine.groupby("query_pos")["sigma"].min()
        assert {at: f.sigma for at, f in found.items()} == pytest.approx(least.to_dict())
    ends = rows.fragile_ends(report, [0, 1])
    sigmas = sorted(f.sigma for p in (0, 1) for f in rows.fragile_tokens(report, p).values())
    assert ends == (sigmas[0], sigmas[-1])
    shades = [rows.shade(s, ends) for s in sigmas]
    assert shades == sorted(shades, reverse=True)
    assert (shades[0], shades[-1]) == pytest.approx((1, 0.1))  # all of the scale, none invisible
    assert rows.shade(0.3, (0.3, 0.3)) == 1  # a single sigma


def test_the_page_writes_no_share_below_its_least(report: CollapseReport) -> None:
    """Tables, sentences and tiles say <0.01% of the same share."""
    few = replace(report, loose=report.loose * 1e-6, strict=report.strict * 1e-6)
    text = "".join(Reader(html_report(few)).text) + few.summary()
    assert "<0.01%" in few.summary()
    assert not re.search(r"\de-\d", text)


def test_views_refuse_what_they_can_not_show(report: CollapseReport) -> None:
    none = hooks.collapse_probe(
        models.tiny_gpt2(), models.tokens(1, 8), sigmas=[0.1], draws=0, keep_rows=0, progress=False
    )
    for call in (plots.attention, plots.attention_rows):
        with pytest.raises(ValueError, match="keep_rows"):
            call(none)
        with pytest.raises(ValueError, match="n: wanted"):
            call(report, 0)
    for wrong in ([5], [], 0):
        with pytest.raises(ValueError, match="prompts: wanted"):
            plots.fragile_text(report, wrong)
    with pytest.raises(ValueError, match="images or sound"):
        plots.fragile_text(replace(report, tokens=((), ())))
    with pytest.raises(ValueError, match="n: wanted"):
        rows.shown_rows(report, -1)


def test_circuitsvis_is_there_once_and_ends_nothing(page: str) -> None:
    library = offline.library()
    assert "</script" not in library.lower()
    assert "sourceMappingURL" not in library
    assert page.count(library[:2000]) == 1


# -- the command ------------------------------------------------------------------------------


def test_the_command_makes_the_page_of_a_saved_report(
    report: CollapseReport, page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = report.save(tmp_path / "report.safetensors")
    (tmp_path / "summary.txt").write_text("said\nRead: some text.\n\nRead: other.\n")
    assert cli.main(["report", str(tmp_path)]) == 0
    written = tmp_path / "report.html"
    assert str(written) in capsys.readouterr().out
    assert written.read_text(encoding="utf-8") == page
    other = tmp_path / "deep" / "other.html"
    assert cli.main(["report", str(saved), "--out", str(other), "--no-views", "--no-sinks"]) == 0
    assert other.read_text(encoding="utf-8") == html_report(
        report, source="some text", content=True, views=False
    )


def test_the_command_says_what_it_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "report.safetensors" in capsys.readouterr().err
    (tmp_path / "report.safetensors").write_bytes(b"no report")
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "wanted a collapse report" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_writing_makes_directories(report: CollapseReport, tmp_path: Path) -> None:
    path = write_html(report, tmp_path / "a" / "b.html", views=False)
    assert path.read_text(encoding="utf-8") == html_report(report, views=False)
