"""Triton: of each sparse row the attended key, and its nearest competitors in descending order.

A program works on one row, which it reads a few times. As the compiled loop
(:func:`hooks.kernels.row.bar_of_nearest`), it keeps those competitors that decide the rates where
there are many; ``rest`` says below which score some may be missing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triton import language as tl

from hooks.kernels import MASKED, TIE, Rule

ROOM = 512
"""Competitors that a row can have in its list."""
_SMALL = 32  # of a list that is sorted in few steps
_DECIDED, _HALVINGS = 28.0, 8  # see the compiled loop
_AT_ONCE = 1024


class Nearest(NamedTuple):
    """What sparse rows are, and their competitors, nearest first."""

    end: Int[Tensor, "row"]  # no key from here on is visible
    star: Int[Tensor, "row"]
    seen: Int[Tensor, "row"]  # visible keys
    positive: Int[Tensor, "row"]  # keys with a score above 0
    held: Int[Tensor, "row"]  # competitors in the list
    rival: Int[Tensor, "row"]  # the nearest one, in reach or not
    top: Float[Tensor, "row"]
    mean: Float[Tensor, "row"]  # of the visible scores
    second: Float[Tensor, "row"]  # the rival's
    rest: Float[Tensor, "row"]  # scores from here on down are not in the list; -inf: all that count
    tied: Bool[Tensor, "row"]
    s: Float[Tensor, "row competitor"]
    inverse: Float[Tensor, "gauge row competitor"]


@triton.jit
def _lowest_able(s_star, a):  # type: ignore[no-untyped-def]
    """Competitors above this can win within half-width a (see the compiled function)."""
    below = tl.where(a < 1, s_star * (1 + a) / tl.where(a < 1, 1 - a, 1.0), float("-inf"))
    return tl.where(s_star > 0, s_star * (1 - a) / (1 + a), below)


@triton.jit
def _count_above(w_ptr, n, bar, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, BLOCK)
    count = tl.full((), 0, tl.int32)
    for k in range(0, n, BLOCK):
        w = tl.load(w_ptr + k + lanes, mask=k + lanes < n, other=float("-inf"))
        count += tl.sum((w > bar).to(tl.int32))
    return count


@triton.jit
def _sort(  # type: ignore[no-untyped-def]
    s_ptr, inverse_ptr, count, mean, gauge_step, SIZE: tl.constexpr, FEW: tl.constexpr
):  # fmt: skip
    """Sort a list in place, descending, and store 1 / s and 1 / (s - mean)."""
    lanes = tl.arange(0, SIZE)
    s = tl.load(s_ptr + lanes, mask=lanes < count, other=float("-inf"))
    place = lanes
    if FEW:  # each one's place is how many lie before it
        before = (s[None, :] > s[:, None]) | (
            (s[None, :] == s[:, None]) & (lanes[None, :] < lanes[:, None])
        )
        place = tl.sum(before.to(tl.int32), 1)
    else:
        s = tl.sort(s, descending=True)
    tl.debug_barrier()  # all have read
    there = place < count
    tl.store(s_ptr + place, s, mask=there)
    wide = s.to(tl.float64)
    for gauge in tl.static_range(2):
        x = tl.where(there, wide - gauge * mean, 1.0)
        inverse = tl.where(x != 0, 1.0 / tl.where(x != 0, x, 1.0), 0.0)
        tl.store(inverse_ptr + gauge * gauge_step + place, inverse, mask=there)


@triton.jit
def _survey(w_ptr, n, LEAST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest score and where it is; visible and positive ones, and the sum."""
    lanes = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    star = tl.full((), 0, tl.int32)
    seen = tl.full((), 0, tl.int32)
    positive = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float64)
    for k in range(0, n, BLOCK):
        w = tl.load(w_ptr + k + lanes, mask=k + lanes < n, other=float("-inf"))
        visible = w > LEAST
        seen += tl.sum(visible.to(tl.int32))
        positive += tl.sum((w > 0).to(tl.int32))
        total += tl.sum(tl.where(visible, w, 0.0).to(tl.float64))
        most, at = tl.max(w, 0, return_indices=True)
        star = tl.where(most > top, k + at, star)
        top = tl.maximum(top, most)
    return top, star, seen, positive, total


