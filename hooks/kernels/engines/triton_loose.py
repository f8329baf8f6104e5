"""Triton: the loose rates of rows without biases under uniform noise.

A lane works on one row, in one gauge, at one sigma. In the notation of
:mod:`hooks.kernels.engines.uniform`, y is how far the attended score lies below the highest that a
competitor reaches, and

    H(y) = prod_t (A + B(y) / s_t),    A = 1 - (1 + a) / 2a,    B = (top - y) / 2a

(1 - a for 1 + a and -B where s_* < 0), over competitors that have come in. A panel ends where the
next one does.
"""

from __future__ import annotations

import triton
from jaxtyping import Bool, Float
from torch import Tensor
from triton import language as tl

from hooks.kernels import LEGENDRE_W, LEGENDRE_X, Rule
from hooks.kernels.engines.slots import constant
from hooks.kernels.engines.triton_nearest import ROOM, Nearest

_NODES = 3
FALL = 0.75  # of log H in a part of a panel: three nodes are good to 1e-7 then
DEEP = 15.0  # from here on H counts as zero
_LANES = 64


@triton.jit
def _integral(  # type: ignore[no-untyped-def]
    inverse_ptr, x_ptr, weight_ptr, going, joined, parts, per, base, height, h
):  # fmt: skip
    """Integral of H over a panel's parts of width h, which begins ``height`` above zero."""
    kept = h * 0.0
    for i in range(tl.max(parts).to(tl.int32)):
        x = per * (height - h * (i + tl.load(x_ptr)))
        y = per * (height - h * (i + tl.load(x_ptr + 1)))
        z = per * (height - h * (i + tl.load(x_ptr + 2)))
        f, g, k = h * 0.0 + 1.0, h * 0.0 + 1.0, h * 0.0 + 1.0
        for t in range(joined):
            # No factor is below 0 while the attended score can be there.
            inverse = tl.load(inverse_ptr + t, mask=going, other=0.0)
            f *= base + x * inverse
            g *= base + y * inverse
            k *= base + z * inverse
        stays = tl.load(weight_ptr) * f + tl.load(weight_ptr + 1) * g
        stays += tl.load(weight_ptr + 2) * k
        kept += tl.where(going & (i < parts), h * stays, 0.0)
    return kept


@triton.jit
def _rates(  # type: ignore[no-untyped-def]
    s_ptr, inverse_ptr, floats_ptr, count_ptr, sigma_ptr, x_ptr, weight_ptr, out_ptr, n_rows,
    n_sigmas, ROOM: tl.constexpr, LANES: tl.constexpr, FALL: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """P of rows, or -1 where competitors count that are not in the list."""
    gauge = tl.program_id(1) // n_sigmas
    j = tl.program_id(1) % n_sigmas
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = row < n_rows
    a = 1.7320508075688772 * tl.load(sigma_ptr + j + tl.zeros([LANES], tl.int32))
    top = tl.load(floats_ptr + row, mask=there, other=0.0)
    shift = gauge * tl.load(floats_ptr + n_rows + row, mask=there, other=0.0)
    rest = tl.load(floats_ptr + 2 * n_rows + row, mask=there, other=float("-inf")) - shift
    n = tl.load(count_ptr + row, mask=there, other=0).to(tl.int32)
    s_ptr += row * ROOM
    inverse_ptr += (gauge * n_rows + row) * ROOM
    star = top - shift
    sign = tl.where(star > 0, 1.0, -1.0).to(tl.float64)
    up, half = 1 + sign * a, a * tl.abs(star)
    low = star - half
    first = tl.load(s_ptr, mask=n > 0, other=0.0).to(tl.float64) - shift
    reach = first * up
    live = there & (n > 0) & (a > 0) & (star != 0) & (reach > low) & (first * sign > 0)
    # Of a list without competitors in reach there may be some below it.
    unknown = there & (a > 0) & (star != 0) & (rest * up > low) & (rest * sign > 0)
    lost = tl.where(unknown & ~live, -1.0, 0.0).to(tl.float64)
    if tl.max(live.to(tl.int32)) > 0:
        width = tl.where(live, reach - low, 1.0)
        per = tl.where(a > 0, 0.5 * sign / tl.where(a > 0, a, 1.0), 0.0)
        base = 1 - per * up
        known = tl.where(live, 0, n)
        joined = 0
        steep, moment, kept, begin = width * 0.0, width * 0.0, width * 0.0, width * 0.0
        going, deep = live, width
        while tl.max(going.to(tl.int32)) > 0:
            inverse = tl.load(inverse_ptr + known, mask=going, other=0.0)
            g = per * inverse
            steep += g
            moment += g * reach - tl.where(going, per * up, 0.0)  # g d, where d = reach - s up
            known += going.to(tl.int32)
            joined += 1  # of every lane that goes on
            more = going & (known < n)
            s = tl.load(s_ptr + known, mask=more, other=0.0).to(tl.float64) - shift
            more = more & (s * up > low) & (s * sign > 0)
            end = tl.where(more, reach - s * up, width)
            deep = tl.where(going, (DEEP + moment) / tl.where(going, steep, 1.0), deep)
            end = tl.maximum(begin, tl.minimum(end, deep))
            parts = tl.where(going, tl.ceil(steep * (end - begin) / FALL), 0.0)
            h = (end - begin) / tl.maximum(parts, 1.0)
            kept += _integral(
                inverse_ptr, x_ptr, weight_ptr, going, joined, parts, per, base, reach - begin, h
            )
            begin = tl.where(going, end, begin)
            going = more & (end < deep)
        enters = tl.minimum(width, deep)
        missing = unknown & (reach - rest * up < enters)
        found = tl.maximum(width - kept, 0.0) / tl.where(half > 0, 2 * half, 1.0)
        lost = tl.where(live, tl.where(missing, -1.0, found), lost)
    out = out_ptr + (row * 2 + gauge) * n_sigmas + j
    tl.store(out, lost, mask=there)


def rates(rule: Rule, rows: Nearest, some: Bool[Tensor, "row"]) -> Float[Tensor, "row gauge sigma"]:
    """P that the arg max moves; 0 where not ``some``, -1 where the list is too short to tell."""
    like, n_rows, n_sigmas = rows.inverse, len(rows.top), len(rule.sigmas)
    out = like.new_empty(n_rows, 2, n_sigmas)
    if n_rows:
        nodes = (r[_NODES, :_NODES] for r in (LEGENDRE_X, LEGENDRE_W))
        sigmas, x, weight = (constant(v, like.dtype, like.device) for v in (rule.sigmas, *nodes))
        rest = rows.rest.masked_fill(~some, float("-inf"))
        count = rows.held * some
        floats = like.new_empty(3, n_rows)
        for i, values in enumerate((rows.top, rows.mean, rest)):
            floats[i] = values
        _rates[(triton.cdiv(n_rows, _LANES), 2 * n_sigmas)](
            rows.s, rows.inverse, floats, count, sigmas, x, weight, out, n_rows, n_sigmas,
            ROOM=ROOM, LANES=_LANES, FALL=FALL, DEEP=DEEP, num_warps=2,
        )  # fmt: skip
    return out
