"""Triton: rows told apart in one read of their scores."""

from __future__ import annotations

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from triton import language as tl

from hooks.kernels import MASKED, Rule
from hooks.kernels.engines.apart import Told, tell_apart, wide

_AT_ONCE = 1024  # keys read at a time


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


def tell_rows_apart(
    rule: Rule,
    scores: Float[Tensor, "row key"],
    pattern: Float[Tensor, "row key"] | None,
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
