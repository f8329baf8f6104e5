"""What is measured: a table for each part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from qkvnorm_lens.experiments.core import Part, Size, Subject


@dataclass(frozen=True)
class Scale:
    """How much: points of a curve, random points and draws, and the most subspaces."""

    points: int
    scattered: int
    draws: int
    subspaces: int


SCALES: Final[dict[Size, Scale]] = {
    "smoke": Scale(5, 30, 500, 2),
    "quick": Scale(17, 80, 4_000, 4),
    "full": Scale(33, 120, 40_000, 4),
}


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each panel of the figure."""
    from qkvnorm_lens.experiments.paper.theorems import checks

    scale = SCALES[size]
    n, points = scale.points, {"points": scale.points}
    draws, most = scale.draws, scale.subspaces
    scattered = {**points, "scattered": scale.scattered}
    return [
        Part("turning", partial(checks.turning, n), settings=points),
        Part("growing", partial(checks.growing, n), settings=points),
        Part("matching", partial(checks.matching, n), settings=points),
        Part("offset", partial(checks.offset, n), settings=points),
        Part("freedom", partial(checks.freedom, most), settings={"subspaces": most}),
        Part("limits", partial(checks.limits, n), settings=points),
        Part("boundary", partial(checks.boundary, n, scale.scattered), settings=scattered),
        Part("probability", partial(checks.probability, draws), settings={"draws": draws}),
        Part("isotropic", partial(checks.isotropic, n), settings=points),
    ]
