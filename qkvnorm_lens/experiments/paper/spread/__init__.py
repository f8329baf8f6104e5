"""Spread of the lengths of attended embeddings (Menary et al. 2024, Fig. 1 and 9-12)."""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.paper.spread import figure, measure, words

EXPERIMENT: Final = experiment(
    "spread",
    "Spread of the lengths of attended embeddings",
    "Menary et al. 2024, Fig. 1 and 9-12",
    models="any",
    minutes=(0.1, 0.3, 1.5),
    modules=(measure, figure, words),
)
