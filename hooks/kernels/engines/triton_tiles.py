"""Triton: scores of a fused attention, made tile by tile from queries and keys and never kept.

A program works on some queries of one matrix, and walks over the keys that one of them sees: what a
causal mask, a window or padding hides from all of them is not read. Rows are told apart in one
walk; only the sparse ones are written out, in another.
"""

from __future__ import annotations

import math

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triton import language as tl

from hooks.kernels import MASKED, Rule
from hooks.kernels.engines.apart import Told
from hooks.kernels.engines.attention import Operands

# Queries and keys of a tile, warps, and tiles of keys on their way: the first that fits is taken.
_HALF = (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)
_SINGLE = (32, 32, 4, 3), (32, 32, 4, 2), (32, 16, 4, 1), (16, 16, 4, 1)
_SHARED = 232448  # bytes of shared memory that a program of an H200 may have


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    q, k_ptr, key, n_key, k_step, d_step, D: tl.constexpr, WIDTH: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, WIDTH)
    k = tl.load(
        k_ptr + key[None, :].to(tl.int64) * k_step + d[:, None] * d_step,
        mask=(key[None, :] < n_key) & (d[:, None] < D), other=0.0,
    )  # fmt: skip
    if EMULATED:
        k = k.to(tl.float32)
    return tl.dot(q, k, input_precision="ieee")


@triton.jit
def _masked(  # type: ignore[no-untyped-def]
    w, mask_ptr, query, key, first, end, mask_query, mask_key, per, MASK: tl.constexpr
):  # fmt: skip
    """-inf where masked; what a mask adds is ``per`` times its number."""
    seen = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
    if MASK != 0:
        at = mask_ptr + query[:, None].to(tl.int64) * mask_query
        at += key[None, :].to(tl.int64) * mask_key
        if MASK == 1:
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        else:
            w += tl.load(at, mask=seen, other=0.0).to(tl.float32) * per
    return tl.where(seen, w, float("-inf"))


