"""The plain torch engine: a pass's layers reduced to sums on the device where their scores lie.

Nothing leaves the device before the pass ends: sums, counts, the table of nearest competitors and
a few rows to show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.kernels import BROKEN, EXAMINED, MASKED, N_COUNTS, SINGLE, TIES, Rule
from hooks.kernels.engines.apart import Competitors, Rows, Told, compete, lay_out, tell_apart, wide
from hooks.kernels.engines.attention import Operands
from hooks.kernels.engines.listing import FragileRows, Listed, Listing, entries, most_fragile
from hooks.kernels.engines.rates import loose_rates
from hooks.kernels.engines.slots import Slots, bring, constant
from hooks.kernels.engines.strict import strict_rates

SUMS = ("loose", "centred", "strict", "strict_low", "strict_high")
"""What a layer's sums are of."""
_ROOM_CPU, _ROOM = 1 << 19, 1 << 22  # scores worked on at a time
_PLACE = 1 << 22  # queries, and matrices, that a row's number can tell apart


def in_chunks(rule: Rule, scores: Tensor, pattern: Tensor | None, step: int) -> Told:
    """Tell rows apart, so many at a time."""
    parts = []
    for first in range(0, len(scores), step):
        part = slice(first, first + step)
        parts.append(tell_apart(rule, scores[part], None if pattern is None else pattern[part]))
    return Told(*(torch.cat(x) for x in zip(*parts, strict=True)))


class LayerSums(NamedTuple):
    """Sums over one layer's rows; the last axis is (matrix, kind)."""

    counts: Int[Tensor, "count matrix"]
    able: Int[Tensor, "matrix_kind"]
    rows: Int[Tensor, "matrix_kind"]
    level: Float[Tensor, "matrix_kind"]
    sums: Float[Tensor, "5 sigma matrix_kind"]


class Brought(NamedTuple):
    """What a pass found, on the CPU."""

    layers: dict[int, LayerSums]
    listed: list[tuple[Listed, float]]  # of each device, and below which half-width it is complete
    fragile: list[FragileRows]


@dataclass
class _Place:
    """What is kept on one device during a pass."""

    listing: Listing
    layers: dict[int, LayerSums] = field(default_factory=dict)
    fragile: FragileRows | None = None


