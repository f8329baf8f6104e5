"""Pictures of theorems 1-3 and 5-8, from constructed heads (Menary et al. 2024, Section 3)."""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.paper.theorems import figure as drawn, measure, words
from qkvnorm_lens.experiments.paper.theorems.figure import figure

__all__ = ["EXPERIMENT", "figure"]

EXPERIMENT: Final = experiment(
    "theorems",
    "What theorems 1-3 and 5-8 say, from constructed heads",
    "Menary et al. 2024, Section 3, theorems 1-3 and 5-8",
    models="none",
    minutes=(0.1, 0.1, 0.2),
    modules=(measure, drawn, words),
)
