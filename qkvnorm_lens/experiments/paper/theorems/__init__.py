"""Pictures of theorems 1-3 and 5-8, from constructed heads (Menary et al. 2024, Section 3)."""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.paper.theorems.figure import figure
from qkvnorm_lens.experiments.paper.theorems.measure import parts
from qkvnorm_lens.experiments.paper.theorems.words import claims, text

__all__ = ["EXPERIMENT", "figure"]

EXPERIMENT: Final = Experiment(
    name="theorems",
    title="What theorems 1-3 and 5-8 say, from constructed heads",
    source="Menary et al. 2024, Section 3, theorems 1-3 and 5-8",
    models="none",
    minutes={"smoke": 0.1, "quick": 0.1, "full": 0.2},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