def rows_at_once(n_key: int, device: torch.device) -> int:
    """How many rows torch works on together."""
    return max(1, (_ROOM_CPU if device.type == "cpu" else _ROOM) // n_key)


def row_numbers(layer: int | Tensor, matrix: Tensor, query: Tensor) -> Int[Tensor, "row"]:
    """One number for each row of a pass, in the order of layers, matrices and queries."""
    return (layer * _PLACE + matrix) * _PLACE + query


def from_number(number: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layer, matrix and query of rows."""
    return number // _PLACE**2, number // _PLACE % _PLACE, number % _PLACE


class TorchPass:
    """One forward pass, its layers reduced as they come.

    Args:
        slots: how many places each kind of work has; kept from pass to pass.
        keep: competitors that the table holds.
        keep_rows: rows to show.
        cutoff: half-width from which on nothing is listed.
        strict: whether to compute the strict rate.
    """

    fuses = False
    """Whether it makes a fused attention's scores itself."""

    def __init__(
        self,
        slots: Slots,
        *,
        keep: int,
        keep_rows: int,
        cutoff: float,
        strict: bool,
    ) -> None:
        self.slots, self.keep, self.keep_rows = slots, keep, keep_rows
        self.cutoff, self.strict = cutoff, strict
        self._places: dict[torch.device, _Place] = {}

    def add(
        self,
        index: int,
        rule: Rule,
        scores: Float[Tensor, "matrix query key"],
        pattern: Float[Tensor, "matrix query key"] | None,
        qk: Float[Tensor, "matrix query key"] | None,
        prompts: Sequence[int],
    ) -> None:
        """Reduce a layer's rows, or some of its queries' rows."""
        n_matrices, n_query, n_key = scores.shape
        flat, weights, parts = (
            scores.flatten(0, 1),
            *(None if x is None else x.flatten(0, 1) for x in (pattern, qk)),
        )
        step = rows_at_once(n_key, scores.device)
        work = self._work(index, rule, prompts, (n_matrices, n_query), scores.device)
        at, taken = self._sparse(work, self._tell(rule, flat, weights, step))
        for first in range(0, len(at), step):
            some = at[first : first + step]
            qk_rows = None if parts is None else parts[some]
            work.on(some, taken[first : first + step], flat[some], qk_rows)

    def add_fused(
        self, index: int, rule: Rule, of: Operands, prompts: Sequence[int], *, biased: bool
    ) -> None:
        """Reduce a layer whose attention is fused; ``biased``: its mask adds more than -inf."""
        raise NotImplementedError

    def _tell(self, rule: Rule, scores: Tensor, pattern: Tensor | None, step: int) -> Told:
        return in_chunks(rule, scores, pattern, step)

    def _listing(self, device: torch.device) -> Listing:
        return Listing(2 * self.keep, self.cutoff, device)

    def _work(
        self,
        index: int,
        rule: Rule,
        prompts: Sequence[int],
        shape: tuple[int, int],
        device: torch.device,
    ) -> Work:
        """What a layer's sparse rows are added by; ``shape``: its matrices and their queries."""
        place = self._places.get(device)
        if place is None:
            place = self._places[device] = _Place(self._listing(device))
        if index not in place.layers:
            place.layers[index] = _no_sums(rule, shape[0], device)
        return Work(self, rule, index, place, place.layers[index], prompts, shape[1])

    def _sparse(self, work: Work, told: Told) -> tuple[Tensor, Tensor]:
        """Count what rows are; places for the sparse ones."""
        counts = work.into.counts
        for name, which in ((SINGLE, told.seen == 1), (EXAMINED, told.seen == 2)):
            counts[name] += (which & ~told.broken).view(counts.shape[1], -1).sum(1)
        counts[BROKEN] += told.broken.view(counts.shape[1], -1).sum(1)
        return self.slots.pick("sparse rows", told.sparse)

    def finish(self) -> Brought | None:
        """Bring all to the CPU; None where there were too few places, and more are provided now."""
        found, fits = Brought({}, [], []), True
        ends: dict[torch.device, tuple[Listed | None, int, float]] = {}
        for device, place in self._places.items():
            listed, used, limit = place.listing.finish(self.keep)
            layers = [x for sums in place.layers.values() for x in sums]
            needed, entries_used, below, *here = bring(
                [self.slots.needed(device), used, limit, *layers]
            )
            fits &= self.slots.enough(device, needed.tolist())
            size = len(LayerSums._fields)
            for i, index in enumerate(place.layers):
                found.layers[index] = LayerSums(*here[i * size : (i + 1) * size])
            ends[device] = listed, min(int(entries_used), self.keep + 1), float(below)
        if not fits:
            return None
        for device, (listed, most, end) in ends.items():
            if listed is None:
                continue
            fragile = self._places[device].fragile or ()
            here = bring([*(x[:most] for x in listed), *fragile])
            found.listed.append((Listed(*here[: len(listed)]), end))
            if fragile:
                found.fragile.append(FragileRows(*here[len(listed) :]))
        return found


class Where(NamedTuple):
    """Where rows stand."""

    slot: Int[Tensor, "row"]  # (matrix, kind)
    sink: Float[Tensor, "row"]  # score of the head's sink
    number: Int[Tensor, "row"]
    order: Int[Tensor, "row"]  # by which equally fragile ones are shown


@dataclass
class Work:
    """Sparse rows of one layer."""

    mine: TorchPass
    rule: Rule
    index: int
    place: _Place
    into: LayerSums
    prompts: Sequence[int]
    n_query: int

    def on(
        self, at: Tensor, some: Tensor, scores: Float[Tensor, "row key"], qk: Tensor | None
    ) -> None:
        """Add these rows; ``some``: which of them there are."""
        rule, into = self.rule, self.into
        rows = lay_out(rule, scores, qk)
        where = self.place_of(at, rows.star, some & rows.tied)
        some = some & ~rows.tied
        rivals = compete(rule, rows)
        self.count(where, rows.top, rivals.able, some)
        loose = loose_rates(rule, rivals, some, self.mine.slots)
        into.sums[:2].index_add_(2, where.slot, loose.permute(1, 2, 0))
        if self.mine.strict:
            strict = strict_rates(rule, rows, loose[:, 0], where.sink, some, self.mine.slots)
            into.sums[2:].index_add_(2, where.slot, strict.transpose(1, 2))
        self._list(rows, rivals, where, some)
        a = torch.where(some, rivals.a[:, 0, 0], math.inf)
        self.show(where, (a, rows.star, rivals.place[:, 0]), scores, qk)

    def place_of(self, at: Tensor, star: Tensor, tied: Tensor) -> Where:
        """Where rows stand; ties are counted."""
        rule = self.rule
        matrix = torch.div(at, self.n_query, rounding_mode="floor")
        query = at - matrix * self.n_query + rule.first_query
        self.into.counts[TIES].index_add_(0, matrix, tied.to(torch.int64))
        first = constant(rule.first, torch.int64, at.device)
        batch = torch.div(matrix, rule.n_heads, rounding_mode="floor")
        head = matrix - batch * rule.n_heads
        sink = constant(rule.sink, wide(at.device), at.device)[head]
        prompts = constant(np.asarray(self.prompts), torch.int64, at.device)
        number = row_numbers(self.index, matrix, query)
        order = row_numbers(self.index * rule.n_heads + head, prompts[batch], query)
        return Where(2 * matrix + first[batch, star], sink, number, order)

    def count(self, where: Where, top: Tensor, able: Tensor, some: Tensor) -> None:
        """Count rows, their levels, and the competitors that can win."""
        into, count = self.into, some.to(torch.int64)
        into.rows.index_add_(0, where.slot, count)
        into.level.index_add_(0, where.slot, torch.where(some, top, 0.0))
        into.able.index_add_(0, where.slot, able * count)

    def _list(self, rows: Rows, rivals: Competitors, where: Where, some: Tensor) -> None:
        """Put competitors that are near enough into the table."""
        beta = None if rivals.beta is None else rivals.beta[:, 0]
        shown = where.number, rows.star, rows.top, rivals.place
        listing = self.place.listing
        a, s = rivals.a[:, 0], rivals.s[:, 0]
        listing.add(*entries(self.mine.slots, a, s, beta, listing.limit, shown, some))

    def show(
        self,
        where: Where,
        nearest: tuple[Tensor, Tensor, Tensor],
        scores: Float[Tensor, "row key"],
        qk: Tensor | None,
    ) -> None:
        """Keep the most fragile rows, to be shown; half-widths, attended keys and rivals."""
        keep = self.mine.keep_rows
        if not keep:
            return
        a, star, rival = nearest[0].to(torch.float32), *nearest[1:]
        chosen = most_fragile(a, where.order, keep)
        w = scores[chosen].to(wide(scores.device))
        visible = w > MASKED
        part = w[:, :0] if qk is None else torch.where(visible, qk[chosen].to(w), 0.0)
        w = torch.where(visible, w, -math.inf)
        ints = where.order, where.number, star, rival
        order, number, star, rival = (x[chosen] for x in ints)
        new = FragileRows(a[chosen], order, number, star, rival, w, part)
        old = self.place.fragile
        self.place.fragile = new if old is None else old.with_those(new, keep)


def _no_sums(rule: Rule, n: int, device: torch.device) -> LayerSums:
    ints = partial(torch.zeros, dtype=torch.int64, device=device)
    floats = partial(torch.zeros, dtype=wide(device), device=device)
    of_kinds = ints(2 * n), ints(2 * n), floats(2 * n)
    return LayerSums(ints(N_COUNTS, n), *of_kinds, floats(5, len(rule.sigmas), 2 * n))
