"""A report as text that people can read, and as JSON for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from hooks import CollapseReport
    from qkvnorm_lens.text import Prompts

RATE = 0.01
MIN_ROWS = 20  # a head with fewer sparse rows is not ranked: one row would decide
_TOKEN, _CONTEXT = 24, 32  # characters shown


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns under their names, right-aligned except those in ``left``."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def percent(x: float) -> str:
    """A sigma in percent; `hooks` has this, too, but takes seconds to import."""
    if math.isnan(x):
        return "-"
    return "never" if math.isinf(x) else f"{100 * x:.3g}%"


def share(x: float, error: float = math.nan) -> str:
    """A share of rows in percent, with its standard error where there is one."""
    if 0 < x < 1e-4:
        return "<0.01%"
    if math.isnan(x) or math.isnan(error) or error == 0:
        return percent(x)
    return f"{100 * x:.3g} ± {100 * error:.1g}%"


def render(report: CollapseReport, prompts: Prompts, *, fragile: int, content: bool = False) -> str:
    """Summary, rates by sigma, the most fragile heads and rows."""
    read = f"Read: {prompts.source}{'; ' if prompts.left_out else ''}{prompts.left_out}."
    parts = [f"{report.summary()}\n{read}"]
    if report.n_sparse:
        parts.append(_rates(report))
        lists = (_heads(report, fragile, content), _rows(report, fragile, content))
        parts += [part for part in lists if part]
    return "\n\n".join(parts)


def _rates(report: CollapseReport) -> str:
    sampled = report.settings.method == "sample"
    frame = report.to_frame("model")
    rows = [
        [
            percent(row["sigma"]),
            share(row["loose"], row["se"] if sampled else row["se_prompts"]),
            share(row["loose_content"]),
            share(row["loose_centred"]),
            strict(report, row),
        ]
        for row in frame.to_dict("records")
    ]
    error = "the draws" if sampled else "the prompts"
    return (
        "Share of sparse rows whose arg max moves, by noise (RMS):\n"
        + table(["sigma", "collapse", "sinks left out", "centred gauge", "strict"], rows, left=())
        + f"\n± is one standard error, over {error}. Strict: onto another sparse maximum"
        f"{strict_error(report)}.\nA row is one head's attention from one token. In the centred "
        "gauge, each row's mean q.k score is subtracted first."
    )


def strict(report: CollapseReport, row: Mapping[Any, Any]) -> str:
    """The strict share of a row of ``to_frame`` as text, with what is known of its error."""
    if report.settings.strict == "sampled":
        return share(row["strict"], row["se_strict"])
    low, high, value = share(row["strict_low"]), share(row["strict_high"]), share(row["strict"])
    return value if low == high else f"{value} ({low} to {high})"


def strict_error(report: CollapseReport) -> str:
    """What stands beside a strict share, as the end of a sentence."""
    if report.settings.strict == "computed":
        return ", with bounds"
    draws = report.settings.draws
    return f" (± over {draws} draws)" if draws else ": not sampled"


def _heads(report: CollapseReport, n: int, content: bool) -> str:
    try:
        ranked = report.heads(RATE, content=content, min_rows=MIN_ROWS)
    except ValueError as error:
        return str(error)
    finite = ranked[ranked["sigma_at_content" if content else "sigma_at"] < math.inf].head(n)
    if finite.empty:
        return ""
    rows = [
        [
            row["label"],
            percent(row["sigma_at"]),
            percent(row["sigma_at_content"]),
            f"{row['rows']:.0f}",
            share(row["sinks"] / row["rows"]),
            f"{row['score_level']:.3g}",
        ]
        for row in finite.to_dict("records")
    ]
    names = ["head", "1% at sigma", "sinks left out", "sparse rows", "sinks", "score level"]
    every = sum(report.model["heads"])
    return (
        f"Heads, most fragile first ({len(ranked)} of {every} have {MIN_ROWS} sparse rows or "
        f"more{', sinks left out' if content else ''}):\n{table(names, rows)}\n1% at sigma: the "
        "noise at which 1% of the head's sparse rows collapse. Score level: mean q.k score of the "
        "attended tokens."
    )


def _rows(report: CollapseReport, n: int, content: bool) -> str:
    """The most fragile rows; equal ones (prompts that begin alike) are counted, not repeated."""
    everything = report.fragile(len(report.table), content=content)
    same = [column for column in everything.columns if column != "prompt"]
    times = everything.groupby(same, sort=False)["prompt"].agg(["first", "size"]).reset_index()
    shown = times.head(n)
    if shown.empty:
        return ""
    rows = [
        [
            percent(row["sigma"]),
            row["label"],
            f"{row['query_pos']} {quoted(row['query_token'])}",
            f"{row['key_pos']} {quoted(row['key_token'])}" + (" sink" if row["sink"] else ""),
            f"{row['jump_pos']} {quoted(row['jump_token'])}",
            context(report.read_by(row["label"], row["first"])[: row["query_pos"] + 1])
            + (f"  (and {row['size'] - 1} more)" if row["size"] > 1 else ""),
        ]
        for row in shown.to_dict("records")
    ]
    names = ["from sigma", "head", "token", "attends to", "jumps to", "in"]
    return (
        f"Most fragile rows{', sinks left out' if content else ''}, and the smallest uniform "
        f"noise that can move them:\n{table(names, rows, left=(1, 2, 3, 4, 5))}\n"
        "Jumps to: where that noise takes it. A picture of the row shows one draw of noise, which "
        "may end elsewhere."
    )


def quoted(token: str) -> str:
    """A token in quotes, with unprintable characters escaped."""
    shown = _visible(token)
    shown = shown if len(shown) <= _TOKEN else f"{shown[: _TOKEN - 1]}…"
    return f"'{shown}'" if '"' in shown else f'"{shown}"'


def context(tokens: Sequence[str]) -> str:
    """The end of a prompt, on one line."""
    text = _visible("".join(tokens))
    return text if len(text) <= _CONTEXT else f"…{text[-_CONTEXT:]}"


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def as_json(
    report: CollapseReport, prompts: Prompts, *, fragile: int, content: bool = False
) -> str:
    """The report for machines; ``null`` means no rows, or a rate that is never reached."""
    thresholds: dict[str, Any] = {"rate": RATE, "model": None, "content": None, "refused": None}
    by_head: list[dict[str, Any]] = []
    try:
        thresholds["model"] = _number(report.sigma_at(RATE))
        thresholds["content"] = _number(report.sigma_at(RATE, content=True))
        by_head = _records(report.heads(RATE, min_rows=0))
    except ValueError as error:
        thresholds["refused"] = str(error)
    told = {
        "model": dict(report.model),
        "settings": asdict(report.settings),
        "read": {
            "source": prompts.source,
            "left_out": prompts.left_out,
            "prompts": len(report.tokens),
            "tokens": report.n_tokens,
        },
        "rows": {
            "examined": int(report.examined.sum()),
            "sparse": report.n_sparse,
            "sinks": int(report.rows[..., 1].sum()),
            "single_key": int(report.single_key.sum()),
            "ties": int(report.ties.sum()),
        },
        "sigma_at": thresholds,
        "rates": _records(report.to_frame("model")),
        "heads": by_head,
        "fragile": _records(report.fragile(fragile, content=content)),
        "summary": report.summary(),
    }
    return json.dumps(told, indent=2, allow_nan=False)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): _number(value) for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
