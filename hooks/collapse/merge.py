"""Two collapse reports of one corpus to one: see :meth:`hooks.CollapseReport.merge`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks.collapse.kept import join_kept
from hooks.collapse.table import join
from hooks.reports import check_follows, joined_facts

if TYPE_CHECKING:
    from hooks.collapse.report import CollapseReport

_PER_PROMPT = {
    "examined": 2,
    "single_key": 2,
    "ties": 2,
    "padding": 0,
    "rows": 2,
    "able": 2,
    "level": 2,
}
_PER_PROMPT |= {"loose": 3, "strict": 3, "centred": 3}  # the axis of the prompts
_PER_DRAW = ("loose_draws", "strict_draws", "centred_draws")


def merge_reports(first: CollapseReport, later: CollapseReport) -> CollapseReport:
    """One report of both; the prompts of ``later`` come behind those of ``first``."""
    check_follows(first, later)
    moved = replace(later.table, prompt=later.table.prompt + np.int32(len(first.tokens)))
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(report, name) for report in (first, later)], axis=axis)
        for name, axis in _PER_PROMPT.items()
    }
    summed: dict[str, Any] = {
        name: getattr(first, name) + getattr(later, name) for name in _PER_DRAW
    }
    settings = first.settings
    table = join(first.table, moved, settings.keep)
    kept = join_kept(
        first.kept,
        later.kept,
        prompts=len(first.tokens),
        keep=settings.keep_rows,
        cutoff=float(table.cutoff),
    )
    return replace(
        first,
        tokens=first.tokens + later.tokens,
        model=joined_facts(first, later),
        decoder_tokens=first.decoder_tokens + later.decoder_tokens,
        starts=first.document_starts + later.document_starts,
        table=table,
        kept=kept,
        **joined,
        **summed,
    )
