"""Figures as files for papers: vectors or pixels, as wide as a column, with their fonts inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

from hooks.arguments import (
    brief,
    check_choice,
    check_integers,
    check_kind,
    check_number,
    check_path,
    naming,
    plain,
    read_list,
)

FORMATS: Final = ("pdf", "svg", "png")
WIDTHS: Final = {"column": 3.25, "text": 5.5, "page": 6.75}
"""Inches: a column of two (ICML), the text of a single column (NeurIPS), both columns."""
_LEAST_POINTS, _MOST_POINTS = 6, 8  # text in a paper's figure


def embedded() -> AbstractContextManager[None]:
    """TrueType fonts in PDF and PostScript, outlines in SVG; no setting stays changed."""
    import matplotlib as mpl

    return mpl.rc_context({"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "path"})


def read_formats(formats: Any) -> tuple[str, ...]:
    """``"pdf,png"`` or a list of formats, each once.

    Raises:
        TypeError, ValueError: none, or another format.
    """
    given = plain(formats)
    names = given.split(",") if isinstance(given, str) else read_list("formats", given, "names")
    if not names:
        raise ValueError(f"formats: wanted some of {', '.join(FORMATS)}; got none")
    return tuple(dict.fromkeys(check_choice("formats", name, FORMATS) for name in names))


def read_width(width: Any) -> float:
    """Inches, or the name of a width.

    Raises:
        TypeError, ValueError: something else.
    """
    if isinstance(plain(width), str):
        return WIDTHS[check_choice("width", width, WIDTHS)]
    return check_number("width", width, "inches from 2.5 to 50", lambda x: 2.5 <= x <= 50)


def save(
    figure: Any,
    path: str | Path,
    *,
    formats: str | Sequence[str] | None = None,
    width: str | float | int | None = None,
    dpi: int = 300,
) -> list[Path]:
    """Write a figure of matplotlib's for a paper; returns the paths.

    Fonts are inside: TrueType (type 42) in PDF, outlines in SVG. The figure is left as it was.

    Args:
        figure: what a function of this module, or ``report.plot()``, returned.
        path: the file; without a suffix, each format adds its own.
        formats: some of ``"pdf"``, ``"svg"``, ``"png"``, as a list or with commas; default: the
            path's suffix, or PDF.
        width: ``"column"`` (3.25 inches), ``"text"`` (5.5), ``"page"`` (6.75), or inches; the
            height follows, and texts have 6 to 8 points. Default: the figure's own size.
        dpi: of pixels.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: another kind of thing, an unknown format or width.
        OSError: it can't be written.
    """
    from matplotlib.figure import Figure

    check_kind("figure", figure, Figure, "a matplotlib figure")
    path = check_path("path", path)
    if not path.name:
        raise ValueError(f"path: wanted a file's name; got {brief(str(path))}")
    suffix = path.suffix[1:]
    if suffix not in FORMATS:
        suffix, base = "", path
    else:
        base = path.with_suffix("")
    if formats is not None and suffix and read_formats(formats) != (suffix,):
        raise ValueError(f"path: wanted a name without a suffix beside formats; got {brief(path)}")
    chosen = read_formats((suffix or "pdf") if formats is None else formats)
    inches = None if width is None else read_width(width)
    (dpi,) = check_integers(dpi=(dpi, 1, 2400))
    written: list[Path] = []
    with _narrowed(figure, inches), embedded():
        for kind in chosen:
            each = base.with_name(f"{base.name}.{kind}")
            with naming("path", "a file that can be written", each):
                each.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(each, dpi=dpi)
            written.append(each)
    return written


@contextmanager
def _narrowed(figure: Any, inches: float | None) -> Iterator[None]:
    """The figure of this width, with texts of a paper's sizes; as it was afterwards."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.text import Text

    if inches is None:
        yield
        return
    wide, high = figure.get_size_inches()
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    ticks = {axis: [t.get_fontsize() for t in axis.get_ticklabels()] for axis in axes}
    texts = {t: t.get_fontsize() for t in figure.findobj(Text)}
    below = [k for k in (ax.get_legend() for ax in figure.axes) if k and k._ncols > 1]
    engine = figure.get_layout_engine()
    titles = {ax.title if ax.get_title() else ax._left_title: ax for ax in figure.axes}
    said = {title: title.get_text() for title in titles}

    def paper(size: float) -> float:
        return float(min(size, max(_LEAST_POINTS, min(_MOST_POINTS, size * inches / wide))))

    try:
        # A narrow figure is a little taller: its words need as many lines as before, in each row
        # of axes.
        least = min(high, 0.75 * inches * _rows(figure))
        figure.set_size_inches(inches, max(high * inches / wide, least))
        for text, size in texts.items():
            text.set_fontsize(paper(size))
        for axis, sizes in ticks.items():  # also of ticks that are made later
            axis.set_tick_params(labelsize=paper(max(sizes, default=_MOST_POINTS)))
        for key in below:  # the key of a map takes no width from it, only a line
            key.set_in_layout(False)
        if below and isinstance(engine, ConstrainedLayoutEngine):
            line = 0.25 / figure.get_size_inches()[1]
            engine.set(rect=(0, line, 1, 1 - line))
        for title in titles:  # a long one would take the width from its axes
            title.set_in_layout(False)
        figure.draw_without_rendering()
        for title, ax in titles.items():
            end = ax.bbox.x1 if len(figure.axes) > 2 else figure.bbox.width
            _fold(title, end)
            _shrink([title], end)
            title.set_in_layout(True)
        for key in below:
            _shrink(key.get_texts(), figure.bbox.width)
        yield
    finally:
        figure.set_size_inches(wide, high)
        for axis, sizes in ticks.items():
            axis.set_tick_params(labelsize=max(sizes, default=_MOST_POINTS))
        for text, size in texts.items():
            text.set_fontsize(size)
        for title, words in said.items():
            title.set_text(words)
            title.set_in_layout(True)
        for key in below:
            key.set_in_layout(True)
        if below and isinstance(engine, ConstrainedLayoutEngine):
            engine.set(rect=(0, 0, 1, 1))


def _rows(figure: Any) -> int:
    """How many axes lie one above the other."""
    places = [spec.rowspan.start for ax in figure.axes if (spec := ax.get_subplotspec())]
    return len({*places}) or 1


def _fold(text: Any, end: float) -> None:
    """Two lines of one that goes beyond this pixel, even when it is made smaller."""
    box, words = text.get_window_extent(), text.get_text()
    spaces = [i for i, letter in enumerate(words) if letter == " " and words[i - 1] not in "'\""]
    if box.width > 1.15 * (end - box.x0) and spaces and "\n" not in words:
        at = min(spaces, key=lambda i: abs(i - len(words) / 2))
        text.set_text(f"{words[:at]}\n{words[at + 1 :]}")


def _shrink(texts: Sequence[Any], end: float) -> None:
    """Make texts of one line smaller where they would go beyond this pixel."""
    boxes = [text.get_window_extent() for text in texts]
    first, last = min(box.x0 for box in boxes), max(box.x1 for box in boxes)
    for text in texts if last > end else ():
        text.set_fontsize(max(4.5, 0.97 * text.get_fontsize() * (end - first) / (last - first)))
