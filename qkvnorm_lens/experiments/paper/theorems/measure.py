"""What is measured: a table for each part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments.core import Part, Size, Subject, by_size


@dataclass(frozen=True)
class Scale:
    """How much: points of a curve, random points and draws, and the most subspaces."""

    points: int
    scattered: int
    draws: int
    subspaces: int


SCALES: Final = by_size(Scale(5, 30, 500, 2), Scale(17, 80, 4_000, 4), Scale(33, 120, 40_000, 4))


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each panel of the figure."""
    from qkvnorm_lens.experiments.paper.theorems import checks

    scale = SCALES[size]
    points = {"points": scale.points}
    wanted: dict[Callable[..., pd.DataFrame], dict[str, int]] = {
        checks.turning: points,
        checks.growing: points,
        checks.matching: points,
        checks.offset: points,
        checks.freedom: {"subspaces": scale.subspaces},
        checks.limits: points,
        checks.boundary: {**points, "scattered": scale.scattered},
        checks.probability: {"draws": scale.draws},
        checks.isotropic: points,
    }
    return [Part(f.__name__, partial(f, *n.values()), settings=n) for f, n in wanted.items()]
