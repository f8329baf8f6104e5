"""Accuracy in distribution and out of it (Menary et al. 2024, the table; several seeds here)."""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.paper.accuracy import figure, measure, words
from qkvnorm_lens.experiments.paper.accuracy.measure import KINDS, accuracies

__all__ = ["EXPERIMENT", "KINDS", "accuracies"]

EXPERIMENT: Final = experiment(
    "accuracy",
    "Accuracy in distribution, in interpolation and in extrapolation",
    "Menary et al. 2024, table of accuracies",
    models="addition",
    minutes=(0.1, 1.0, 4.0),
    modules=(measure, figure, words),
)
