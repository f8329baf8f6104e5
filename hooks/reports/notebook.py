"""How a report shows itself in a notebook: its words, a small table, a curve; static HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

MOST = 10
"""Rows of the table."""
_WIDTH, _HEIGHT, _EDGE = 420, 150, 44
_DASHES = ("", "6 4", "2 4")
Curves = Mapping[str, tuple[Float[np.ndarray, "sigma"], Float[np.ndarray, "sigma"]]]


def percent(x: float) -> str:
    """A share, or a sigma that may never be reached."""
    if math.isnan(x):
        return "-"
    return "never" if math.isinf(x) else f"{100 * x:.3g}%"


def share(x: float) -> str:
    """A share of rows, none below what a table with two digits can show."""
    return "<0.01%" if 0 < x < 1e-4 else percent(x)


def number(x: float) -> str:
    """Three digits; a dash where there is none."""
    return "-" if math.isnan(x) else f"{x:.3g}"


def card(words: str, frame: pd.DataFrame, curves: Curves) -> str:
    """HTML without colours of its own, so that it reads on light and on dark; all text escaped.

    ``frame``: texts and numbers; its first rows are shown. ``curves``: name to (sigmas, shares).
    """
    said = "".join(f"<p>{escape(line)}</p>" for line in words.splitlines() if line)
    return f'<div style="max-width: 60em">{said}{_chart(curves)}{_table(frame)}</div>'


def _table(frame: pd.DataFrame) -> str:
    if frame.empty:
        return ""
    cell = 'style="text-align: {}; padding: 2px 12px 2px 0"'
    heads = [
        f'<th scope="col" {cell.format("right" if i else "left")}>{escape(str(name))}</th>'
        for i, name in enumerate(frame.columns)
    ]
    rows = [
        "".join(
            f"<td {cell.format('right' if i else 'left')}>{escape(_text(value))}</td>"
            for i, value in enumerate(row)
        )
        for row in frame.head(MOST).itertuples(index=False)
    ]
    left = len(frame) - MOST
    more = f"<p>... and {left:,} more</p>" if left > 0 else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table>{more}"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int | np.integer) else number(float(value))


def _chart(curves: Curves) -> str:
    """Shares over sigma, from where the first one begins; "" where nothing happens."""
    lines = {n: (x, y) for n, (x, y) in curves.items() if len(x) > 1 and (y > 0).any()}
    if not lines:
        return ""
    top = max(float(np.nanmax(y)) for _, y in lines.values())
    begin = min(float(x[max(0, int(np.argmax(y > 0)) - 1)]) for x, y in lines.values())
    end = max(float(x[-1]) for x, _ in lines.values())
    span = max(end - begin, 1e-12)
    parts, said = [], []
    for (name, (x, y)), dash in zip(lines.items(), _DASHES, strict=False):
        seen = (x >= begin) & np.isfinite(y)
        across = _EDGE + (x[seen] - begin) / span * (_WIDTH - 2 * _EDGE)
        down = _HEIGHT - 20 - y[seen] / top * (_HEIGHT - 40)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline points="{points}"{dashed}/>')
        said.append(name + (" (dashed)" if dash == _DASHES[1] else " (dotted)" if dash else ""))
    bottom, right = _HEIGHT - 20, _WIDTH - _EDGE
    title = escape(f"{', '.join(said)}: share by sigma")
    label = '<text x="{}" y="{}" text-anchor="{}">{}</text>'
    texts = (
        label.format(_EDGE, _HEIGHT - 4, "start", f"sigma {percent(begin)}")
        + label.format(right, _HEIGHT - 4, "end", percent(end))
        + label.format(_EDGE - 4, 24, "end", percent(top))
    )
    return (
        f'<figure style="margin: 0"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'style="max-width: 100%" role="img" aria-label="{title}" fill="none" '
        f'stroke="currentColor">{"".join(parts)}<path d="M{_EDGE} 20V{bottom}H{right}" '
        f'opacity="0.4"/><g fill="currentColor" stroke="none" font-size="11">{texts}</g></svg>'
        f"<figcaption>{title}</figcaption></figure>"
    )
