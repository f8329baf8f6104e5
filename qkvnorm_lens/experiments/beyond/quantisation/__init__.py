"""Which heads a quantised key/value cache collapses: norm error, its prediction, and what happens.

The practical use of critical noise: a cache's error on the norms of keys against the arg max shifts
that the cache really makes. Beyond Menary et al. 2024.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.quantisation import figure, measure, words
from qkvnorm_lens.experiments.beyond.quantisation.measure import cache_effects, heads, models
from qkvnorm_lens.experiments.core import experiment

__all__ = ["EXPERIMENT", "cache_effects", "heads", "models"]

EXPERIMENT: Final = experiment(
    "quantisation",
    "Heads that a quantised key/value cache collapses",
    "beyond Menary et al. 2024",
    models="any",
    minutes=(0.2, 0.8, 5.0),
    modules=(measure, figure, words),
)
