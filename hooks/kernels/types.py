"""What the compiled loops take and fill."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.int64]]

MASKED = -3e4
"""The least score of a visible key.

Masks in use: -inf, -1e9 and the least number of a dtype, float16's -65504 the last.
"""
BEYOND = 2.0
"""Stands for the half-width of competitors that only factors above 2 bring to win."""


class Rule(NamedTuple):
    """What to compute for every row, and properties of its layer."""

    law: int
    sigmas: Array
    on_q: bool
    on_k: bool
    exact: bool  # probabilities, or draws of the loose rate too
    sparse: float
    room: float  # the same as a share of the maximum that all others may have together
    cutoff: float  # half-width up to which the table lists competitors
    n_heads: int
    first_matrix: int  # index of these rows' first matrix and query in the whole layer
    first_query: int
    eps: float
    soft_cap: float
    sink: Array  # per head; -inf without one
    kv_head: Ints
    first: Floats  # [batch, key]: where a document begins
    biased: bool  # whether the layer adds a bias


class Layer(NamedTuple):
    """One layer's rows ``[batch * head, query, key]``; empty where there is none."""

    scores: Floats
    pattern: Floats
    qk: Floats  # the q.k part, where a bias is added


class Draws(NamedTuple):
    """Numbers from which factors are made, ``[draw, batch, head, pos]``."""

    q: Array
    k: Array


class Sums(NamedTuple):
    """Sums over rows; the last axis separates content from sinks."""

    counts: Ints  # [count, matrix]
    rows: Ints  # [matrix, kind]
    level: Array  # [matrix, kind]
    loose: Array  # [sigma, matrix, kind]
    centred: Array
    strict: Array
    strict_low: Array
    strict_high: Array
    loose_draws: Array  # [sigma, draw, matrix, kind]
    centred_draws: Array
    strict_draws: Array


class Pending(NamedTuple):
    """Rows whose strict rate is still to be computed, with their loose rates; no room: none is."""

    row: Ints  # [row, (matrix, query, key, kind)]
    rates: Array  # [row, sigma]
    used: Ints


class Table(NamedTuple):
    """Room for the rows that can collapse, and their competitors; ``used`` counts both."""

    row: Ints  # [row, (matrix, query, key, rival, competitors)]
    s_star: Floats
    s: Floats
    beta: Floats
    a: Floats
    used: Ints


class Found(NamedTuple):
    """All that rows are added to."""

    sums: Sums
    table: Table
    pending: Pending


class Scratch(NamedTuple):
    """Working memory of one row."""

    visible: Ints
    s: Array  # visible keys
    bias: Array
    key: Array  # what competitors are sorted by
    near: Array  # their q.k parts, nearest first
    beta: Array
    a: Array
    place: Ints  # their positions
    spare: Array
    at: Ints
    work: Array
    grid: Array
    nodes: Array
    ends: Array  # [2, sigma]
    crowd: Array  # of the strict rate
    rates: Array  # one row's, at each sigma


class Drawn(NamedTuple):
    """The numbers behind one draw of one row's factors, at one sigma."""

    sigma: float
    f_q: float  # the query's factor
    own: float  # of the attended key
    base: Array  # of every key


class Place(NamedTuple):
    """A row of the layer's scores."""

    matrix: int
    query: int
    star: int  # the key it attends to
    kind: int  # 1 for a row that attends to a first token, else 0


class Setting(NamedTuple):
    """What holds for all tokens of a row at one sigma, for its strict rate."""

    law: int
    sigma: float
    soft_cap: float
    needed: float  # by how much a token must lie above the others' sum
    sink: float
    plain: bool  # no biases and no sink: all levels scale with the query's factor
    curvature: float  # the largest slope of the factor's density


S, BIAS = 0, 1  # rows of ``Scratch.crowd``: q.k parts before the query's factor, and what is added
