"""What the order of the earlier tokens does to a prediction, and where it comes from.

Zuo & Guerzhoy 2024 (arXiv 2402.05969): without positions and without a causal mask nothing in a
transformer knows the order; the mask breaks this symmetry. Measured on trained models, with
positions, mask and both taken out, and on random models without positions of 1, 2 and 4 layers,
with and without mask and skip connections.
"""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.related.symmetry import figure, measure, words

EXPERIMENT: Final = experiment(
    "symmetry",
    "What the order of the earlier tokens changes: positions, mask and depth",
    "Zuo & Guerzhoy 2024, arXiv 2402.05969; arXiv 2501.00073",
    models="any",
    minutes=(0.2, 0.5, 3.5),
    modules=(measure, figure, words),
    version=2,
)
