"""Triton: the table of nearest competitors, from whole rows.

A first reading counts half-widths in bins, from which the limit follows; a second one lists what is
below it. So what is listed always fits.
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triton import language as tl

from hooks.kernels import MASKED
from hooks.kernels.engines.listing import BINS, END, Listed, Listing
from hooks.kernels.engines.triton_nearest import Nearest

_AT_ONCE = 1024


@triton.jit
def _list(  # type: ignore[no-untyped-def]
    w_ptr, some_ptr, end_ptr, number_ptr, star_ptr, top_ptr, limit_ptr, count_ptr, used_ptr,
    row_ptr, key_ptr, place_ptr, a_ptr, s_ptr, s_star_ptr, step, WRITE: tl.constexpr,
    LEAST: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count a row's competitors below the limit by half-width, or append them."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    if tl.load(some_ptr + row) != 0:
        n = tl.load(end_ptr + row).to(tl.int32)
        limit, top = tl.load(limit_ptr), tl.load(top_ptr + row)
        star, number = tl.load(star_ptr + row), tl.load(number_ptr + row)
        most = tl.minimum(limit, 1.0).to(tl.float64)
        lowest = tl.where(top > 0, top * (1 - most) / (1 + most), -1e30)
        lowest = (lowest - 1e-6 * tl.abs(lowest)).to(tl.float32)
        for k in range(0, n, BLOCK):
            at = k + lanes
            w = tl.load(w_ptr + row * step + at, mask=at < n, other=float("-inf"))
            near = (w > lowest) & (w > LEAST) & (at != star)
            if tl.max(near.to(tl.int32)) > 0:
                s = tl.where(near, w, 0.0).to(tl.float64)
                reach = tl.abs(s) + tl.abs(top)
                a = (top - s) / tl.where(reach > 0, reach, 1.0)
                near = near & (reach > 0) & (a < 1) & (a.to(tl.float32) < limit)
                narrow = a.to(tl.float32)
                if WRITE:
                    found = near.to(tl.int32)
                    to = tl.atomic_add(used_ptr, tl.sum(found).to(tl.int64))
                    to += tl.cumsum(found, 0) - 1
                    tl.store(row_ptr + to, tl.zeros([BLOCK], tl.int64) + number, mask=near)
                    tl.store(
                        key_ptr + to, tl.zeros([BLOCK], tl.int32) + star.to(tl.int32), mask=near
                    )
                    tl.store(place_ptr + to, at, mask=near)
                    tl.store(a_ptr + to, narrow, mask=near)
                    tl.store(s_ptr + to, w, mask=near)
                    own = tl.zeros([BLOCK], tl.float32) + top.to(tl.float32)
                    tl.store(s_star_ptr + to, own, mask=near)
                else:
                    one = tl.full((BLOCK,), 1, tl.int64)
                    tl.atomic_add(count_ptr + (narrow * PER).to(tl.int64), one, mask=near)


@triton.jit
def _keep(  # type: ignore[no-untyped-def]
    limit_ptr, used_ptr, now_ptr, row_ptr, key_ptr, place_ptr, a_ptr, s_ptr, beta_ptr, s_star_ptr,
    row_to, key_to, place_to, a_to, s_to, beta_to, s_star_to, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy entries that are below the limit."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < tl.load(used_ptr)
    near = there & (tl.load(a_ptr + at, mask=there, other=9.0) < tl.load(limit_ptr))
    found = near.to(tl.int32)
    to = tl.atomic_add(now_ptr, tl.sum(found).to(tl.int64)) + tl.cumsum(found, 0) - 1
    tl.store(row_to + to, tl.load(row_ptr + at, mask=near), mask=near)
    tl.store(key_to + to, tl.load(key_ptr + at, mask=near), mask=near)
    tl.store(place_to + to, tl.load(place_ptr + at, mask=near), mask=near)
    tl.store(a_to + to, tl.load(a_ptr + at, mask=near), mask=near)
    tl.store(s_to + to, tl.load(s_ptr + at, mask=near), mask=near)
    tl.store(beta_to + to, tl.load(beta_ptr + at, mask=near), mask=near)
    tl.store(s_star_to + to, tl.load(s_star_ptr + at, mask=near), mask=near)


class RowListing(Listing):
    """A listing that whole rows without biases can be added to."""

    def add_rows(
        self,
        number: Int[Tensor, "row"],
        rows: Nearest,
        scores: Float[Tensor, "row key"],
        some: Bool[Tensor, "row"],
    ) -> None:
        """List the competitors of these rows that are nearer than the limit."""
        held = self._held
        if held is None:
            held = self._nothing(self.room, scores.device)
        n_rows, n = scores.shape
        now = torch.zeros_like(self._used)
        fresh = self._nothing(len(held.a) - 1, scores.device)
        how = {
            "LEAST": MASKED, "PER": BINS / END,
            "BLOCK": min(_AT_ONCE, triton.next_power_of_2(n)),
        }  # fmt: skip
        where = scores, some.to(torch.int8), rows.end, number, rows.star, rows.top
        to = fresh.row, fresh.key, fresh.place, fresh.a, fresh.s, fresh.s_star
        if n_rows:
            _list[(n_rows,)](*where, self.limit, self._count, now, *to, n, WRITE=False, **how)
        self._lower()
        _keep[(triton.cdiv(len(held.a), _AT_ONCE),)](
            self.limit, self._used, now, *held, *fresh, BLOCK=_AT_ONCE
        )
        if n_rows:
            _list[(n_rows,)](*where, self.limit, self._count, now, *to, n, WRITE=True, **how)
        self._held, self._used, self._most = fresh, now, self.room

    @staticmethod
    def _nothing(size: int, device: torch.device) -> Listed:
        ints = [
            torch.zeros(size + 1, dtype=d, device=device) for d in (torch.int64, *[torch.int32] * 2)
        ]
        return Listed(*ints, *(torch.zeros(size + 1, device=device) for _ in range(4)))
