"""The spectral gap of attention, what it does to rank and gradients, and the fix (Naderi et al.).

Constructed networks first: random Markov matrices and softmax of random keys and queries. Then the
models, trained and at their random start, with and without their mask.
"""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.related.spectrum import figure, measure, words

EXPERIMENT: Final = experiment(
    "spectrum",
    "The spectral gap of attention, rank in width and depth, gradients, and the fix",
    "Naderi et al. 2024 (arXiv 2410.07799)",
    models="any",
    minutes=(0.1, 0.4, 2.0),
    modules=(measure, figure, words),
    version=3,
)
