"""What makes a token long, and what hangs on it: outlier dimensions and the common length.

The experiment `interference` freezes all of a norm's scale. Here only what a few outlier dimensions
add to it is frozen, or only what all others add; and it is seen which tokens win the rows then.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.lengths import figure, measure, words
from qkvnorm_lens.experiments.core import experiment

EXPERIMENT: Final = experiment(
    "lengths",
    "Which dimensions make a token long, and what attention owes to them",
    "not in a paper; outlier dimensions: Kovaleva et al. 2021 (arXiv 2105.06990), massive "
    "activations: Sun et al. 2024 (arXiv 2402.17762)",
    models="any",
    minutes=(0.5, 1.5, 7.0),
    modules=(measure, figure, words),
)
