"""What the order of the earlier tokens does to a prediction, and where it comes from.

Zuo & Guerzhoy 2024 (arXiv 2402.05969): without positions and without a causal mask nothing in a
transformer knows the order; the mask breaks this symmetry. Measured on trained models, with
positions, mask and both taken out, and on random models without positions of 1, 2 and 4 layers,
with and without mask and skip connections.
"""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.related.symmetry.figure import figure
from qkvnorm_lens.experiments.related.symmetry.measure import parts
from qkvnorm_lens.experiments.related.symmetry.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="symmetry",
    title="What the order of the earlier tokens changes: positions, mask and depth",
    source="Zuo & Guerzhoy 2024, arXiv 2402.05969; arXiv 2501.00073",
    models="any",
    minutes={"smoke": 0.2, "quick": 0.5, "full": 3.5},
    version=2,
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
