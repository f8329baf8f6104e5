"""Triton kernels: rows told apart in one read of their scores; loose rates without biases.

A program works on one row, or on one row, gauge and sigma, and ends early where nothing is to be
done: no place is kept for what might have been. The integral is that of
:mod:`hooks.kernels.engines.uniform`, its panels made as competitors come in.
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor
from triton import language as tl

from hooks.kernels import LEGENDRE_W, LEGENDRE_X, MASKED, UNIFORM, Rule
from hooks.kernels.engines.apart import Competitors, Told, tell_apart, wide
from hooks.kernels.engines.rates import loose_rates
from hooks.kernels.engines.slots import Slots, constant

_NODES = 4
_NEAREST, _EVENLY = 128, 256  # competitors at which panels end: the nearest, and of the others
_AT_ONCE = 1024  # keys read at a time


@triton.jit
def _times(x, y):  # type: ignore[no-untyped-def]
    return x * y


@triton.jit
def _tell(  # type: ignore[no-untyped-def]
    w_ptr, p_ptr, seen_ptr, most_ptr, wrong_ptr, n,
    PATTERN: tl.constexpr, WIDE: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one row: visible keys, the largest weight's inverse (or the weight), what is no number."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), WIDE)
    total = tl.full((), 0.0, tl.float64)
    most = tl.full((), 0.0, WIDE)
    seen = tl.full((), 0, tl.int32)
    wrong = tl.full((), 0, tl.int32)
    for k in range(0, n, BLOCK):
        at = k + lanes
        w = tl.load(w_ptr + row * n + at, mask=at < n, other=float("-inf")).to(WIDE)
        visible = w > LEAST
        seen += tl.sum(visible.to(tl.int32))
        wrong += tl.sum(1 - (w < float("inf")).to(tl.int32))
        if PATTERN:
            p = tl.load(p_ptr + row * n + at, mask=at < n, other=0.0).to(WIDE)
            most = tl.maximum(most, tl.max(p))
        else:
            new = tl.maximum(top, tl.max(w))
            share = tl.where(visible, tl.exp(w - tl.where(visible, new, 0.0)), 0.0)
            faded = tl.where(top > LEAST, tl.exp(top - tl.where(top > LEAST, new, 0.0)), 0.0)
            total = total * faded + tl.sum(share.to(tl.float64))
            top = new
    tl.store(seen_ptr + row, seen)
    tl.store(wrong_ptr + row, wrong)
    if PATTERN:
        tl.store(most_ptr + row, most.to(tl.float64))
    else:
        tl.store(most_ptr + row, total)


@triton.jit
def _rate(  # type: ignore[no-untyped-def]
    s_ptr, star_ptr, sigma_ptr, some_ptr, x_ptr, weight_ptr, out_ptr, n, n_sigmas, every,
    NEAREST: tl.constexpr, BLOCK: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """P of one row at one sigma; its competitors descend."""
    item = tl.program_id(0).to(tl.int64)
    row = item // n_sigmas
    a = 1.7320508075688772 * tl.load(sigma_ptr + item % n_sigmas)
    star, first, some = tl.load(star_ptr + row), tl.load(s_ptr + row * n), tl.load(some_ptr + row)
    sign = tl.where(star > 0, 1.0, -1.0).to(tl.float64)
    up, half = 1 + sign * a, a * tl.abs(star)
    low, top = star - half, first * up
    lost = half * 0.0
    if (some != 0) & (a > 0) & (star != 0) & (top > low) & (first * sign > 0):
        lanes, x = tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, NODES))
        weight = tl.load(weight_ptr + tl.arange(0, NODES))
        width = top - low
        kept, steep, moment, begin = width * 0.0, width * 0.0, width * 0.0, width * 0.0
        known, going = 0, 1
        while going == 1:
            # Competitors up to ``after`` begin in this panel, which ends where the next one does.
            after = tl.minimum(known + tl.where(known < NEAREST, 1, every), n)
            for t in range(known, after, BLOCK):
                at = t + lanes
                s = tl.load(s_ptr + row * n + at, mask=at < after, other=0.0)
                able = (at < after) & (s * up > low) & (s * sign > 0)
                g = tl.where(able, 0.5 * sign / (a * tl.where(able, s, 1.0)), 0.0)
                steep += tl.sum(g)
                moment += tl.sum(tl.where(able, g * (top - s * up), 0.0))
            s = tl.load(s_ptr + row * n + tl.minimum(after, n - 1))
            more = (after < n) & (s * up > low) & (s * sign > 0)
            end = tl.where(more, top - tl.where(more, s, 0.0) * up, width)
            deep = (15.0 + moment) / steep
            end = tl.maximum(begin, tl.minimum(end, deep))
            span = tl.maximum(steep, 16.0 / width) * (end - begin)
            parts = tl.ceil(span).to(tl.int32)
            for i in range(parts):
                h = (end - begin) / parts
                y = begin + h * (i + x)
                stays = tl.full((NODES,), 1.0, tl.float64)
                for t in range(0, after, BLOCK):
                    at = t + lanes
                    s = tl.load(s_ptr + row * n + at, mask=at < after, other=0.0)
                    able = (at < after) & (s * up > low) & (s * sign > 0)
                    s = tl.where(able, s, 1.0)
                    g = tl.where(able, 0.5 * sign / (a * s), 0.0)
                    beyond = tl.maximum(y[:, None] - (top - s * up)[None, :], 0.0)
                    f = tl.maximum(1 - beyond * g[None, :], 0.0)
                    stays *= tl.reduce(f, 1, _times)
                kept += h * tl.sum(stays * weight)
            begin, known = end, after
            going = tl.where(more & (end < deep), 1, 0)
        lost = tl.maximum(width - kept, 0.0) / (2 * half)
    tl.store(out_ptr + item, lost)


def tell_rows_apart(
    rule: Rule,
    scores: Float[Tensor, "row key"],
    pattern: Float[Tensor, "row key"] | None,
    step: int,
) -> Told:
    """As :func:`tell_apart`, for all rows at once."""
    if wide(scores.device) != torch.float64:
        return tell_apart(rule, scores, pattern)
    scores, n_rows = scores.contiguous(), len(scores)
    given = scores if pattern is None else pattern.contiguous()
    seen, wrong = scores.new_empty(2, n_rows, dtype=torch.int32)
    most = scores.new_empty(n_rows, dtype=torch.float64)
    double = scores.dtype == torch.float64
    _tell[(n_rows,)](
        scores, given, seen, most, wrong, scores.shape[1],
        PATTERN=pattern is not None, WIDE=tl.float64 if double else tl.float32, LEAST=MASKED,
        BLOCK=min(_AT_ONCE, triton.next_power_of_2(scores.shape[1])),
    )  # fmt: skip
    no_number = wrong > 0
    broken = no_number if pattern is None else ~(pattern[:, 0] < torch.inf)
    broken = broken & ((seen > 0) | no_number)
    sparse = most <= 1 + rule.room if pattern is None else most >= rule.sparse
    return Told(seen.clamp_max(2).to(torch.int64), sparse & (seen > 1) & ~broken, broken)


def rates(
    rule: Rule, rows: Competitors, some: Bool[Tensor, "row"], slots: Slots
) -> Float[Tensor, "row gauge sigma"]:
    """As :func:`loose_rates`, which has biases, and other laws."""
    if rows.beta is not None or rule.law != UNIFORM or not rule.on_k or not rows.s.numel():
        return loose_rates(rule, rows, some, slots)
    n_rows, gauges, n = rows.s.shape
    sigmas = constant(rule.sigmas, rows.s.dtype, rows.s.device)
    nodes = (r[_NODES, :_NODES] for r in (LEGENDRE_X, LEGENDRE_W))
    out = rows.s.new_empty(n_rows, gauges, len(sigmas))
    if not len(out):
        return out
    _rate[(out.numel(),)](
        rows.s.contiguous(), rows.s_star.contiguous(), sigmas,
        some.repeat_interleave(gauges).to(torch.int8),
        *(constant(x, rows.s.dtype, rows.s.device) for x in nodes), out, n, len(sigmas),
        max(1, -(-(n - _NEAREST) // _EVENLY)),
        NEAREST=_NEAREST, BLOCK=min(128, triton.next_power_of_2(n)), NODES=_NODES,
    )  # fmt: skip
    return out