@triton.jit
def _fold(w, per, top, total):  # type: ignore[no-untyped-def]
    """Maximum and sum of weights 2^(per (w - top)) with a tile more; NaN where w is no number."""
    new = tl.maximum(top, tl.max(w, 1))
    safe = tl.where(new > float("-inf"), new, 0.0)
    # Subtracted first: nothing to fuse, so that the largest weight is exactly 1.
    share = tl.sum(tl.exp2((w - safe[:, None]) * per), 1)
    return new, total * tl.exp2((top - safe) * per) + share


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, mask_ptr, first_ptr, end_ptr, slot_ptr, seen_ptr, total_ptr, out_ptr,
    n_heads, group, n_query, n_key, scale,
    q_batch, q_head, q_query, q_d, k_batch, k_head, k_key, k_d, mask_batch, mask_head, mask_query,
    mask_key, first_batch, first_head, first_query, end_batch, end_head, end_query,
    WRITE: tl.constexpr, LEAST: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    MASK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Tell rows apart, or write those that have a slot."""
    tiles = tl.cdiv(n_query, QUERIES)
    matrix = tl.program_id(0) // tiles
    batch, head = (matrix // n_heads).to(tl.int64), (matrix % n_heads).to(tl.int64)
    query = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    there = query < n_query
    row = matrix.to(tl.int64) * n_query + query
    slot = tl.full((QUERIES,), 0, tl.int64)
    if WRITE:
        slot = tl.load(slot_ptr + row, mask=there, other=-1)
        there = there & (slot >= 0)
    first = tl.load(
        first_ptr + batch * first_batch + head * first_head + query * first_query,
        mask=there, other=n_key,
    )  # fmt: skip
    end = tl.load(
        end_ptr + batch * end_batch + head * end_head + query * end_query, mask=there, other=0
    )
    low, high = tl.min(tl.where(first < end, first, n_key)), tl.max(end)
    d = tl.arange(0, WIDTH)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + (head // group) * k_head
    mask_ptr += batch * mask_batch + head * mask_head
    q = tl.load(
        q_ptr + query[:, None].to(tl.int64) * q_query + d[None, :] * q_d,
        mask=there[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    if EMULATED:
        q = q.to(tl.float32)
    # All rows see all keys of a tile from here to there.
    within, until = tl.max(tl.where(first < end, first, 0)), tl.min(tl.where(there, end, n_key))
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    seen = tl.full((QUERIES,), 0, tl.int32)
    total = tl.full((QUERIES,), 0.0, tl.float32)
    per = scale * 1.4426950408889634
    for begin in range(low // KEYS * KEYS, high, KEYS):
        key = begin + tl.arange(0, KEYS)
        w = _product(q, k_ptr, key, n_key, k_key, k_d, D, WIDTH, EMULATED)
        if WRITE:
            w = _masked(
                w * scale, mask_ptr, query, key, first, end, mask_query, mask_key, 1.0, MASK
            )
            # What lies outside the walk is -inf already.
            to = out_ptr + slot[:, None] * n_key + key[None, :]
            tl.store(to, w, mask=there[:, None] & (key[None, :] < n_key))
        else:
            if (MASK != 0) | (begin < within) | (begin + KEYS > until):
                w = _masked(
                    w, mask_ptr, query, key, first, end, mask_query, mask_key, 1 / scale, MASK
                )
            if MASK != 0:
                seen += tl.sum((w * scale > LEAST).to(tl.int32), 1)
            top, total = _fold(w, per, top, total)
    if not WRITE:
        some = tl.where(top * scale > LEAST, seen, 0)
        seen = tl.maximum(end - first, 0) if MASK == 0 else some
        tl.store(seen_ptr + row, seen, mask=there)
        tl.store(total_ptr + row, total, mask=there)


# The interpreter (3.9) multiplies bfloat16 numbers' bits.
_EMULATED = not isinstance(_walk, triton.JITFunction)


def _tile_of(query: Tensor, width: int, write: bool) -> tuple[int, int, int, int]:
    """The largest tile whose operands, and what is written of it, fit into shared memory."""
    room, size = _SHARED, query.element_size()
    if query.device.type == "cuda":
        here = torch.cuda.get_device_properties(query.device)
        room = getattr(here, "shared_memory_per_block_optin", room)
    tiles = (_HALF[1:] if write else _HALF) if size == 2 else _SINGLE
    for tile in tiles:
        queries, keys, _, stages = tile
        if (queries + stages * keys) * width * size + 4 * queries * keys <= room:
            return tile
    return tiles[-1]


def _launch(of: Operands, slot: Tensor, out: tuple[Tensor, ...], write: bool) -> None:
    batch, n_heads, n_query, n_key = of.shape
    if not batch * n_heads * n_query:
        return
    mask = of.mask
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    mask = of.query if mask is None else mask.view(torch.uint8) if kind == 1 else mask
    d = of.query.shape[3]
    width = max(16, triton.next_power_of_2(d))
    queries, keys, warps, stages = _tile_of(of.query, width, write)
    _walk[(triton.cdiv(n_query, queries) * batch * n_heads,)](
        of.query, of.key, mask, of.first, of.end, slot, *out, n_heads, n_heads // of.key.shape[1],
        n_query, n_key, of.scale, *of.query.stride(), *of.key.stride(),
        *(mask.stride() if kind else (0,) * 4), *of.first.stride(), *of.end.stride(),
        WRITE=write, LEAST=MASKED, D=d, WIDTH=width, MASK=kind,
        QUERIES=queries, KEYS=keys, EMULATED=_EMULATED, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip


def tell_rows_apart(rule: Rule, of: Operands) -> Told:
    """As :func:`hooks.kernels.engines.apart.tell_apart`, rows in the order of (matrix, query)."""
    batch, n_heads, n_query, _ = of.shape
    n_rows = batch * n_heads * n_query
    seen = of.query.new_zeros(n_rows, dtype=torch.int32)
    total = of.query.new_zeros(n_rows, dtype=torch.float32)
    _launch(of, seen, (seen, total, total), False)
    broken = total.isnan() | ((total == math.inf) & (seen > 0))
    sparse = (total.to(torch.float64) <= 1 + rule.room) & (seen > 1) & ~broken
    return Told(seen.clamp_max(2).to(torch.int64), sparse, broken)


def rows_of(
    of: Operands, at: Int[Tensor, "place"], taken: Bool[Tensor, "place"]
) -> Float[Tensor, "place key"]:
    """Scores of some rows; those of places that are not taken are all masked."""
    batch, n_heads, n_query, n_key = of.shape
    n_rows = batch * n_heads * n_query
    out = of.query.new_full((len(at), n_key), -math.inf, dtype=torch.float32)
    slot = at.new_full((n_rows + 1,), -1)
    slot.scatter_(0, torch.where(taken, at, n_rows), torch.arange(len(at), device=at.device))
    _launch(of, slot, (slot, slot, out), True)
    return out