@triton.jit
def _second(w_ptr, n, star, LEAST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of the others, and where it is."""
    lanes = tl.arange(0, BLOCK)
    second = tl.full((), float("-inf"), tl.float32)
    rival = tl.full((), 0, tl.int32)
    for k in range(0, n, BLOCK):
        w = tl.load(w_ptr + k + lanes, mask=k + lanes < n, other=float("-inf"))
        w = tl.where((k + lanes == star) | (w <= LEAST), float("-inf"), w)
        most, at = tl.max(w, 0, return_indices=True)
        rival = tl.where(most > second, k + at, rival)
        second = tl.maximum(second, most)
    return second, rival


@triton.jit
def _collect(  # type: ignore[no-untyped-def]
    w_ptr, s_ptr, n, bar, star, ROOM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Put the others above the bar into the list; how many."""
    lanes = tl.arange(0, BLOCK)
    used = tl.full((), 0, tl.int32)
    for k in range(0, n, BLOCK):
        w = tl.load(w_ptr + k + lanes, mask=k + lanes < n, other=float("-inf"))
        keep = (w > bar) & (k + lanes != star)
        at = used + tl.cumsum(keep.to(tl.int32), 0) - 1
        keep = keep & (at < ROOM)
        tl.store(s_ptr + at, w, mask=keep)
        used += tl.sum(keep.to(tl.int32))
    return used


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    w_ptr, some_ptr, end_ptr, ints_ptr, floats_ptr, s_ptr, inverse_ptr, step, n_rows, reach,
    LEAST: tl.constexpr, DECIDED: tl.constexpr, HALVINGS: tl.constexpr, SMALL: tl.constexpr,
    ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    w_ptr += row * step
    n = tl.load(end_ptr + row).to(tl.int32)
    s_ptr += row * ROOM
    inverse_ptr += row * ROOM
    if tl.load(some_ptr + row) != 0:
        top, star, seen, positive, total = _survey(w_ptr, n, LEAST, BLOCK)
        second, rival = _second(w_ptr, n, star, LEAST, BLOCK)
        mean = total / tl.maximum(seen, 1)
        own = top.to(tl.float64)
        a = tl.minimum(reach, 1.0)
        lowest = tl.minimum(_lowest_able(own, a), mean + _lowest_able(own - mean, a))
        # Rounded down: the rates leave out themselves what can't win.
        least = tl.maximum(lowest - 1e-6 * tl.abs(lowest), LEAST).to(tl.float32)
        bar = least
        count = _count_above(w_ptr, n, bar, BLOCK)
        if (count > ROOM) & (top > 0):
            scale = tl.maximum(own, own - mean).to(tl.float32)
            above, below = top, least
            for _ in range(HALVINGS):
                middle = 0.5 * (above + below)
                within = _count_above(w_ptr, n, middle, BLOCK)
                enough = (within * (top - middle) > 2 * DECIDED * scale) | (within > ROOM)
                below = tl.where(enough, middle, below)
                above = tl.where(enough, above, middle)
            # What is surely enough, if the list has room for it.
            fits = _count_above(w_ptr, n, below, BLOCK) <= ROOM
            bar = tl.where(fits, below, above)
        else:
            if count > ROOM:
                bar = top
        used = _collect(w_ptr, s_ptr, n, bar, star, ROOM, BLOCK)
        tl.debug_barrier()
        if used <= SMALL:
            _sort(s_ptr, inverse_ptr, used, mean, n_rows * ROOM, SMALL, True)
        else:
            _sort(s_ptr, inverse_ptr, used, mean, n_rows * ROOM, ROOM, False)
        tl.store(ints_ptr + row, star)
        tl.store(ints_ptr + n_rows + row, seen)
        tl.store(ints_ptr + 2 * n_rows + row, positive)
        tl.store(ints_ptr + 3 * n_rows + row, used)
        tl.store(ints_ptr + 4 * n_rows + row, rival)
        tl.store(floats_ptr + row, own)
        tl.store(floats_ptr + n_rows + row, mean)
        tl.store(floats_ptr + 2 * n_rows + row, second.to(tl.float64))
        rest = tl.where(bar > least, bar, float("-inf")).to(tl.float64)
        tl.store(floats_ptr + 3 * n_rows + row, rest)


def nearest(
    rule: Rule,
    scores: Float[Tensor, "row key"],
    some: Bool[Tensor, "row"],
    end: Int[Tensor, "row"] | None = None,
) -> Nearest:
    """Rows of scores that are their q.k parts; what is not ``some`` comes out as zeros.

    ``end``: no key from there on is visible to a row.
    """
    n_rows, n = scores.shape
    scores = scores.to(torch.float32).contiguous()
    if end is None:
        end = torch.full_like(some, n, dtype=torch.int32)
    ints = scores.new_zeros(5, n_rows, dtype=torch.int32)
    floats = scores.new_zeros(4, n_rows, dtype=torch.float64)
    s = scores.new_empty(n_rows, ROOM)
    inverse = scores.new_empty(2, n_rows, ROOM, dtype=torch.float64)
    if n_rows:
        _nearest[(n_rows,)](
            scores, some.to(torch.int8), end, ints, floats, s, inverse, n, n_rows,
            math.sqrt(3.0) * float(rule.sigmas[-1]), LEAST=MASKED, DECIDED=_DECIDED,
            HALVINGS=_HALVINGS, SMALL=_SMALL, ROOM=ROOM,
            BLOCK=min(_AT_ONCE, triton.next_power_of_2(n)),
        )  # fmt: skip
    star, seen, positive, held, rival = ints.to(torch.int64)
    top, mean, second, rest = floats
    tied = some & (second >= top - TIE * rule.eps * top.abs())
    return Nearest(
        end, star, seen, positive, held, rival, top, mean, second, rest, tied, s, inverse
    )
