"""Checks that the rows of a collapse report's file lie within the report, as their entries say."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from hooks.collapse.table import COMPLETE
from hooks.kernels import BEYOND
from hooks.noise import check_sigma, get_law
from hooks.reports import Unsound, check_numbers, check_starts

ROW: Final = ("layer", "head", "prompt", "query", "key", "rival")
_SCORE: Final = 3.5e38  # no float32 is larger
_LEAST: Final = 1e-45  # half-widths are above 0: ties have no row in the table
_DRAWS: Final = 1 << 20


def check_table(report: Any) -> None:
    """The table: rows of the report, competitors in order, no more of either than were counted.

    Raises:
        Unsound: one of these does not hold.
    """
    table = report.table
    _check_rows("table", table, report)
    check_starts("table.start", table.start, len(table), len(table.s))
    if len(table.beta) not in (0, len(table.s)):
        got = str(len(table.beta))
        raise Unsound("table.beta", wanted=f"none, or {len(table.s)}", got=got)
    for name in ("s_star", "s", "beta"):
        check_numbers(f"table.{name}", getattr(table, name), -_SCORE, _SCORE)
    cutoff = float(np.nan_to_num(table.cutoff, nan=-1.0))
    check_numbers("table.cutoff", table.cutoff, _LEAST, COMPLETE)
    check_numbers("table.a", table.a, _LEAST, min(cutoff, BEYOND))
    if len(table.a) > report.settings.keep:
        wanted = f"at most keep = {report.settings.keep} competitors"
        raise Unsound("table.a", wanted=wanted, got=str(len(table.a)))
    n = report.examined.shape  # [layer, head, prompt]
    prompt = table.prompt * (not report.settings.pooled)
    each = np.ravel_multi_index((table.layer, table.head, prompt), n)
    rows = np.bincount(each, minlength=int(np.prod(n))).reshape(n)
    check_numbers("table: rows of head ", rows, 0, report.rows.sum(-1))
    listed = np.bincount(each, np.diff(table.start), int(np.prod(n))).reshape(n)
    check_numbers("table: competitors of head ", listed, 0, report.able.sum(-1))


def check_kept(report: Any) -> None:
    """The rows kept for showing: of the report, with attention that is a share.

    Raises:
        Unsound: one of these does not hold.
    """
    kept, settings = report.kept, report.settings
    _check_rows("kept", kept, report)
    if len(kept) > settings.keep_rows:
        raise Unsound("kept", wanted=f"at most {settings.keep_rows} rows", got=str(len(kept)))
    reach = np.maximum(kept.key, kept.rival).astype(np.int64) + 1
    check_starts("kept.start", kept.start, len(kept), len(kept.clean), least=reach)
    check_numbers("kept.half_width", kept.half_width, 0, 1)
    check_numbers("kept.draw", kept.draw, -1, _DRAWS)
    none = kept.draw < 0
    check_numbers("kept.sigma", kept.sigma, 0, nan=none)
    for i, sigma in enumerate(kept.sigma):
        if np.isnan(sigma) != none[i]:
            raise Unsound(f"kept.sigma[{i}]", wanted="NaN where there is no draw", got=f"{sigma}")
        if not none[i]:
            _check_sigma(i, float(sigma), settings.law)
    check_numbers("kept.clean", kept.clean, 0, 1 + 1e-3)
    empty = np.repeat(none, np.diff(kept.start))
    check_numbers("kept.noisy", kept.noisy, 0, 1 + 1e-3, nan=empty)


def _check_sigma(row: int, sigma: float, law: str) -> None:
    try:
        check_sigma(sigma, get_law(law))
    except ValueError as error:
        raise Unsound(f"kept.sigma[{row}]", wanted=f"one of {law} noise", got=f"{sigma}") from error


def _check_rows(what: str, rows: Any, report: Any) -> None:
    """Layer, head, prompt within the report; positions at 0 or later."""
    check_numbers(f"{what}.layer", rows.layer, 0, len(report.settings.layers) - 1)
    heads = np.asarray(report.model["heads"])[rows.layer] - 1
    check_numbers(f"{what}.head", rows.head, 0, heads)
    check_numbers(f"{what}.prompt", rows.prompt, 0, len(report.tokens) - 1)
    for name in ("query", "key", "rival"):
        check_numbers(f"{what}.{name}", getattr(rows, name), 0)
