"""Whether a published statement holds here: decided from numbers, before any of it is put in words.

A *finding* is True, False, or None where our numbers allow both. A `Verdict` is what several
findings make of one statement.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from qkvnorm_lens.experiments.core.stats import Mean

Verdict = Literal["yes", "no", "in part", "not decided"]
Finding = bool | None


def above(found: Mean, bound: float = 0.0) -> Finding:
    """Whether the whole interval lies above a bound; None where it holds it, or for one seed."""
    if found.low > bound:
        return True
    return False if found.high < bound else None


def below(found: Mean, bound: float = 0.0) -> Finding:
    """Whether the whole interval lies below a bound; None where it holds it, or for one seed."""
    return denied(above(found, bound))


def reaches(found: Mean, bound: float) -> Finding:
    """Whether the mean is at least a bound, one seed's too; None where only its interval is."""
    if found.value >= bound:
        return True
    return None if found.high >= bound else False


def within(found: Mean, low: float, high: float) -> Finding:
    """Whether the mean lies in a span; None where only its interval does, or for one seed."""
    if low <= found.value <= high:
        return True
    return False if found.high < low or found.low > high else None


def agrees(found: Mean, published: float) -> Finding:
    """Whether a difference has the published one's sign.

    Where our interval holds zero: False if it excludes the published number, else None.
    """
    positive = above(found)
    if positive is not None:
        return positive == (published > 0)
    return False if published < found.low or published > found.high else None


def denied(finding: Finding) -> Finding:
    """The opposite finding; None stays None."""
    return None if finding is None else not finding


def every(findings: Iterable[Finding]) -> Finding:
    """Whether all hold: False if one doesn't, else None if one is undecided, else True."""
    held = list(findings)
    if False in held:
        return False
    return None if None in held else True


def decide(*findings: Finding) -> Verdict:
    """The verdict on a statement that was tried in several cases.

    ``"yes"`` if it holds in all, ``"no"`` in none, ``"in part"`` in some. Undecided cases leave a
    verdict standing only if it is the same whatever they turn out to be; else, and without a case,
    ``"not decided"``.
    """
    if True in findings and False in findings:
        return "in part"
    if not findings or None in findings:
        return "not decided"
    return "yes" if findings[0] else "no"


def graded(core: Finding, whole: Finding) -> Verdict:
    """The verdict on a statement that can hold in its core without holding as a whole.

    ``"no"`` without its core; ``"in part"`` with the core alone; ``"not decided"`` where one of
    the two that counts is undecided.
    """
    return decide(core, whole) if core else decide(core)
