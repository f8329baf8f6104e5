"""From numbers to a verdict: laws of the one helper that decides what the pages say."""

from __future__ import annotations

import itertools
import math

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from qkvnorm_lens.experiments.core import (
    Mean,
    above,
    agrees,
    below,
    decide,
    denied,
    every,
    graded,
    placement_gaps,
    reaches,
    within,
)
from qkvnorm_lens.experiments.core.verdict import Finding

NUMBER = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))
FINDINGS = st.lists(st.sampled_from([True, False, None]), max_size=6)
LENGTH = NUMBER.map(abs)
MEANS = st.builds(
    lambda value, below, above: Mean(value, value - below, value + above, 3),
    NUMBER, LENGTH, LENGTH,
)  # fmt: skip
"""Of which an interval may reach further to one side than to the other."""
ONE_SEED = st.builds(Mean.around, NUMBER, st.just(math.nan), st.just(1))


def mirrored(found: Mean) -> Mean:
    return Mean(-found.value, -found.high, -found.low, found.n)


def resolved(findings: list[Finding]) -> list[list[bool]]:
    """Everything that the undecided findings could turn out to be."""
    return [
        list(each)
        for each in itertools.product(*([f] if f is not None else [True, False] for f in findings))
    ]


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_verdict_on_decided_cases_counts_them(cases: list[bool]) -> None:
    wanted = {len(cases): "yes", 0: "no"}.get(sum(cases), "in part")
    assert decide(*cases) == wanted


@given(FINDINGS.filter(bool))
def test_a_verdict_stands_whatever_the_undecided_turn_out_to_be(findings: list[Finding]) -> None:
    possible = {decide(*cases) for cases in resolved(findings)}
    assert decide(*findings) == (possible.pop() if len(possible) == 1 else "not decided")


def test_nothing_tried_decides_nothing() -> None:
    assert decide() == "not decided"
    assert every([]) is True


@given(FINDINGS)
def test_the_order_of_cases_does_not_matter(findings: list[Finding]) -> None:
    other = sorted(findings, key=str)
    assert decide(*findings) == decide(*other)
    assert every(findings) is every(other)


@given(FINDINGS)
def test_all_hold_if_every_way_to_decide_says_so(findings: list[Finding]) -> None:
    possible = {all(cases) for cases in resolved(findings)}
    assert every(findings) is (possible.pop() if len(possible) == 1 else None)


@given(st.sampled_from([True, False, None]), st.sampled_from([True, False, None]))
def test_without_its_core_nothing_of_a_statement_holds(core: Finding, whole: Finding) -> None:
    found = graded(core, whole)
    assert (found == "no") == (core is False)
    assert (found == "yes") == (core is True and whole is True)
    assert (found == "in part") == (core is True and whole is False)


@given(MEANS, NUMBER)
def test_above_and_below_exclude_each_other(found: Mean, bound: float) -> None:
    assert below(found, bound) is denied(above(found, bound))
    assert below(found, bound) is above(mirrored(found), -bound)
    if above(found, bound) is not None:
        assert above(found, bound) is (found.value > bound)
    assert (above(found) is not None) == found.excludes_zero


@given(MEANS, NUMBER, NUMBER)
def test_a_lower_bound_is_easier_to_lie_above(found: Mean, one: float, other: float) -> None:
    low, high = sorted((one, other))
    if above(found, high):
        assert above(found, low)
    if reaches(found, high):
        assert reaches(found, low)


@given(MEANS, NUMBER)
def test_the_side_towards_a_bound_decides(found: Mean, bound: float) -> None:
    """However far the interval reaches away from it."""
    far = Mean(found.value, found.low, math.inf, 3)
    near = Mean(found.value, -math.inf, found.high, 3)
    assert (above(found, bound) is True) == (above(far, bound) is True) == (bound < found.low)
    assert (below(found, bound) is True) == (below(near, bound) is True) == (found.high < bound)
    if found.value < bound:
        assert reaches(found, bound) is reaches(near, bound)
        assert within(found, bound, bound + 1) is within(near, bound, bound + 1)


@given(ONE_SEED, NUMBER)
def test_one_seed_decides_no_side(found: Mean, bound: float) -> None:
    assert above(found, bound) is None
    assert below(found, bound) is None
    assert within(found, bound, bound + 1) is not False
    assert agrees(found, bound) is None


@given(MEANS, NUMBER, st.floats(0, 100))
def test_a_mean_within_a_span_is_at_no_distance(found: Mean, low: float, width: float) -> None:
    high = low + width
    held = within(found, low, high)
    assert (held is True) == (low <= found.value <= high)
    if above(found, high) or below(found, low):
        assert held is False
    wider = Mean.around(found.value, math.inf, found.n)
    assert within(wider, low, high) is not False


@given(MEANS, NUMBER.filter(bool))
def test_a_difference_agrees_with_its_like(found: Mean, published: float) -> None:
    assert agrees(found, published) is agrees(mirrored(found), -published)
    if found.excludes_zero:
        assert agrees(found, found.value) is True
        assert agrees(found, -found.value) is False
    else:
        assert agrees(found, found.value or 1.0) is not True


def test_placements_are_compared_at_each_size_that_has_seeds() -> None:
    """A gap of means for each size; none where a placement has one model."""

    def rows(start: str, placement: str, values: list[float]) -> pd.DataFrame:
        return pd.DataFrame({"group": start + placement, "placement": placement, "x": values})

    parts = [
        rows("study-", "pre", [0.1, 0.2, 0.3]),
        rows("study-", "qkv", [0.4, 0.6, 0.8]),
        rows("addition-", "pre", [0.9, 0.7]),
        rows("addition-", "qkv", [0.5]),
    ]
    found = placement_gaps(pd.concat(parts), "x")
    assert [(name, gap.n) for name, gap in found] == [("study models", 3)]
    assert found[0][1].value == pytest.approx(-0.4)
    both = placement_gaps(pd.concat([*parts, rows("addition-", "qkv", [0.3])]), "x")
    assert [name for name, _ in both] == ["study models", "shipped size"]
    assert both[1][1].value == pytest.approx(0.4)
