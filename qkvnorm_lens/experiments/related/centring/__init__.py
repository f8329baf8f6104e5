"""Training with the spectral gap and without it (Naderi et al. 2024): the same run twice.

Each seed of the small model is trained with A and with A - U, from the same weights on the same
sums; everything else is equal, which is checked. Pre-Norm, and No-Norm, where nothing else holds
the lengths of vectors.
"""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.related.centring import figure, measure, words

EXPERIMENT: Final = experiment(
    "centring",
    "Training with and without the spectral gap",
    "Naderi et al. 2024 (arXiv 2410.07799)",
    models="none",
    minutes=(0.1, 0.3, 2.5),
    modules=(measure, figure, words),
    version=2,
)
