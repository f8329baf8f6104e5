"""The table of nearest competitors, and the most fragile rows, kept where they are found.

What no longer fits is dropped, farthest first: a histogram of half-widths gives the cutoff below
which the table holds no more than it has room for, without a sort and without asking the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from hooks.kernels.engines.slots import Slots

BINS = 1 << 14  # of the cutoff
END = 4.0  # beyond every half-width: the cutoff of a table that lists all


class Listed(NamedTuple):
    """Entries of the table on one device, in no order: numbers of their rows, and half-widths."""

    row: Int[Tensor, "entry"]  # a row's number in its pass: (layer, matrix, query)
    key: Int[Tensor, "entry"]  # that the row attends to
    place: Int[Tensor, "entry"]  # of the competitor
    a: Float[Tensor, "entry"]
    s: Float[Tensor, "entry"]
    beta: Float[Tensor, "entry"]
    s_star: Float[Tensor, "entry"]


class Listing:
    """Competitors below a cutoff that falls as they come.

    Args:
        room: entries that may stay.
        cutoff: half-width from which on nothing is listed.
    """

    def __init__(self, room: int, cutoff: float, device: torch.device) -> None:
        self.room = room
        self.limit = torch.full((), min(cutoff, END), device=device)
        self._held: Listed | None = None
        self._used = torch.zeros(1, dtype=torch.int64, device=device)
        self._count = torch.zeros(BINS + 1, dtype=torch.int64, device=device)
        self._most = 0  # entries that there can be

    def add(self, new: Listed, some: Bool[Tensor, "entry"]) -> None:
        """List those of the new entries that are ``some`` and nearer than the limit."""
        near = some & (new.a < self.limit)
        bins = (new.a * (BINS / END)).nan_to_num(END).clamp(0, BINS).to(torch.int64)
        self._count.scatter_add_(0, torch.where(near, bins, BINS), near.to(torch.int64))
        if self._held is None:
            size = self.room + max(self.room, 2 * len(near))
            self._held = Listed(*(x.new_zeros(size + 1) for x in new))
        elif self._most + len(near) > len(self._held.a) - 1:
            self._pack(max(len(self._held.a), self.room + 2 * len(near) + 1))
        self._write(new, near, len(near))

    def _lower(self) -> None:
        """Lower the limit until what was counted below it fits."""
        fits = (self._count.cumsum(0) <= self.room).sum().clamp_max(BINS)
        self.limit = torch.minimum(self.limit, fits.to(torch.float32) * (END / BINS))
        self._count *= torch.arange(BINS + 1, device=self.limit.device) < fits

    def _pack(self, size: int) -> None:
        """Lower the limit until what is below fits, and drop what is not."""
        assert self._held is not None
        self._lower()
        old, there = self._held, torch.arange(len(self._held.a), device=self.limit.device)
        near = (there < self._used) & (old.a < self.limit)
        self._held = Listed(*(x.new_zeros(size) for x in old))
        self._used.zero_()
        self._most = 0
        self._write(old, near, self.room)

    def _write(self, new: Listed, near: Bool[Tensor, "entry"], most: int) -> None:
        assert self._held is not None
        end = len(self._held.a) - 1  # the last place takes what is not listed
        to = torch.where(near, self._used + near.cumsum(0) - 1, end).clamp_max(end)
        for held, x in zip(self._held, new, strict=True):
            held.scatter_(0, to, x)
        self._used += near.sum()
        self._most += most

    def finish(self, wanted: int) -> tuple[Listed | None, Tensor, Tensor]:
        """Nearest first, one more than ``wanted``; how many there are, and the limit."""
        if self._held is None:
            return None, self._used, self.limit
        there = torch.arange(len(self._held.a), device=self.limit.device)
        a = torch.where(there < self._used, self._held.a, math.inf)
        order = a.sort(stable=True).indices[: wanted + 1]
        return Listed(*(x[order] for x in self._held)), self._used, self.limit


class FragileRows(NamedTuple):
    """Rows with the least half-widths, most fragile first; of equal ones in ``order``."""

    a: Float[Tensor, "row"]
    order: Int[Tensor, "row"]
    row: Int[Tensor, "row"]  # number in the pass
    key: Int[Tensor, "row"]
    rival: Int[Tensor, "row"]
    scores: Float[Tensor, "row key"]  # -inf where masked
    qk: Float[Tensor, "row key"]

    def with_those(self, other: FragileRows, keep: int) -> FragileRows:
        """The most fragile rows of both."""
        both = []
        for name, x, y in zip(self._fields, self, other, strict=True):
            if x.ndim == 2:
                fill, widest = -math.inf if name == "scores" else 0.0, max(x.shape[1], y.shape[1])
                x, y = (functional.pad(z, (0, widest - z.shape[1]), value=fill) for z in (x, y))
            both.append(torch.cat([x, y]))
        return FragileRows(*both).first(keep)

    def first(self, keep: int) -> FragileRows:
        """The most fragile of these rows."""
        chosen = most_fragile(self.a, self.order, keep)
        return FragileRows(*(x[chosen] for x in self))


def most_fragile(
    a: Float[Tensor, "row"], order: Int[Tensor, "row"], keep: int
) -> Int[Tensor, "chosen"]:
    """Indices of the rows with the least half-widths."""
    by_order = order.sort(stable=True).indices
    return by_order[a[by_order].sort(stable=True).indices][:keep]


def entries(
    slots: Slots,
    a: Float[Tensor, "row competitor"],
    s: Float[Tensor, "row competitor"],
    beta: Float[Tensor, "row competitor"] | None,
    limit: Tensor,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    some: Bool[Tensor, "row"],
) -> tuple[Listed, Bool[Tensor, "entry"]]:
    """Competitors below the limit; ``rows``: number, attended key and its q.k part, places."""
    number, key, s_star, place = rows
    near = (a.to(torch.float32) < limit) & some[:, None]
    at, taken = slots.pick("listed", near.flatten())
    of = torch.div(at, a.shape[1], rounding_mode="floor")
    beta = torch.zeros_like(a) if beta is None else beta
    values = [x.flatten()[at].to(torch.float32) for x in (a, s, beta)]
    values.append(s_star[of].to(torch.float32))
    ints = (x.to(torch.int32) for x in (key[of], place.flatten()[at]))
    return Listed(number[of], *ints, *values), taken
