"""A collapse report in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from hooks.collapse.settings import ProbeSettings
from hooks.collapse.table import RowTable
from hooks.reports import told

_MIN_ROWS = 20  # a head with fewer sparse rows is not named


@runtime_checkable
class Measured(Protocol):
    """The parts of a report that are put into words."""

    @property
    def settings(self) -> ProbeSettings:
        """How the probe was run."""

    @property
    def model(self) -> Mapping[str, Any]:
        """Facts of the model."""

    @property
    def tokens(self) -> Sequence[Sequence[str]]:
        """Each prompt's tokens as strings."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts."""

    @property
    def examined(self) -> np.ndarray:
        """Counts of rows with two or more visible keys."""

    @property
    def rows(self) -> np.ndarray:
        """Counts of sparse rows."""

    @property
    def table(self) -> RowTable:
        """The rows that can collapse."""

    def to_frame(self, by: Any = "head") -> pd.DataFrame:
        """Rates."""

    def sigma_at(self, rate: float = 0.01, *, by: Any = "model", content: bool = False) -> Any:
        """The sigma of a rate."""


def percent(x: float) -> str:
    """A share or a sigma as text: 7.9%, <0.01%, never reached, or no rows."""
    if math.isnan(x):
        return "no rows"
    if 0 < x < 1e-4:
        return "<0.01%"
    if math.isinf(x):
        return "never"
    return f"{100 * x:.2g}%" if x < 0.0995 else f"{100 * x:.3g}%"


_LOWER: Final = "More text, or a threshold below {:g} (sparse), may give more"


def summarise(report: Measured) -> str:
    """The report in a few sentences (see :meth:`hooks.CollapseReport.summary`)."""
    settings, model = report.settings, report.model
    n_prompts, n_tokens = len(report.tokens), report.n_tokens
    examined, sparse = int(report.examined.sum()), int(report.rows.sum())
    lines = [
        f"{model['name']}: {n_prompts} prompt{'s' * (n_prompts != 1)}, {n_tokens} tokens, "
        f"{len(settings.layers)} attention layers; {settings.law} noise on the norms of "
        f"{', '.join(settings.on)}, one layer at a time."
    ]
    threshold = f"max a >= {settings.sparse:g}"
    if sparse == 0:
        lines.append(
            f"No sparse row: none of the {examined} attention rows has {threshold}, so there is "
            "no single attended token to lose. That is not stability: how non-sparse attention "
            f"changes is not measured here. {_LOWER.format(settings.sparse)}."
        )
        return "\n".join([*lines, told(model)])
    sinks = int(report.rows[..., 1].sum())
    lines.append(
        f"{sparse} of {examined} rows {'is' if sparse == 1 else 'are'} sparse ({threshold}), "
        f"{percent(sinks / sparse)} of these attend to the first token (sinks)."
    )
    if sparse < _MIN_ROWS:
        lines.append(
            f"Fewer than {_MIN_ROWS} sparse rows: too few to say how stable the model is. "
            f"{_LOWER.format(settings.sparse)}."
        )
    lines.append(_threshold_sentence(report))
    named = _first_head(report)
    if named:
        lines.append(named)
    frame = report.to_frame("model")
    middle = frame.iloc[(frame["sigma"] - 0.1).abs().argmin()]
    level = frame["score_level"].iloc[0]
    lines.append(
        f"At sigma = {percent(middle['sigma'])}: {percent(middle['loose'])} of the sparse rows "
        f"collapse, {percent(middle['loose_centred'])} in the centred gauge (mean score level "
        f"{level:.3g}; rates of models with other levels compare only there)."
    )
    lines.append(told(model))
    return "\n".join(lines)


def _threshold_sentence(report: Measured) -> str:
    if not len(report.table) and "k" in report.settings.on:
        return "None of them can collapse: no factors of this law move their arg max."
    if not {"k", "q"} & set(report.settings.on) or not len(report.table):
        return "No row can collapse: this noise never moves an arg max in its own layer."
    everything, content = _one_percent(report, "loose"), _one_percent(report, "loose_content")
    if everything == percent(math.inf):
        return "1% of sparse rows never collapse within this law."
    return f"1% of sparse rows collapse at sigma = {everything} (sinks left out: {content})."


def _one_percent(report: Measured, rate: str) -> str:
    """The sigma at which 1% of the rows collapse or, from the grid, two between which it lies."""
    try:
        sigma = report.sigma_at(0.01, content=rate == "loose_content")
    except ValueError:  # the table has no room for those that decide it
        frame = report.to_frame("model")
        reached = frame["sigma"][frame[rate] >= 0.01]
        if not len(reached):
            return f"more than {percent(frame['sigma'].iloc[-1])}"
        below = frame["sigma"][frame["sigma"] < reached.iloc[0]]
        low = percent(below.iloc[-1]) if len(below) else "0"
        return f"{low} to {percent(reached.iloc[0])} (keep= more of the table for one number)"
    assert isinstance(sigma, float)
    return percent(sigma)


def _first_head(report: Measured) -> str:
    """The most fragile head, among those with enough sparse rows."""
    if not {"k", "q"} & set(report.settings.on) or not len(report.table):
        return ""
    try:
        sigma = report.sigma_at(0.01, by="head")
    except ValueError:
        return ""
    assert isinstance(sigma, pd.DataFrame)
    counts = report.rows.sum((-1, -2))
    if counts.max() < _MIN_ROWS <= counts.sum():
        return (
            f"No head has {_MIN_ROWS} sparse rows or more, so none is named: more text gives more "
            "rows, and heads(min_rows=1) lists all heads."
        )
    values = np.where(counts >= _MIN_ROWS, sigma.to_numpy(), np.nan)
    if not np.isfinite(values).any():
        return ""
    layer, head = np.unravel_index(int(np.nanargmin(values)), values.shape)
    name = f"{report.model['labels'][layer]}H{head}"
    return (
        f"Most fragile head (of those with {_MIN_ROWS} sparse rows or more): {name}, 1% of its "
        f"{int(counts[layer, head])} at sigma = {percent(float(values[layer, head]))}."
    )
