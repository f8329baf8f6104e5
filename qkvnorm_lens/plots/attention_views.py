"""Attention before and after noise for a report's kept rows, and tokens by fragility."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape as quoted  # markupsafe's leaves markup as it is
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from hooks.arguments import (
    check_booleans,
    check_index,
    check_integers,
    check_path,
    check_text,
    naming,
    plain,
    read_list,
)
from qkvnorm_lens.plots import charts, html
from qkvnorm_lens.plots.collapse import name_of

if TYPE_CHECKING:
    from hooks import CollapseReport

_ROW_HEIGHT = 1.05  # inches
_LEFT_OUT = "#D9D9D9"  # columns that stand for tokens left out


@dataclass(frozen=True)
class View:
    """A separate page: a notebook shows it in a frame, :meth:`save` writes it.

    The page loads nothing and runs only its own script; the frame has no access to the notebook.

    Attributes:
        html: the page.
        height: of the frame in a notebook, pixels.
        twin: makes the same as a figure of matplotlib's, for print; None where there is none.
    """

    html: str = field(repr=False)
    height: int = 480
    twin: Callable[[], charts.Figure] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_text("html", self.html)
        object.__setattr__(self, "height", *check_integers(height=(self.height, 1)))

    def _repr_html_(self) -> str:
        """A frame that holds the page, without network access."""
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{quoted(str(self.html))}" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file that opens offline; returns its path.

        A path that ends in .png, .pdf or .svg gets the view's twin for print
        (:func:`attention_rows` for :func:`attention`).

        Raises:
            ValueError: such a path, of a view without a twin.
            ImportError: such a path, without matplotlib.
            OSError: it can't be written.
        """
        path = check_path("path", path)
        if path.suffix[1:] in charts.FORMATS:
            if self.twin is None:
                wanted = "a name that ends in .html, as this view is only a page"
                raise ValueError(f"path: wanted {wanted}; got {path}")
            return charts.save(self.twin(), path)[0]
        with naming("path", "a file that can be written", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.html, encoding="utf-8")
        return path


def attention(report: CollapseReport, n: int = 8, *, content: bool = False) -> View:
    """Attention of the most fragile rows before and after noise, with circuitsvis.

    For every prompt a pair of matrices per head, clean and under the noise that the report keeps
    (see :class:`hooks.KeptRows`); they show only the kept rows, and ``▸`` marks their tokens. For
    long prompts, only tokens that carry weight are shown. Above them is each row in words and as a
    strip of tokens. :func:`attention_rows` is the static version.

    Args:
        report: what :func:`hooks.collapse_probe` gave, with ``keep_rows`` above 0.
        n: rows to show; equal rows (prompts that begin alike) count once.
        content: leave rows out that attend to the first token.

    Raises:
        ImportError: circuitsvis is not installed.
        TypeError: another kind of report.
        ValueError: the report keeps no rows (of that kind).
    """
    shown = _kept(report, n, content)
    bundle = html.library()
    views = html.circuits(shown, report)
    parts = [Markup("<p>{}</p>{}").format(row.markup(), html.strip(row)) for row in shown]
    for i, view in enumerate(views):
        parts.append(
            Markup(
                '<h2>Prompt {0}</h2><div class="circuits" id="circuits-{1}" data-view="{1}"></div>'
            ).format(view["prompt"], i)
        )
    title = f"{name_of(report)}: the most fragile rows"
    body = Markup("<h1>{}</h1>").format(title) + Markup("").join(parts)
    scripts = [bundle, html.LOADER]
    page = _page(title, body, html.island("circuits", views), scripts)
    return View(page, height=640, twin=partial(attention_rows, report, n, content=content))


def fragile_text(report: CollapseReport, prompts: Sequence[int] | int = 8) -> View:
    """The prompts' tokens, coloured by the least noise that can move one of their rows.

    The darker, the less noise: the colours span these prompts' tokens, logarithmically. Tokens
    without colour have no sparse row that the report's table lists. A token's tooltip names the
    head. Needs nothing but a browser.

    Args:
        report: what :func:`hooks.collapse_probe` gave.
        prompts: which ones, or how many from the first.

    Raises:
        TypeError: another kind of report.
        ValueError: a prompt that the report does not have, or one that was not text.
    """
    chosen = _prompts(report, prompts)
    ends = html.fragile_ends(report, chosen)
    parts = [html.fragile_prompt(report, p, ends) for p in chosen]
    title = f"{name_of(report)}: tokens by the least noise that moves one of their rows"
    body = Markup("<h1>{}</h1>{}").format(title, html.fragile_scale(ends)) + Markup("").join(parts)
    return View(_page(title, body, Markup(""), []), height=min(900, 150 + 90 * len(chosen)))


