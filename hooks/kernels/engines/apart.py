"""Rows of scores told apart on their own device, and the sparse ones with their competitors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.kernels import BEYOND, MASKED, TIE, UNIFORM, Rule


def wide(device: torch.device) -> torch.dtype:
    """In which dtype a device computes what the scores are reduced to."""
    return torch.float32 if device.type == "mps" else torch.float64


class Told(NamedTuple):
    """What each row of a layer is."""

    seen: Int[Tensor, "row"]  # visible keys, counted up to two
    sparse: Bool[Tensor, "row"]
    broken: Bool[Tensor, "row"]  # something is not finite


def tell_apart(
    rule: Rule, scores: Float[Tensor, "row key"], pattern: Float[Tensor, "row key"] | None
) -> Told:
    """Which rows are sparse, have one visible key, or are not finite (see the compiled loop)."""
    w = scores.to(torch.promote_types(scores.dtype, torch.float32))
    visible, accurate = w > MASKED, wide(w.device)
    seen = visible.sum(1).clamp_max(2)
    wrong = ~(w < math.inf).all(1)
    if pattern is None:
        top = w.amax(1, keepdim=True)
        share = torch.where(visible & (w > top - 40), (w - top).exp(), 0.0)
        sparse, broken = share.sum(1, dtype=accurate) <= 1 + rule.room, wrong
    else:
        sparse = pattern.amax(1).to(accurate) >= rule.sparse
        broken = ~(pattern[:, 0] < math.inf)
    broken = broken & ((seen > 0) | wrong)
    return Told(seen, sparse & (seen == 2) & ~broken, broken)


class Rows(NamedTuple):
    """Sparse rows."""

    s: Float[Tensor, "row key"]  # q.k parts, 0 where masked
    bias: Float[Tensor, "row key"] | None  # what is added to them, 0 where masked
    visible: Bool[Tensor, "row key"]
    star: Int[Tensor, "row"]
    top: Float[Tensor, "row"]  # the attended key's q.k part
    mean: Float[Tensor, "row"]  # of the visible q.k parts
    tied: Bool[Tensor, "row"]


def lay_out(
    rule: Rule, scores: Float[Tensor, "row key"], qk: Float[Tensor, "row key"] | None
) -> Rows:
    """Separate q.k parts and biases; find the attended key."""
    w = scores.to(wide(scores.device))
    visible = w > MASKED
    if rule.soft_cap > 0:
        edge = 1 - rule.eps
        w = rule.soft_cap * torch.atanh((w / rule.soft_cap).clamp(-edge, edge))
    s = torch.where(visible, w if qk is None else qk.to(w), 0.0)
    bias = None if qk is None else torch.where(visible, w - s, 0.0)
    w = torch.where(visible, w, -math.inf)
    top, star = w.max(1)
    close = (w >= (top - TIE * rule.eps * top.abs())[:, None]).sum(1)
    return Rows(
        s=s,
        bias=bias,
        visible=visible,
        star=star,
        top=s.gather(1, star[:, None])[:, 0],
        mean=s.sum(1) / visible.sum(1).clamp_min(1),
        tied=close > 1,
    )


class Competitors(NamedTuple):
    """Of each row, nearest first: as they are, and in the centred gauge."""

    s_star: Float[Tensor, "row gauge"]
    s: Float[Tensor, "row gauge competitor"]  # where there is none: -inf
    beta: Float[Tensor, "row gauge competitor"] | None
    a: Float[Tensor, "row gauge competitor"]  # half-width; inf where none suffices
    place: Int[Tensor, "row competitor"]  # of the first gauge
    able: Int[Tensor, "row"]  # how many can win at all


def half_width(s_star: Tensor, s: Tensor, beta: Tensor | None, *, on_q: bool, on_k: bool) -> Tensor:
    """Smallest a such that factors in [1 - a, 1 + a] move the row; inf above 1."""
    gap, reach = s - s_star, s.abs() + s_star.abs()
    never = torch.full_like(gap, math.inf)
    if beta is None:
        a = -gap / reach if on_k else never
    elif not on_k:
        turn = (beta / torch.where(gap != 0, gap, 1.0) - 1).abs()
        a = torch.where((beta > 0) & (gap > 0) | (beta < 0) & (gap < 0), turn, never)
    elif not on_q:
        a = (beta - gap) / reach
    else:
        rising, falling, still = reach + gap, reach - gap, 4 * reach * (beta - gap)
        up = ((rising**2 + still).clamp_min(0).sqrt() - rising) / (2 * reach)
        down = 2 * (beta - gap) / (falling + (falling**2 - still).clamp_min(0).sqrt())
        a = torch.where(beta > 0, up, torch.where(beta == 0, (beta - gap) / reach, down))
    return torch.where((reach > 0) & (a < 1), a, never)


def compete(rule: Rule, rows: Rows) -> Competitors:
    """Sort each row's other keys by how little it takes them to win."""
    own = torch.zeros_like(rows.visible).scatter_(1, rows.star[:, None], True)
    others = rows.visible & ~own
    shift = torch.stack([torch.zeros_like(rows.mean), rows.mean], 1)
    s_star = rows.top[:, None] - shift
    how = {"on_q": rule.on_q, "on_k": rule.on_k}
    everyone = rule.law != UNIFORM  # beyond factors of 2, too
    if rows.bias is None:
        key, place = torch.where(others, rows.s, -math.inf).sort(
            dim=1, descending=True, stable=True
        )
        s = key[:, None] - shift[:, :, None]
        a = half_width(s_star[:, :, None], s, None, **how)
        a = torch.where(s > -math.inf, a, math.inf)
        if everyone:  # those that the compiled loop collects
            if rule.soft_cap > 0:
                far = ~(a < 1)
            else:
                bar = torch.where(rows.top > 0, rows.mean.clamp_max(0), -math.inf)
                bar = torch.where(rows.top > rows.mean, bar, -math.inf)
                far = (key <= bar[:, None])[:, None].expand_as(s)
            s = torch.where(far, -math.inf, s)
        able = torch.where(
            rows.top > 0,
            (others & (rows.s > 0)).sum(1),
            torch.where(rows.top < 0, others.sum(1), 0),
        )
        return Competitors(s_star, s, None, a, place, able if rule.on_k else able * 0)
    s = rows.s[:, None] - shift[:, :, None]
    beta = rows.bias.gather(1, rows.star[:, None]) - rows.bias
    beta = beta[:, None].expand_as(s)
    a = half_width(s_star[:, :, None], s, beta, **how)
    wins = others[:, None] & (torch.ones_like(a, dtype=torch.bool) if everyone else a < math.inf)
    if not (rule.on_q or rule.on_k):
        wins = torch.zeros_like(wins)
    a = torch.where(wins, a.clamp_max(BEYOND), math.inf)
    a, order = a.sort(dim=2, stable=True)
    s = torch.where(a < math.inf, s.gather(2, order), -math.inf)
    able = wins[:, 0].sum(1)
    return Competitors(s_star, s, beta.gather(2, order), a, order[:, 0], able)
