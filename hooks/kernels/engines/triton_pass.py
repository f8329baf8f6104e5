"""A pass whose layers Triton reduces; what its kernels lack is left to torch.

They have rows whose scores are their q.k parts, under uniform noise that moves keys: no biases, no
soft caps. Of such a layer only the sparse rows are ever gathered or, where attention is fused,
written out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from hooks.kernels import Rule
from hooks.kernels.engines import triton_told
from hooks.kernels.engines.apart import Told, compete, lay_out
from hooks.kernels.engines.attention import Operands
from hooks.kernels.engines.listing import Listing
from hooks.kernels.engines.rates import loose_rates
from hooks.kernels.engines.strict import computes
from hooks.kernels.engines.triton_loose import rates
from hooks.kernels.engines.triton_nearest import Nearest, nearest
from hooks.kernels.engines.triton_strict import strict_rates
from hooks.kernels.engines.triton_table import RowListing
from hooks.kernels.engines.triton_tiles import rows_of, tell_rows_apart
from hooks.kernels.engines.vectorised import TorchPass, Work, rows_at_once

_ROOM, _ROWS = 1 << 28, 1 << 16  # numbers of the rows that exist at a time, and rows


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Inside, kernels are launched on this device: Triton takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class FusedPass(TorchPass):
    """One forward pass, as :class:`TorchPass`."""

    fuses = True

    def add_fused(
        self, index: int, rule: Rule, of: Operands, prompts: Sequence[int], *, biased: bool
    ) -> None:
        """As :meth:`TorchPass.add_fused`."""
        batch, n_heads, n_query, n_key = of.shape
        device = of.query.device
        work = self._work(index, rule, prompts, (batch * n_heads, n_query), device)
        with _current(device):
            at, taken = self._sparse(work, tell_rows_apart(rule, of))
            own = computes(rule) and not biased
            step = max(1, min(_ROWS, _ROOM // n_key)) if own else rows_at_once(n_key, device)
            for first in range(0, len(at), step):
                some, there = at[first : first + step], taken[first : first + step]
                rows = rows_of(of, some, there)
                if own:
                    _rows(work, some, there, rows, of.end.flatten()[some])
                else:
                    qk = rows_of(replace(of, mask=None), some, there) if biased else None
                    work.on(some, there, rows, qk)

    def add(
        self,
        index: int,
        rule: Rule,
        scores: Tensor,
        pattern: Tensor | None,
        qk: Tensor | None,
        prompts: Sequence[int],
    ) -> None:
        """As :meth:`TorchPass.add`."""
        if qk is not None or not computes(rule) or scores.dtype == torch.float64:
            with _current(scores.device):
                super().add(index, rule, scores, pattern, qk, prompts)
            return
        n_matrices, n_query, n_key = scores.shape
        flat, weights = (None if x is None else x.flatten(0, 1) for x in (scores, pattern))
        assert flat is not None
        work = self._work(index, rule, prompts, (n_matrices, n_query), scores.device)
        with _current(scores.device):
            at, taken = self._sparse(work, triton_told.tell_rows_apart(rule, flat, weights))
            step = max(1, min(_ROWS, _ROOM // n_key))
            for first in range(0, len(at), step):
                part = slice(first, first + step)
                _rows(work, at[part], taken[part], flat[at[part]].to(torch.float32))

    def _tell(self, rule: Rule, scores: Tensor, pattern: Tensor | None, step: int) -> Told:
        return triton_told.tell_rows_apart(rule, scores, pattern)

    def _listing(self, device: torch.device) -> Listing:
        return RowListing(2 * self.keep, self.cutoff, device)


def _rows(
    work: Work,
    at: Int[Tensor, "row"],
    some: Tensor,
    scores: Tensor,
    end: Int[Tensor, "row"] | None = None,
) -> None:
    """Add sparse rows ``[row, key]`` without biases; no key from ``end`` on is visible."""
    rule, mine = work.rule, work.mine
    rows = nearest(rule, scores, some, end)
    where = work.place_of(at, rows.star, rows.tied)
    some = some & ~rows.tied
    able = torch.where(rows.top > 0, rows.positive, rows.seen) - 1
    work.count(where, rows.top, torch.where(rows.top != 0, able, 0), some)
    loose = _with_long_rows(work, rows, scores, rates(rule, rows, some))
    work.into.sums[:2].index_add_(2, where.slot, loose.permute(1, 2, 0))
    if mine.strict:
        found = strict_rates(rule, scores, rows, loose[:, 0], where.sink, some, mine.slots)
        work.into.sums[2:].index_add_(2, where.slot, found.transpose(1, 2))
    listing = work.place.listing
    assert isinstance(listing, RowListing)
    listing.add_rows(where.number, rows, scores, some)
    gap, reach = rows.top - rows.second, rows.top.abs() + rows.second.abs()
    a = torch.where(some & (reach > gap), gap / reach, math.inf)
    work.show(where, (a, rows.star, rows.rival), scores, None)


def _with_long_rows(work: Work, rows: Nearest, scores: Tensor, loose: Tensor) -> Tensor:
    """Rates with those of rows whose list is too short, which torch computes from all keys."""
    rule, slots = work.rule, work.mine.slots
    short = (loose < 0).any(2).any(1)
    at, taken = slots.pick("rows with many competitors", short)
    step = rows_at_once(scores.shape[1], scores.device)
    room = torch.cat([loose, loose[:1]])  # the last takes what has no place
    for first in range(0, len(at), step):
        part, some = at[first : first + step], taken[first : first + step]
        rivals = compete(rule, lay_out(rule, scores[part], None))
        room[torch.where(some, part, len(loose))] = loose_rates(rule, rivals, some, slots)
    return room[:-1]
