"""Why QKV-Norm has no sparse attention in the paper: the norm, or the scale of its scores?

The paper calibrates w to a standard deviation of 0.1 and decays every parameter, gains included.
With gains at one QKV-Norm's scores are then bounded by about 0.8, while a weight of 0.95 among
twenty tokens wants a gap near 5.9. Six cells, several seeds, one small model: the paper's setting
and ours, calibrated without decay on gains, and a learned inverse temperature.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.confound import figure, measure, words
from qkvnorm_lens.experiments.core import experiment

EXPERIMENT: Final = experiment(
    "confound",
    "QKV-Norm's missing sparsity: the norm, or the scale of its scores",
    "beyond Menary et al. 2024, who do not separate the two",
    models="none",
    minutes=(0.2, 1.5, 4.0),
    modules=(measure, figure, words),
    version=2,
)
