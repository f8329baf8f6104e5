"""A collapse report as one page that opens anywhere, offline: figures, rows, tables, caveats.

Everything is in the file: pictures as SVG, style, a small script, circuitsvis's script where it is
installed. Text from a prompt is data: it is escaped, and a content security policy allows only the
page's own scripts and loads nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from hooks.arguments import check_booleans, check_optional, check_path, check_text, naming
from qkvnorm_lens import __version__, tables
from qkvnorm_lens.page import svg
from qkvnorm_lens.page.template import environment, source as file_text
from qkvnorm_lens.plots import collapse_chart, head_cells, html, margins_chart, name_of
from qkvnorm_lens.plots.charts import check_report

if TYPE_CHECKING:
    from hooks import CollapseReport

HEADS = 500
"""Heads listed, the most fragile first."""
FRAGILE_ROWS = 60
"""Rows listed with the noise that can move them."""
TEXT_TOKENS = 3000
"""Tokens of whole prompts that are shown by fragility, from the first prompt on."""

TEXT_PROMPTS = 40
VIEWS = 6
"""Prompts whose attention is shown as matrices."""

_Cell = tuple[Any, Any, bool]  # what is shown, what is sorted by, whether it is text


@dataclass
class _Table:
    columns: list[tuple[str, bool]]
    rows: list[list[_Cell]] = field(default_factory=list)


def _columns(*names: str, texts: int = 0) -> list[tuple[str, bool]]:
    """Headings of a table; the first ``texts`` of them are of text."""
    return [(name, i < texts) for i, name in enumerate(names)]


def html_report(
    report: CollapseReport, *, source: str = "", content: bool = False, views: bool | None = None
) -> str:
    """The page.

    Args:
        report: what :func:`hooks.collapse_probe` gave.
        source: what was read, in words.
        content: leave attention sinks out of the map of heads and the lists of rows.
        views: include circuitsvis's attention views (1.3 MB); default: where it is installed.

    Raises:
        ImportError: ``views`` without circuitsvis.
    """
    from hooks.collapse import DRAWS

    check_report("report", report, "CollapseReport")
    source = check_text("source", source)
    (content,), (views,) = check_booleans(content=content), check_optional(views=views)
    shown = html.shown_rows(report, content=content)
    scripts = [file_text("page.js")]
    data: list[dict[str, Any]] = []
    if views is None or views:
        bundle = _library(required=bool(views))
        data = html.circuits(shown, report)[:VIEWS] if bundle else []
        if data:
            scripts = [bundle, html.LOADER, *scripts]
    texts, scale, texts_left_out = _texts(report)
    fragile, left_out = _fragile(report, content)
    chart, margins = collapse_chart(report, "model"), margins_chart(report)
    lead, about = _sentences(report)
    return (
        environment()
        .get_template("report.html")
        .render(
            policy=html.policy(scripts),
            style=Markup(html.style()),
            scripts=[html.script(s) for s in scripts],
            island=html.island("circuits", data) if data else "",
            name=name_of(report),
            lead=lead,
            about=about,
            tiles=_tiles(report),
            tabs=_tabs(bool(data), bool(texts)),
            curve=svg.curve(chart, "share of sparse rows that collapse, by noise"),
            curve_caption=_caption(report),
            caveats=caveats(report),
            **_heads(report, content),
            strips=[(row.markup(), html.strip(row)) for row in shown],
            draws=DRAWS,
            seed=report.settings.seed,
            fragile=fragile,
            left_out=left_out,
            margins=svg.curve(margins, "share of sparse rows that can move, by noise"),
            views=data,
            texts=texts,
            texts_left_out=texts_left_out,
            scale=scale,
            rates=_rates(report),
            rates_note=_rates_note(report),
            method=_method(report, source),
            version=__version__,
        )
    )


def write_html(report: CollapseReport, path: str | Path, **options: Any) -> Path:
    """Write :func:`html_report`'s page; returns its path."""
    path = check_path("path", path)
    text = html_report(report, **options)
    with naming("path", "a file that can be written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def _tabs(views: bool, texts: bool) -> list[tuple[str, str]]:
    """Sections by name, with the labels of their tabs."""
    tabs = {"overview": "Overview", "heads": "Heads", "rows": "Rows"}
    tabs |= {"attention": "Attention"} if views else {}
    tabs |= {"text": "Text"} if texts else {}
    return list((tabs | {"rates": "Rates", "method": "Method"}).items())


def _library(*, required: bool) -> str:
    try:
        return html.library()
    except ImportError:
        if required:
            raise
        return ""


def _sentences(report: CollapseReport) -> tuple[str, str]:
    """The summary's sentences, findings apart from what was measured, without what is elsewhere."""
    sites = str(report.model["sites"])
    lines = [s for s in report.summary().splitlines() if not s.startswith(sites)]
    name = f"{report.model['name']}: "
    first = [line.removeprefix(name) for line in lines[:1]]
    return " ".join(lines[1:]) or first[0], " ".join(first) if lines[1:] else ""


def _sigma_at(report: CollapseReport, *, content: bool = False) -> str:
    try:
        sigma = report.sigma_at(0.01, content=content)
    except ValueError:
        return "not known"
    assert isinstance(sigma, float)
    return tables.percent(sigma)


def _tiles(report: CollapseReport) -> list[tuple[str, str]]:
    n, sinks = report.n_sparse, int(report.rows[..., 1].sum())
    examined = int(report.examined.sum())
    level = report.to_frame("model")["score_level"].iloc[0]
    return [
        (_sigma_at(report), "RMS noise at which 1% of sparse rows collapse"),
        (_sigma_at(report, content=True), "the same with attention sinks left out"),
        (f"{n:,}", f"sparse rows, of {examined:,} examined"),
        (tables.percent(sinks / n) if n else "-", "of them attend to the first token (sinks)"),
        ("-" if math.isnan(level) else f"{level:.3g}", "mean score level of sparse rows"),
    ]


def caveats(report: CollapseReport) -> list[str]:
    """What a reader must know before believing the numbers of this model."""
    settings, n = report.settings, report.n_sparse
    sinks = int(report.rows[..., 1].sum())
    frame = report.to_frame("model")
    said = [f"What noise means in this model. {report.model['sites']}"]
    shields = {role: set(kinds) for role, kinds in report.model["shields"].items()}
    removed = [role for role in ("q", "k") if shields.get(role, set()) & {"removed", "mixed"}]
    if removed:
        said.append(
            f"This model normalises {' and '.join(removed)} after the projection (QK-norm or "
            "QKV-Norm): that norm removes noise before it, in whole or part. The numbers "
            "here are for the vectors that enter the dot product, after the norm; they do not say "
            "that the model would feel noise before it."
        )
    if n:
        share = tables.percent(sinks / n)
        said.append(
            f"Attention sinks: {share} of the sparse rows attend to the first token. Such rows say "
            "nothing about content; the numbers with sinks left out are the ones to compare."
        )
        level = frame["score_level"].iloc[0]
        said.append(
            f"Score level: the attended scores' mean q.k part is {level:.3g}. Softmax ignores a "
            "constant shift of the scores, but collapse does not: with the same attention, a "
            "higher level collapses sooner. Compare models in the centred gauge (the dotted line), "
            "where each row's mean score is removed."
        )
    if n < 100:
        said.append(f"Only {n} sparse rows were found: shares of them are coarse.")
    if len(report.tokens) == 1:
        said.append("One prompt was read: nothing here says how much prompts differ.")
    said.append(
        "Independent noise on every vector is a worst case that is injected, not observed: what "
        "really disturbs a norm is often common to a token's heads. Each layer is noised on its "
        "own, on clean inputs; keys' noise is shared by all rows of a head, so rows are not "
        "independent draws."
    )
    if settings.method == "sample":
        said.append(f"Rates were counted over {settings.draws} draws; bars are standard errors.")
    ties = int(report.ties.sum())
    if ties:
        said.append(f"{ties:,} sparse rows in which two keys share the maximum were left out.")
    return said


def _caption(report: CollapseReport) -> str:
    settings = report.settings
    how = "computed from clean scores" if settings.method == "exact" else "counted over draws"
    return (
        f"{settings.law.capitalize()} noise on the L2 norms of {', '.join(settings.on)}, in each "
        f"layer on its own; collapse is {how}. The straight dotted line is at 1%. Strict: the new "
        f"maximum is again at least {settings.sparse:g}{_strict_bars(report)}."
    )


def _strict_bars(report: CollapseReport) -> str:
    if report.settings.strict == "computed":
        return "; its bars are computed bounds"
    draws = report.settings.draws
    return f"; bars are standard errors over {draws} draws" if draws else ", not sampled"


def _heads(report: CollapseReport, content: bool) -> dict[str, Any]:
    """Map and table of heads, or why there is none."""
    try:
        cells = head_cells(report, tables.RATE, content=content, min_rows=tables.MIN_ROWS)
        frame = report.heads(tables.RATE, content=content, min_rows=0)
    except ValueError as error:
        return {"head_map": "", "heads": None, "heads_left_out": "", "refused": str(error)}
    frame = frame.assign(few=frame["rows"] < tables.MIN_ROWS).sort_values("few", kind="stable")
    head = ("head", "1% at σ", "1% at σ, sinks left out", "sparse rows", "share of sinks")
    table = _Table(_columns(*head, "score level", texts=1))
    for row in frame.head(HEADS).to_dict("records"):
        n, sinks = int(row["rows"]), int(row["sinks"])
        table.rows.append(
            [
                (row["label"], f"{row['layer']:04d} {row['head']:04d}", True),
                _sigma(row["sigma_at"]),
                _sigma(row["sigma_at_content"]),
                (f"{n:,}", n, False),
                _number(sinks / n if n else math.nan, tables.percent),
                _number(row["score_level"], lambda x: f"{x:.3g}"),
            ]
        )
    return {
        "head_map": svg.head_map(cells, tables.MIN_ROWS),
        "heads": table,
        "heads_left_out": f"The first {HEADS} of {len(frame):,}." if len(frame) > HEADS else "",
        "refused": "",
    }


def _sigma(x: float) -> _Cell:
    """A sigma; one that is never reached sorts last but for "no rows"."""
    return (tables.percent(x), "" if math.isnan(x) else 1e9 if math.isinf(x) else x, False)


def _number(x: float, show: Any) -> _Cell:
    return ("-" if math.isnan(x) else show(x), "" if math.isnan(x) else x, False)


def _fragile(report: CollapseReport, content: bool) -> tuple[_Table, str]:
    """The most fragile rows, equal ones counted, and what the list leaves out."""
    texts = _columns("head", "token", "attends to", "jumps to", "in", texts=5)
    table = _Table([*_columns("from σ"), *texts, *_columns("equal rows")])
    frame = report.fragile(len(report.table), content=content)
    frame = frame[np.isfinite(frame["sigma"].to_numpy())]
    same = [column for column in frame.columns if column != "prompt"]
    times = frame.groupby(same, sort=False)["prompt"].agg(["first", "size"]).reset_index()
    for row in times.head(FRAGILE_ROWS).to_dict("records"):
        read = report.read_by(str(row["label"]), int(row["first"]))[: row["query_pos"] + 1]
        sink = Markup(' <span class="tag">sink</span>') if row["sink"] else ""
        table.rows.append(
            [
                (f"{100 * row['sigma']:.3g}%", row["sigma"], False),
                (row["label"], f"{row['layer']:04d} {row['head']:04d}", True),
                _place(row, "query"),
                _place(row, "key", sink),
                _place(row, "jump"),
                (_text(tables.context(read)), tables.context(read), True),
                (row["size"], row["size"], False),
            ]
        )
    more = len(times) - len(table.rows)
    return table, f"The first {len(table.rows)} of {len(times):,} rows." if more > 0 else ""


def _place(row: dict[Any, Any], what: str, after: Any = "") -> _Cell:
    at, text = int(row[f"{what}_pos"]), str(row[f"{what}_token"])
    shown = Markup('{} <span class="mono">{}</span>{}').format(at, html.token(text), after)
    return (shown, f"{at:06d}", True)


def _text(text: str) -> Markup:
    return Markup('<span class="mono">{}</span>').format(html.token(text))


def _texts(report: CollapseReport) -> tuple[list[Markup], Markup, str]:
    """Whole prompts by fragility, as many as fit, and what their colours mean."""
    tokens = report.decoder_tokens or report.tokens
    chosen: list[int] = []
    room = TEXT_TOKENS
    for prompt, of_it in enumerate(tokens):
        room -= len(of_it)
        if not of_it or len(chosen) == TEXT_PROMPTS or (chosen and room < 0):
            break
        chosen.append(prompt)
    left = len([t for t in tokens if t]) - len(chosen)
    said = f"Prompts not shown: {left:,}." if left else ""
    ends = html.fragile_ends(report, chosen)
    shown = [html.fragile_prompt(report, p, ends, most=TEXT_TOKENS) for p in chosen]
    return shown, html.fragile_scale(ends), said


def _rates(report: CollapseReport) -> _Table:
    sampled = report.settings.method == "sample"
    head = ("σ", "collapse", "±", "sinks left out", "centred gauge", "strict")
    table = _Table(_columns(*head, *_strict_columns(report)))
    for row in report.to_frame("model").to_dict("records"):
        values = [
            row["sigma"],
            row["loose"],
            row["se"] if sampled else row["se_prompts"],
            row["loose_content"],
            row["loose_centred"],
            row["strict"],
            *(row[column] for column in _strict_columns(report).values()),
        ]
        table.rows.append([_number(float(v), _share) for v in values])
    return table


def _strict_columns(report: CollapseReport) -> dict[str, str]:
    """What is known of the strict rate's error: headings and columns of ``to_frame``."""
    if report.settings.strict == "computed":
        return {"strict, least": "strict_low", "strict, most": "strict_high"}
    return {"± strict": "se_strict"}


def _share(x: float) -> str:
    return "<0.01%" if 0 < x < 1e-4 else tables.percent(x)


def _rates_note(report: CollapseReport) -> str:
    over = "the draws" if report.settings.method == "sample" else "the prompts"
    if report.settings.strict == "computed":
        return f"± is one standard error, over {over}. Strict lies between its two bounds."
    return (
        f"± is one standard error: of collapse over {over}, of strict over "
        f"{report.settings.draws} draws."
    )


def _method(report: CollapseReport, source: str) -> list[tuple[str, str]]:
    settings, model = report.settings, report.model
    n, tokens = len(report.tokens), report.n_tokens
    heads, kv = sorted(set(model["heads"])), sorted(set(model["kv_heads"]))
    exact = settings.method == "exact"
    sinks, alone, ties = (
        int(x.sum()) for x in (report.rows[..., 1], report.single_key, report.ties)
    )
    return [
        ("Model", name_of(report)),
        ("Architecture", f"{model['architecture'] or 'not known'}, {model['dtype']}"),
        ("Weights", f"fingerprint {model['fingerprint']}"),
        (
            "Layers and heads",
            f"{len(settings.layers)} attention layers, {_range(heads)} heads each, {_range(kv)} "
            "of keys and values",
        ),
        ("Sites", str(model["sites"])),
        (
            "Noise",
            f"{settings.law}, on {', '.join(settings.on)}; factors shared: {settings.shared}; "
            f"seed {settings.seed}",
        ),
        ("σ", ", ".join(f"{100 * s:g}%" for s in settings.sigmas)),
        (
            "Rates",
            f"{'computed from clean scores' if exact else 'counted over draws'}; strict rate "
            + ("computed" if settings.strict == "computed" else f"from {settings.draws} draws"),
        ),
        ("Sparse", f"rows whose largest weight is at least {settings.sparse:g}"),
        ("Read", f"{source + '; ' if source else ''}{n:,} prompts, {tokens:,} tokens"),
        (
            "Rows",
            f"{int(report.examined.sum()):,} examined, {report.n_sparse:,} sparse, {sinks:,} of "
            f"them on the first token; left out: {alone:,} with one visible key, {ties:,} ties",
        ),
        (
            "Kept",
            f"{len(report.kept)} rows for showing; {len(report.table.a):,} competitors of "
            f"{len(report.table):,} rows for thresholds",
        ),
        ("Versions", ", ".join(f"{name} {v}" for name, v in model["versions"].items())),
        ("Device", str(model["device"])),
        *([("Engine", str(model["engine"]))] if "engine" in model else []),
    ]


def _range(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


__all__ = ["caveats", "html_report", "write_html"]