def attention_rows(
    report: CollapseReport,
    n: int = 4,
    ax: charts.Axes | Sequence[charts.Axes] | np.ndarray | None = None,
    *,
    content: bool = False,
) -> charts.Figure:
    """The most fragile rows before and after noise, for print: two lines of weights per row.

    A ring marks each line's arg max, a grey column tokens left out of a long prompt; the others
    then carry their positions. The static version of :func:`attention`.

    Args:
        report: what :func:`hooks.collapse_probe` gave, with ``keep_rows`` above 0.
        n: rows to show; equal rows count once.
        ax: draw on these, an axis per row; default: a new figure.
        content: leave rows out that attend to the first token.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: another kind of report.
        ValueError: the report keeps no rows (of that kind), or fewer axes than rows.
    """
    shown = _kept(report, n, content)
    if ax is None:
        figure = charts.new_figure((8.4, 0.5 + _ROW_HEIGHT * len(shown)))
        axes = list(np.ravel(figure.subplots(len(shown), 1)))
    else:
        axes = charts.axes_in(ax, len(shown), "one for each row", more=True)
        figure = charts.top_figure(axes[0])
    for each, row in zip(axes, shown, strict=False):
        image = _strip(each, row)
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("attention weight")
    return figure


def _strip(ax: charts.Axes, row: html.ShownRow) -> Any:
    """One row's weights, before above after."""
    from matplotlib import colormaps

    shown = html.with_gaps(row.positions)
    place = {p: i for i, p in enumerate(shown) if isinstance(p, int)}
    cut = len(place) < len(shown)
    both = np.full((2, len(shown)), np.nan)
    both[:, list(place.values())] = row.clean, row.noisy
    blues = colormaps["Blues"].with_extremes(bad=_LEFT_OUT)
    image = ax.imshow(both, cmap=blues, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for line, top in enumerate((row.key, row.lands)):
        if top >= 0:
            at = place[top]
            ax.plot(
                at, line, "o", markersize=9, markerfacecolor="none", markeredgecolor=charts.ORANGE
            )
    small = 6.5 if len(shown) <= 32 else 5
    ax.set_xticks(range(len(shown)))
    text = dict(zip(row.positions, row.tokens, strict=True))
    names = [
        (charts.printable(html.visible(text[p], 10)) + (f" {p}" if cut else ""))
        if isinstance(p, int)
        else "⋯"
        for p in shown
    ]
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    short = max(map(len, names)) <= 2
    for tick in ax.set_xticklabels(names, **({} if short else turned)):
        tick.set_fontsize(small)
        tick.set_parse_math(False)
    after = f"σ = {100 * row.shown_sigma:.3g}%" if row.moved else "not moved"
    ax.set_yticks([0, 1], ["before", after], fontsize=7)
    ax.tick_params(length=0)
    title = ax.set_title(charts.printable(row.sentence()), fontsize=7.5, loc="left", pad=3)
    title.set_parse_math(False)
    for side in ax.spines.values():
        side.set_color(charts.GREY)
        side.set_linewidth(0.5)
    return image


def _kept(report: CollapseReport, n: int, content: bool) -> list[html.ShownRow]:
    charts.check_report("report", report, "CollapseReport")
    (n,) = check_integers(n=(n, 1))
    (content,) = check_booleans(content=content)
    shown = html.shown_rows(report, n, content=content)
    if not shown:
        what = "rows on content" if content and len(report.kept) else "rows"
        raise ValueError(f"report: wanted one that keeps {what}; got none: {_why(report)}")
    return shown


def _why(report: CollapseReport) -> str:
    """Why a report keeps no rows (or only sinks), and what helps."""
    if not report.n_sparse:
        return f"no row has a maximum >= {report.settings.sparse:g} (sparse=)"
    if len(report.kept):
        return "the rows that it keeps all attend to the first token (content=False, or keep_rows=)"
    if not len(report.table):
        return f"noise on {', '.join(report.settings.on)} can move none of its sparse rows"
    return "it was made with keep_rows=0, or by an earlier version"


def _prompts(report: CollapseReport, prompts: Sequence[int] | int) -> list[int]:
    charts.check_report("report", report, "CollapseReport")
    n = len(report.tokens)
    wanted = "an integer >= 1 or a list of indices"
    if isinstance(plain(prompts), Integral):
        chosen = list(range(min(check_integers(prompts=(prompts, 1))[0], n)))
    else:
        try:
            given = read_list("prompts", prompts, wanted)
            chosen = [check_index("prompts", p, n, "prompts") for p in given]
        except TypeError as error:
            raise ValueError(str(error)) from None
    if not chosen:
        raise ValueError(f"prompts: wanted some of 0 to {n - 1}; got none")
    if not any((report.decoder_tokens or report.tokens)[p] for p in chosen):
        raise ValueError("prompts: wanted text; got images or sound")
    return chosen


def _page(title: str, body: Markup, data: Markup, scripts: list[str]) -> str:
    """The whole page."""
    from qkvnorm_lens.plots.html import style

    page = Markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="{}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>{}</title><style>{}</style></head><body><main>{}</main>{}{}</body></html>\n"
    ).format(
        html.policy(scripts),
        title,
        Markup(style()),
        body,
        data,
        Markup("").join(html.script(source) for source in scripts),
    )
    return str(page)
