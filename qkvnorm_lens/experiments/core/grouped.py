"""Tables of several models read by group: what a group is called, its models' numbers, its mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core.base import Subject
from qkvnorm_lens.experiments.core.draw import groups
from qkvnorm_lens.experiments.core.stats import Mean, difference, mean, share

STUDY: Final = "study-"
_SIZES: Final = {STUDY: "study models", "addition-": "shipped size"}
LANGUAGE: Final = "language-"
PLAIN: Final = "-"  # the variant of a quantity that has no other


def placement_of(mine: pd.DataFrame) -> str:
    """A group's placement; empty for other people's models, also where a CSV was read."""
    value: Any = mine["placement"].iloc[0]
    return value if isinstance(value, str) else ""


def is_language(mine: pd.DataFrame) -> bool:
    """Whether a group's models read text: other people's, and ours of that name."""
    return not placement_of(mine) or str(mine["group"].iloc[0]).startswith(LANGUAGE)


def kinds_of_models(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows about the study models, about other addition models, and about language models."""
    study, ours = (rows["group"].str.startswith(name) for name in (STUDY, LANGUAGE))
    language = ours | (rows["placement"].fillna("") == "")
    return rows[study], rows[~study & ~language], rows[language]


def group_mean(rows: pd.DataFrame, column: str) -> Mean:
    """Mean over a group's models with its interval; NaN where a model has no number."""
    return mean(rows[column].astype(float).dropna().tolist())


def group_share(rows: pd.DataFrame, column: str) -> Mean:
    """The same of numbers between 0 and 1, with the interval of a share."""
    return share(rows[column].astype(float).dropna().tolist())


def placement_gaps(
    rows: pd.DataFrame, column: str, *, shares: bool = False
) -> list[tuple[str, Mean]]:
    """Pre-Norm minus QKV-Norm at each size that has several seeds of both, with the size's name."""
    named = [(name, _gap(rows, start, column, shares)) for start, name in _SIZES.items()]
    return [(name, gap) for name, gap in named if gap is not None]


def study_difference(rows: pd.DataFrame, column: str, *, shares: bool = False) -> Mean | None:
    """Pre-Norm minus QKV-Norm over the study models, where several seeds of both are there."""
    return _gap(rows, STUDY, column, shares)


def _gap(rows: pd.DataFrame, start: str, column: str, shares: bool) -> Mean | None:
    mine = rows[rows["group"].str.startswith(start)].dropna(subset=[column])
    pre, qkv = (mine[mine["placement"] == p][column].tolist() for p in ("pre", "qkv"))
    return difference(pre, qkv, shares=shares) if min(len(pre), len(qkv)) > 1 else None


def about(
    subject: Subject, rows: pd.DataFrame | Sequence[Mapping[str, Any]], *first: str
) -> pd.DataFrame:
    """Rows about a model: what every one begins with, then these columns, then the others."""
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)
    names = [*subject.columns, *first]
    out: pd.DataFrame = frame.assign(**subject.columns)
    return out[[*names, *(c for c in frame.columns if c not in names)]]


def by_group(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Groups in the table's order, with their rows."""
    return [(group, rows[rows["group"] == group]) for group in groups(rows)]


def pick(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Rows with these values in these columns."""
    chosen = np.ones(len(table), dtype=bool)
    for column, value in wanted.items():
        chosen &= (table[column] == value).to_numpy()
    return table[chosen]


def numbers(table: pd.DataFrame, quantity: str, **wanted: Any) -> list[float]:
    """What a table has of a quantity, one number for each seed; those that are none left out.

    Args:
        table: columns ``quantity``, ``variant`` (`PLAIN` where there is but one) and ``value``.
        quantity: which.
        wanted: values of other columns.
    """
    rows = pick(table, quantity=quantity, **{"variant": PLAIN, **wanted})
    return rows["value"].astype(float).dropna().tolist()


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)
