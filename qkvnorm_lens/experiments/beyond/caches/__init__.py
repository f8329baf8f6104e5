"""Which layers bear a quantised cache: cache risk beside the measures in use, and their recipes.

The reference is isolated forward KL, one layer's cache quantised at a time. Recipes of equal bits
are compared on held-out text. Beyond Menary et al. 2024.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.caches import figure, measure, words
from qkvnorm_lens.experiments.core import experiment

EXPERIMENT: Final = experiment(
    "caches",
    "Which layers bear a quantised key/value cache",
    "beyond Menary et al. 2024",
    models="any",
    minutes=(0.5, 2.0, 30.0),
    modules=(measure, figure, words),
)
