"""Reports as the frames that the figures draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from qkvnorm_lens.plots.charts import Axis, check_report, named_reports


def frames_of(what: str, given: Any, kind: str) -> dict[str, pd.DataFrame]:
    """Reports or their frames, one or several by name, as frames."""
    named = named_reports(given, what)
    for each in named.values():
        check_report(what, each, kind, "DataFrame")
    return {n: r if isinstance(r, pd.DataFrame) else r.to_frame() for n, r in named.items()}


def check_columns(what: str, frame: pd.DataFrame, wanted: Sequence[str]) -> None:
    """Refuse a frame without rows or without these columns."""
    lacking = [column for column in wanted if column not in frame.columns]
    if lacking:
        raise ValueError(
            f"{what}: wanted columns {', '.join(wanted)}; got none named {' nor '.join(lacking)}"
        )
    if frame.empty:
        raise ValueError(f"{what}: wanted rows; got none")


def layer_axis(labels: list[str], label: str = "layer") -> Axis:
    """Layers or sites by name, thinned where they are many."""
    longest = max(map(len, labels))
    room = 12 if longest <= 4 else 7 if longest <= 8 else 4
    step = 1 + (len(labels) - 1) // room
    named = tuple((float(i), labels[i].removeprefix("L")) for i in range(0, len(labels), step))
    return Axis(label, named=named)
