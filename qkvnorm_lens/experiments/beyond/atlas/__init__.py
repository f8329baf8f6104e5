"""Any models side by side: what their norms are, and what their attention does.

The norms are read from the model as it runs: one before q, k and v are made, ones that follow their
projections. Beside them sparse rows, sinks, collapse, spread, interference and score level, for the
whole model and by layer.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.atlas import figure, measure, words
from qkvnorm_lens.experiments.core import experiment

EXPERIMENT: Final = experiment(
    "atlas",
    "Models side by side: norms, sinks, collapse, interference",
    "beyond Menary et al. 2024",
    models="any",
    minutes=(0.2, 1.0, 6.0),
    modules=(measure, figure, words),
)
