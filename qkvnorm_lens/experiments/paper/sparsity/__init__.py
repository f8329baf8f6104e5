"""How sparse attention is: histograms of row maxima (Menary et al. 2024, Fig. 25-27)."""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.paper.sparsity import figure, measure, words

EXPERIMENT: Final = experiment(
    "sparsity",
    "How sparse attention is: largest attention of each row",
    "Menary et al. 2024, Fig. 25-27",
    models="any",
    minutes=(0.1, 0.2, 1.0),
    modules=(measure, figure, words),
)
