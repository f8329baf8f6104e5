"""Figures as files: formats, sizes, fonts inside, and the figure as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from qkvnorm_lens import cli, plots
from qkvnorm_lens.plots.charts import WIDTHS
from tests.support.watching import shape_checks_off


def worded(report: Any) -> Any:
    """The same, of tokens that are as long as a language model's."""
    words = tuple(tuple(f" {token}cknowledged"[:13] for token in row) for row in report.tokens)
    return replace(report, tokens=words)


FIGURES: dict[str, Callable[[Any], Figure]] = {
    "curve": plots.collapse_curve,
    "map": lambda report: plots.head_map(report, 0.2, min_rows=1000),
    "rows": plots.attention_rows,
    "rows of words": lambda report: plots.attention_rows(worded(report)),
}


@pytest.mark.parametrize("width", [*WIDTHS, 2.5])
@pytest.mark.parametrize("name", FIGURES)
def test_a_file_has_the_width_and_its_fonts(
    exact: Any, tmp_path: Path, name: str, width: Any
) -> None:
    inches = WIDTHS.get(width, width)
    files = plots.save(
        FIGURES[name](exact), tmp_path / "new" / name, formats="pdf,svg,png", width=width, dpi=100
    )
    assert [file.name for file in files] == [f"{name}.{kind}" for kind in ("pdf", "svg", "png")]
    pdf, svg, png = files
    data = pdf.read_bytes()
    assert b"/FontFile2" in data  # TrueType, embedded
    assert b"/Type3" not in data
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", data)
    assert box
    assert float(box[1]) == pytest.approx(72 * inches, abs=0.1)
    text = svg.read_text()
    assert "<text" not in text  # outlines
    assert "font-family" not in text
    with Image.open(png) as picture:
        assert picture.width == pytest.approx(100 * inches, abs=1)


def ticks(figure: Figure) -> list[Text]:
    """Labels of ticks, of which some lie outside the axes and are not drawn."""
    return [t for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for t in axis.findobj(Text)
            if t is not axis.label]  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_or_illegible(exact: Any, tmp_path: Path, name: str) -> None:
    figure = FIGURES[name](exact)
    seen: list[tuple[float, float, float]] = []

    def look(event: Any) -> None:
        seen.clear()  # the last drawing is the file's
        for text in figure.findobj(Text):
            box = text.get_window_extent()
            if text.get_text() and text not in ticks(figure):
                seen.append((text.get_fontsize(), box.x0, box.x1))

    figure.canvas.mpl_connect("draw_event", look)
    plots.save(figure, tmp_path / "figure.png", width="column", dpi=100)
    assert seen
    assert all(4.5 <= size <= 8 for size, _, _ in seen)
    assert min(x0 for _, x0, _ in seen) > -2
    assert max(x1 for _, _, x1 in seen) < 325 + 2


@pytest.mark.parametrize("width", [*WIDTHS, 2.5])
def test_rows_of_words_have_room(exact: Any, tmp_path: Path, width: Any) -> None:
    """Half of the width at least, and no row's labels under the next one's title."""
    figure = plots.attention_rows(worded(exact))
    seen: list[tuple[float, float, float, float]] = []

    def look(event: Any) -> None:
        seen.clear()
        for ax in figure.axes[:-1]:  # the last one is the colour bar
            labels = [t.get_window_extent().y0 for t in ax.get_xticklabels()]
            title = ax._left_title.get_window_extent()
            seen.append((ax.bbox.width, min(labels), title.y1, title.x1))

    figure.canvas.mpl_connect("draw_event", look)
    plots.save(figure, tmp_path / "figure.png", width=width, dpi=100)
    inches = WIDTHS.get(width, width)
    assert len(seen) == 4
    assert min(wide for wide, *_ in seen) > 50 * inches
    assert all(low > title for (_, low, *_), (_, _, title, _) in pairwise(seen))
    assert max(x1 for *_, x1 in seen) < 100 * inches


@pytest.mark.parametrize("name", FIGURES)
def test_the_figure_stays_as_it_was(exact: Any, tmp_path: Path, name: str) -> None:
    figure = FIGURES[name](exact)

    def look() -> tuple[list[float], np.ndarray]:
        figure.draw_without_rendering()
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
        return [*figure.get_size_inches(), *sizes], np.stack(
            [ax.get_position().get_points() for ax in figure.axes]
        )

    (sizes, places), _ = look(), plots.save(figure, tmp_path / "b.pdf", width="column")
    after, there = look()
    assert after == sizes
    np.testing.assert_allclose(there, places, atol=0.01)


def test_a_view_is_saved_as_its_twin(exact: Any, tmp_path: Path) -> None:
    view = plots.attention(exact, 2)
    assert view.save(tmp_path / "v.html").read_text().startswith("<!doctype html>")
    plots.save(plots.attention_rows(exact, 2), tmp_path / "rows.png")
    assert view.save(tmp_path / "v.png").read_bytes() == (tmp_path / "rows.png").read_bytes()
    assert view.save(tmp_path / "v.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match=r"path: wanted a name that ends in \.html"):
        plots.fragile_text(exact).save(tmp_path / "text.png")


def test_suffix_and_formats_agree(exact: Any, tmp_path: Path) -> None:
    figure = exact.plot()
    assert plots.save(figure, tmp_path / "a") == [tmp_path / "a.pdf"]
    assert plots.save(figure, tmp_path / "a.svg") == [tmp_path / "a.svg"]
    assert plots.save(figure, tmp_path / "a.v2", formats=["png"]) == [tmp_path / "a.v2.png"]
    with pytest.raises(ValueError, match="path: wanted a name without a suffix beside formats"):
        plots.save(figure, tmp_path / "a.png", formats="pdf")
    for wrong, name in (
        ({"formats": "gif"}, "formats"),
        ({"formats": []}, "formats"),
        ({"width": "colum"}, "width"),
        ({"width": 2}, "width"),
        ({"dpi": 0}, "dpi"),
    ):
        with shape_checks_off(), pytest.raises(ValueError, match=f"{name}: wanted"):
            plots.save(figure, tmp_path / "b", **wrong)
    with pytest.raises(TypeError, match="figure: wanted a matplotlib figure"):
        plots.save(exact.plot(backend="plotly"), tmp_path / "b")


def test_the_command_line_draws_a_saved_probe(
    exact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact.save(tmp_path / "report.safetensors")
    assert cli.main(["report", str(tmp_path), "--no-views"]) == 0
    assert not list(tmp_path.glob("*.pdf"))
    assert cli.main(["report", str(tmp_path), "--format", "pdf,svg", "--width", "column"]) == 0
    said = capsys.readouterr().out
    for name in ("collapse", "heads", "rows"):
        for kind in ("pdf", "svg"):
            assert f"wrote {tmp_path / name}.{kind}" in said
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 1000
    for option, wrong in (("--format", "pdf,gif"), ("--width", "wide"), ("--width", "0")):
        assert cli.main(["report", str(tmp_path), option, wrong]) == 2
        assert f"{option}: wanted" in capsys.readouterr().err
