"""Which heads a quantised key/value cache collapses: norm error, its prediction, and what happens.

The practical use of critical noise: a cache's error on the norms of keys against the arg max shifts
that the cache really makes. Beyond Menary et al. 2024.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.quantisation.figure import figure
from qkvnorm_lens.experiments.beyond.quantisation.measure import heads, models, parts
from qkvnorm_lens.experiments.beyond.quantisation.words import claims, text
from qkvnorm_lens.experiments.core import Experiment

__all__ = ["EXPERIMENT", "heads", "models"]

EXPERIMENT: Final = Experiment(
    name="quantisation",
    title="Heads that a quantised key/value cache collapses",
    source="beyond Menary et al. 2024",
    models="any",
    minutes={"smoke": 0.2, "quick": 0.8, "full": 5.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
