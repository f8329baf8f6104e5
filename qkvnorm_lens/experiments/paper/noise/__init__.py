"""Accuracy under norm noise in all layers of one pass (Menary et al. 2024, Fig. 2).

Noise on q, k, v or all of them, of all rows; and, on q and k, of sparse or of non-sparse rows only.
A curve is of the vectors that enter the dot product (``at = "dot"``) unless it says
``"projection"``: there the noise meets the norm behind the projection, where a model has one.
"""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.paper.noise import figure, measure, words

EXPERIMENT: Final = experiment(
    "noise",
    "Accuracy under noise on the norms of q, k and v in all layers at once",
    "Menary et al. 2024, Fig. 2",
    models="any",
    minutes=(0.2, 1.0, 16.0),
    modules=(measure, figure, words),
)
