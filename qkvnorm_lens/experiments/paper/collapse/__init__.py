"""Circuit collapse against the noise's size (Menary et al. 2024, Fig. 3 and 13).

Noise in each layer on its own, on clean inputs. The loose rate is computed and, to check that,
sampled; the strict rate is sampled.
"""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.paper.collapse import figure, measure, words

EXPERIMENT: Final = experiment(
    "collapse",
    "Circuit collapse of sparse attention under norm noise",
    "Menary et al. 2024, Fig. 3 and 13",
    models="any",
    minutes=(0.3, 2.0, 8.0),
    modules=(measure, figure, words),
    version=2,
)
