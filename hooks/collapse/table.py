"""The rows that can collapse and their competitors, in a table of limited size.

A table lists every competitor nearer than its cutoff, of all rows, and none beyond. The cutoff is
the largest at which it holds no more than ``keep`` of them: a fact of the rows, whatever the order
in which they came, so that two tables join to the table of both.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from hooks.kernels import BEYOND

if TYPE_CHECKING:
    from hooks.kernels import Table

COMPLETE = 2 * BEYOND
"""Cutoff of a table that lists every competitor able to win."""

_PARTS = 2048  # each is a dozen arrays, however few rows it has
_ROW = ("layer", "head", "prompt", "query", "key", "rival")
_ENTRY = ("s", "beta", "a")


@dataclass(frozen=True, eq=False)
class RowTable:
    """The sparse rows that can collapse within the cutoff, with their competitors there.

    ``s_star`` is the q.k part of the attended token's score. The competitors of row i, nearest
    first, are the entries ``start[i]`` to ``start[i + 1]`` of ``s`` (their q.k parts), of ``beta``
    = b_* - b_t (empty where no layer adds a bias) and of ``a`` (the half-width from which each can
    win; 2 where only factors above 2 would do); ``rival`` is the first one's position. Below the
    half-width ``cutoff`` the table is complete; beyond, it is empty.
    """

    layer: Int[np.ndarray, "row"]
    head: Int[np.ndarray, "row"]
    prompt: Int[np.ndarray, "row"]
    query: Int[np.ndarray, "row"]
    key: Int[np.ndarray, "row"]
    rival: Int[np.ndarray, "row"]
    s_star: Float[np.ndarray, "row"]
    start: Int[np.ndarray, "edge"]
    s: Float[np.ndarray, "entry"]
    beta: Float[np.ndarray, "entry_or_none"]
    a: Float[np.ndarray, "entry"]
    cutoff: Float[np.ndarray, ""]

    @property
    def half_width(self) -> Float[np.ndarray, "row"]:
        """Each row's critical half-width, that of its nearest competitor; inf above 1."""
        nearest = self.a[self.start[:-1]]
        return np.where(nearest < 1, nearest, np.float32(np.inf))

    def __len__(self) -> int:
        return len(self.layer)


def cut(table: RowTable, keep: int) -> RowTable:
    """This table with at most ``keep`` competitors, those nearest to winning."""
    return together([table], min(float(table.cutoff), _cutoff([table], keep)))


def join(first: RowTable, later: RowTable, keep: int) -> RowTable:
    """The rows of both, in the order of the model and the prompts."""
    tables = [first, later]
    cutoff = min(float(t.cutoff) for t in tables)
    return ordered(cut(together(tables, cutoff), keep))


def together(tables: Sequence[RowTable], cutoff: float) -> RowTable:
    """Several tables as one, with the competitors nearer than ``cutoff``."""
    kept = [_below(table, cutoff) for table in tables]
    sizes = np.cumsum([0, *(table.start[-1] for table in kept)])
    starts = [table.start[:-1] + size for table, size in zip(kept, sizes, strict=False)]
    both: dict[str, Any] = {
        f.name: np.concatenate([getattr(table, f.name) for table in kept])
        for f in fields(RowTable)
        if f.name not in ("start", "cutoff")
    }
    start = np.concatenate([*starts, sizes[-1:]])
    return RowTable(**both, start=start, cutoff=np.asarray(cutoff, np.float32))


def _cutoff(tables: Sequence[RowTable], keep: int) -> float:
    """The largest cutoff at which these tables hold at most ``keep`` competitors."""
    if sum(len(table.a) for table in tables) <= keep:
        return COMPLETE
    return float(np.partition(np.concatenate([table.a for table in tables]), keep)[keep])


