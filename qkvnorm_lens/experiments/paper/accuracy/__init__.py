"""Accuracy in distribution and out of it (Menary et al. 2024, the table; several seeds here)."""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.paper.accuracy.figure import figure
from qkvnorm_lens.experiments.paper.accuracy.measure import KINDS, accuracies, parts
from qkvnorm_lens.experiments.paper.accuracy.words import claims, text

__all__ = ["EXPERIMENT", "KINDS", "accuracies"]

EXPERIMENT: Final = Experiment(
    name="accuracy",
    title="Accuracy in distribution, in interpolation and in extrapolation",
    source="Menary et al. 2024, table of accuracies",
    models="addition",
    minutes={"smoke": 0.1, "quick": 1.0, "full": 4.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
