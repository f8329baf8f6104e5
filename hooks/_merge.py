"""Two collapse reports of one corpus to one: see :meth:`hooks.CollapseReport.merge`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks._table import join

if TYPE_CHECKING:
    from hooks.results import CollapseReport

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
_UNLIKE = ("versions", "device")  # facts that two parts of one probe may differ in


def merge_reports(first: CollapseReport, later: CollapseReport) -> CollapseReport:
    """One report of both; the prompts of ``later`` come behind those of ``first``."""
    if not isinstance(later, type(first)):
        raise TypeError(f"merge: wanted another CollapseReport; got {type(later).__name__}")
    if first.settings != later.settings:
        raise ValueError(
            f"merge: wanted reports of equal settings; got {first.settings} and {later.settings}"
        )
    for fact in sorted({*first.model, *later.model} - {*_UNLIKE}):
        if first.model.get(fact) != later.model.get(fact):
            raise ValueError(
                f"merge: wanted reports of one model; got {fact} {first.model.get(fact)!r} and "
                f"{later.model.get(fact)!r}"
            )
    follows = first.first_prompt + len(first.tokens)
    if later.first_prompt != follows:
        raise ValueError(
            f"merge: wanted a report that starts at prompt {follows} (first_prompt={follows}); got "
            f"one that starts at {later.first_prompt}"
        )
    moved = replace(later.table, prompt=later.table.prompt + np.int32(len(first.tokens)))
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(report, name) for report in (first, later)], axis=axis)
        for name, axis in _PER_PROMPT.items()
    }
    summed: dict[str, Any] = {
        name: getattr(first, name) + getattr(later, name) for name in _PER_DRAW
    }
    return replace(
        first,
        tokens=first.tokens + later.tokens,
        decoder_tokens=first.decoder_tokens + later.decoder_tokens,
        table=join(first.table, moved, first.settings.keep),
        **joined,
        **summed,
    )