def _below(table: RowTable, cutoff: float) -> RowTable:
    """Competitors nearer than ``cutoff``, and the rows that still have one."""
    if not len(table) or float(table.cutoff) <= cutoff:
        return table
    near = table.a < np.float32(cutoff)
    count = np.add.reduceat(near.astype(np.int64), table.start[:-1])
    rows = count > 0
    entries: dict[str, Any] = {n: x[near] if len(x) else x for n, x in _of(table, _ENTRY).items()}
    return RowTable(
        **{n: x[rows] for n, x in _of(table, (*_ROW, "s_star")).items()},
        start=np.concatenate([[0], np.cumsum(count[rows])]),
        **entries,
        cutoff=np.asarray(cutoff, dtype=np.float32),
    )


def _of(table: RowTable, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(table, name) for name in names}


def ordered(table: RowTable) -> RowTable:
    """The table's rows sorted by layer, head, prompt and query."""
    order = np.lexsort([getattr(table, n) for n in ("query", "prompt", "head", "layer")])
    count = np.diff(table.start)[order]
    start = np.concatenate([[0], np.cumsum(count)])
    entry = np.repeat(table.start[:-1][order] - start[:-1], count) + np.arange(start[-1])
    entries = {n: x[entry] if len(x) else x for n, x in _of(table, _ENTRY).items()}
    rows = {n: x[order] for n, x in _of(table, (*_ROW, "s_star")).items()}
    return replace(table, **rows, **entries, start=start)


class TableParts:
    """A table that grows from many sides; what no longer fits is dropped, farthest first."""

    def __init__(self, keep: int, *, biased: bool, cutoff: float = COMPLETE) -> None:
        self.keep = keep
        self.biased = biased
        self.cutoff = cutoff
        self._parts: list[RowTable] = []
        self._lock = threading.Lock()

    def take(
        self, piece: Table, cutoff: float, layer: int, n_heads: int, prompts: np.ndarray
    ) -> None:
        """Copy a piece that was filled up to ``cutoff``; callable from several threads."""
        n_rows, n_entries = (int(n) for n in piece.used)
        if n_rows == 0:
            return
        matrix, query, key, rival, count = piece.row[:n_rows].T
        columns = {
            "layer": np.full(n_rows, layer),
            "head": matrix % n_heads,
            "prompt": prompts[matrix // n_heads],
            "query": query,
            "key": key,
            "rival": rival,
        }
        self.add(
            RowTable(
                **{name: values.astype(np.int32) for name, values in columns.items()},
                s_star=piece.s_star[:n_rows].copy(),
                start=np.concatenate([[0], np.cumsum(count)]),
                s=piece.s[:n_entries].copy(),
                beta=piece.beta[:n_entries].copy(),
                a=piece.a[:n_entries].copy(),
                cutoff=np.asarray(cutoff, np.float32),
            )
        )

    def add(self, part: RowTable) -> None:
        """Take over a table that is complete below its cutoff; callable from several threads."""
        with self._lock:
            self._parts.append(part)
            self.cutoff = min(self.cutoff, float(part.cutoff))
            if len(self._parts) > _PARTS or sum(len(p.a) for p in self._parts) > 2 * self.keep:
                self._parts = [self.unordered()]
                self.cutoff = float(self._parts[0].cutoff)

    def absorb(self, other: TableParts, before: int) -> None:
        """Take over the rows of another one, of prompts that ``before`` others precede.

        As one table: many small arrays that stay keep the memory between them from its next use.
        """
        part = together(other._parts, other.cutoff) if other._parts else None
        if part is not None and len(part):
            self.add(replace(part, prompt=part.prompt + np.int32(before)))

    def unordered(self) -> RowTable:
        """One table of all parts, cut to its size."""
        if not self._parts:
            nothing: dict[str, Any] = {n: np.zeros(0, np.int32) for n in _ROW}
            nothing |= {n: np.zeros(0, np.float32) for n in ("s_star", *_ENTRY)}
            return RowTable(
                **nothing, start=np.zeros(1, np.int64), cutoff=np.asarray(COMPLETE, np.float32)
            )
        cutoff = min(self.cutoff, _cutoff(self._parts, self.keep))
        return together(self._parts, cutoff)

    def table(self) -> RowTable:
        """The finished table."""
        return ordered(self.unordered())
