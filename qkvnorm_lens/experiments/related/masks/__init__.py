"""Rank collapse of attention alone: masks, temperature, norm; equilibria (Wu et al. 2024).

Random tokens of length 1 run through layers of attention with fresh random queries and keys, in
float64; everything is drawn from fixed seeds.
"""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.related.masks import figure, measure, words

EXPERIMENT: Final = experiment(
    "masks",
    "Rank collapse of attention alone, by mask, temperature and norm",
    "Wu et al. 2024",
    models="none",
    minutes=(0.1, 0.3, 1.3),
    modules=(measure, figure, words),
)
