"""Training with the spectral gap and without it (Naderi et al. 2024): the same run twice.

Each seed of the small model is trained with A and with A - U, from the same weights on the same
sums; everything else is equal, which is checked. Pre-Norm, and No-Norm, where nothing else holds
the lengths of vectors.
"""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.related.centring.figure import figure
from qkvnorm_lens.experiments.related.centring.measure import parts
from qkvnorm_lens.experiments.related.centring.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="centring",
    title="Training with and without the spectral gap",
    source="Naderi et al. 2024 (arXiv 2410.07799)",
    models="none",
    minutes={"smoke": 0.1, "quick": 0.3, "full": 2.5},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
    version=2,
)
