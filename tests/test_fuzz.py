"""Inputs x modes x calls, as people combine them, against the model's own numbers.

`tests/fuzz/` says what is combined (`cases.py`) and what is right (`oracle.py`, in plain Hugging
Face). ``python -m tests.fuzz --n 500 --seed 7`` tries others and reduces what fails.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, assume, given, seed, settings

from tests.fuzz import cases, judge
from tests.fuzz.cases import Case
from tests.watching import shape_checks_off

CHUNKS, EACH = 20, 100


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    """Shape checks take most of a small call's time."""
    with shape_checks_off():
        yield


def right_or_refused(case: Case) -> None:
    assume(not judge.known(case))
    judge.judge(case)


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@settings(max_examples=60, derandomize=True, database=None, suppress_health_check=QUIET)
@given(cases.cases(few=True))
def test_a_few_combinations(case: Case) -> None:
    right_or_refused(case)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_many_combinations(chunk: int) -> None:
    @seed(chunk)
    @settings(
        max_examples=EACH,
        derandomize=False,
        database=None,
        print_blob=False,
        suppress_health_check=QUIET,
    )
    @given(cases.cases())
    def many(case: Case) -> None:
        right_or_refused(case)

    many()
