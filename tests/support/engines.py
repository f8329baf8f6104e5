"""Layers of hand-made scores, and models, reduced by one engine and by another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooks import NormNoise, attention_sites
from hooks.collapse.device import Engines
from hooks.collapse.probe import DEFAULT_SIGMAS
from hooks.collapse.reduce import Workers
from hooks.collapse.settings import ProbeSettings
from hooks.collapse.table import RowTable
from hooks.collapse.tally import Tally
from hooks.kernels.engines import slots
from hooks.sites import LayerSites, SeenLayer
from tests.support import models

COUNTS = ("examined", "single_key", "ties")
STRICT = ("strict", "strict_low", "strict_high")


@cache
def _sites() -> LayerSites:
    return next(iter(attention_sites(models.tiny_gpt2())))


@dataclass(frozen=True)
class HandMade:
    """A layer of four heads: scores ``[batch, 4, query, key]``, and what is known of them."""

    scores: Tensor
    pattern: Tensor | None = None
    qk: Tensor | None = None
    soft_cap: float = 0.0
    sink: tuple[float, ...] = ()

    def reduced(
        self, engine: str, *, fixed: bool | None = None, blocks: int = 1, **settings: Any
    ) -> Tally:
        """The tally after one pass with this layer alone, its queries in so many blocks."""
        given = {
            "sigmas": DEFAULT_SIGMAS,
            "on": "qk",
            "law": "uniform",
            "method": "exact",
            "shared": "none",
            "sparse": 0.95,
            "layers": (0,),
            "draws": 0,
            "seed": 0,
            "keep": 1 << 16,
            "keep_rows": 4,
            "strict": "computed",
        }
        how = ProbeSettings(**(given | settings))
        biased = self.qk is not None
        sites = replace(_sites(), soft_cap=self.soft_cap, sink=self.sink, has_bias=biased)
        batch, _, n_query, n_key = self.scores.shape
        tally = Tally(how, (sites,), batch)
        noise = NormNoise(sigma=how.sigmas[0], on=how.on, law=how.law)
        edges = [n_query * i // blocks for i in range(blocks + 1)]

        def reduce(seen: SeenLayer, reducer: Any) -> None:
            for first, end in pairwise(edges):
                rows = slice(first, end)
                parts = [
                    None if x is None else x[:, :, rows]
                    for x in (self.scores, self.pattern, self.qk)
                ]
                reducer.add(*parts, first_query=first, n_query=n_query, n_key=n_key)

        with Workers().open() as workers:
            engines = Engines(tally, noise, engine, workers, fixed)
            seen = SeenLayer(0, sites, None, {})
            engines.each_layer(range(batch), lambda show: show(seen), reduce)
        return tally


def assert_same(
    mine: Any,
    theirs: Any,
    *,
    loose: float = 1e-6,
    strict: float | None = 1e-6,
    level: float = 1e-9,
) -> None:
    """Two tallies, or reports: counts and tables equal, rates as near as this in each row.

    ``strict``: None: not compared. ``level``: of sums of scores, which may be made anew in float32.
    """
    a, b = _numbers(mine), _numbers(theirs)
    for name in (*COUNTS, "rows", "able"):
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    np.testing.assert_allclose(a["level"], b["level"], rtol=level, atol=level)
    rows = np.maximum(1, a["rows"])
    per_head = np.maximum(1, a["rows"].sum(-2))
    for name in ("loose", "centred", *(STRICT if strict else ())):
        of = rows if a[name].ndim == 5 else per_head
        apart = np.abs(a[name] - b[name]) / of
        assert apart.max(initial=0) <= ((strict or 0) if name in STRICT else loose), name
    assert_same_tables(a["table"], b["table"])


def _numbers(found: Any) -> dict[str, Any]:
    if isinstance(found, Tally):
        return {
            **found.counts,
            **found.sums,
            **found.bounds,
            "rows": found.rows,
            "able": found.able,
            "level": found.level,
            "table": found.parts.table(),
        }
    names = (*COUNTS, "rows", "able", "level", "loose", "centred", *STRICT, "table")
    return {name: getattr(found, name) for name in names}


def assert_same_tables(a: RowTable, b: RowTable) -> None:
    """Rows and numbers of their competitors; equally near ones in any order."""
    for field in fields(RowTable):
        mine, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("s", "beta"):  # sorted within ties of half-width
            mine, theirs = (_by_row(t, getattr(t, field.name)) for t in (a, b))
        if field.name == "rival":
            continue  # of equally near ones any
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6, err_msg=field.name)


def _by_row(table: RowTable, values: np.ndarray) -> np.ndarray:
    if not len(values):
        return values
    row = np.repeat(np.arange(len(table)), np.diff(table.start))
    return values[np.lexsort([values, row])]


@contextmanager
def few_places(share: float) -> Iterator[None]:
    """Sizes fixed beforehand, too small at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "_FIRST", share)
        before = Engines.__init__

        def fixed(self: Engines, *args: Any) -> None:
            before(self, *args[:4], True)

        patch.setattr(Engines, "__init__", fixed)
        yield


_ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")


class NothingIsAsked(TorchDispatchMode):
    """Refuses what would wait for a device: sizes and numbers read from tensors, copies."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        asks = name in _ASKING or (name == "repeat_interleave" and isinstance(args[0], Tensor))
        if name in ("index", "index_put_"):
            asks |= any(x is not None and x.dtype == torch.bool for x in args[1])
        assert not asks, f"{name} reads from a device"
        return func(*args, **(kwargs or {}))
