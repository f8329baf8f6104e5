"""Compiled loops over a layer's rows of scores."""

from hooks.kernels.compile import compiled
from hooks.kernels.integrals import GRID, LAW_CODES
from hooks.kernels.loop import scan, scratch
from hooks.kernels.row import (
    ABLE,
    BROKEN,
    EXAMINED,
    N_COUNTS,
    SINGLE,
    TIES,
    collect_plain,
    count_above,
    exact_plain,
    first_of_largest,
    holds_sparse,
    largest,
    last_seen,
    lowest_able,
    sort_descending,
    table_rates,
    visible_sum,
)
from hooks.kernels.types import BEYOND, MASKED, Draws, Ints, Layer, Rule, Sums, Table

__all__ = [
    "ABLE",
    "BEYOND",
    "BROKEN",
    "Draws",
    "EXAMINED",
    "GRID",
    "Ints",
    "LAW_CODES",
    "Layer",
    "MASKED",
    "N_COUNTS",
    "Rule",
    "SINGLE",
    "Sums",
    "TIES",
    "Table",
    "collect_plain",
    "compiled",
    "count_above",
    "exact_plain",
    "first_of_largest",
    "holds_sparse",
    "largest",
    "last_seen",
    "lowest_able",
    "scan",
    "scratch",
    "sort_descending",
    "table_rates",
    "visible_sum",
]
