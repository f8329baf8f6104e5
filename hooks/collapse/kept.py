"""The rows that a collapse report keeps for showing: a few, with their attention on both sides.

Which rows: the first ones of :meth:`hooks.CollapseReport.fragile`, so that a merged report keeps
what one run over both corpora would have kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hooks.arguments import check_index

_ROW = ("layer", "head", "prompt", "query", "key", "rival")


@dataclass(frozen=True, eq=False)
class KeptRows:
    """The most fragile rows, most fragile first, with their attention before and after noise.

    ``layer`` (an index into the report's layers), ``head``, ``prompt``, ``query``, ``key``,
    ``rival`` and ``half_width`` are those of :class:`hooks.RowTable`. Row i's attention is
    ``clean[start[i] : start[i + 1]]`` over the keys up to its last visible one, and ``noisy`` is
        this attention under :class:`hooks.NormNoise` with the report's settings, ``sigma[i]`` and
        ``draw[i]``.

    The noise is that of the seed's draws 0 to 15 under which the row's arg max moves at the least
    sigma (of two equal ones the earlier), at 1.1 times that sigma; or at 1.01 or 1.001 times where
    1.1 would be beyond the law or the arg max has moved back by then. Where none of them moves the
    row, ``sigma`` and ``noisy`` are NaN and ``draw`` is -1.
    """

    layer: Int[np.ndarray, "row"]
    head: Int[np.ndarray, "row"]
    prompt: Int[np.ndarray, "row"]
    query: Int[np.ndarray, "row"]
    key: Int[np.ndarray, "row"]
    rival: Int[np.ndarray, "row"]
    half_width: Float[np.ndarray, "row"]
    sigma: Float[np.ndarray, "row"]
    draw: Int[np.ndarray, "row"]
    start: Int[np.ndarray, "edge"]
    clean: Float[np.ndarray, "entry"]
    noisy: Float[np.ndarray, "entry"]

    def __len__(self) -> int:
        return len(self.layer)

    def weights(self, row: int) -> tuple[Float[np.ndarray, "key"], Float[np.ndarray, "key"]]:
        """Attention of one row before and after noise.

        Raises:
            IndexError (a ValueError, too): no such row.
            TypeError: not an index.
        """
        row = check_index("row", row, len(self), "kept rows")
        where = slice(int(self.start[row]), int(self.start[row + 1]))
        return self.clean[where], self.noisy[where]

    @property
    def lands(self) -> Int[np.ndarray, "row"]:
        """Position of each row's arg max under the noise; -1 where no noise is shown."""
        at = [int(np.argmax(self.weights(i)[1])) for i in range(len(self))]
        return np.where(self.draw >= 0, np.asarray(at, np.int32), np.int32(-1)).astype(np.int32)


def no_rows() -> KeptRows:
    """Kept rows of a report that was asked for none, or was written before rows were kept."""
    return from_parts([])


def from_parts(parts: Sequence[dict[str, Any]]) -> KeptRows:
    """Kept rows from a dict per row, with numbers and the arrays ``clean`` and ``noisy``."""
    whole: dict[str, Any] = {n: np.array([p[n] for p in parts], np.int32) for n in (*_ROW, "draw")}
    whole["half_width"] = np.array([p["half_width"] for p in parts], np.float32)
    whole["sigma"] = np.array([p["sigma"] for p in parts], np.float64)
    for name in ("clean", "noisy"):
        rows = [np.asarray(p[name], np.float32) for p in parts]
        whole[name] = np.concatenate(rows) if rows else np.zeros(0, np.float32)
    lengths = [len(p["clean"]) for p in parts]
    return KeptRows(**whole, start=np.cumsum([0, *lengths]).astype(np.int64))


def join_kept(
    first: KeptRows, later: KeptRows, *, prompts: int, keep: int, cutoff: float
) -> KeptRows:
    """The ``keep`` most fragile rows of both below ``cutoff``; ``prompts`` precede the later's."""
    moved = replace(later, prompt=later.prompt + np.int32(prompts))
    parts = [_part(kept, i) for kept in (first, moved) for i in range(len(kept))]
    parts = [part for part in parts if part["half_width"] < np.float32(cutoff)]
    return from_parts(sorted(parts, key=_order)[:keep])


def _part(kept: KeptRows, row: int) -> dict[str, Any]:
    names = [f.name for f in fields(KeptRows) if f.name not in ("start", "clean", "noisy")]
    clean, noisy = kept.weights(row)
    return {name: getattr(kept, name)[row] for name in names} | {"clean": clean, "noisy": noisy}


def _order(part: dict[str, Any]) -> tuple[float, ...]:
    """The order of ``fragile``: the table's own where two rows are equally fragile."""
    names = ("half_width", "layer", "head", "prompt", "query")
    return tuple(float(part[name]) for name in names)
