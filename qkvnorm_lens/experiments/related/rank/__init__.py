"""Rank of the tokens by depth, trained and at random start (Wu et al. 2024)."""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.related.rank import figure, measure, words

EXPERIMENT: Final = experiment(
    "rank",
    "Rank of the tokens by depth, trained and at random start",
    "Wu et al. 2024",
    models="any",
    minutes=(0.1, 0.5, 2.5),
    modules=(measure, figure, words),
)
