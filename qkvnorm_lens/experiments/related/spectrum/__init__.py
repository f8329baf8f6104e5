"""The spectral gap of attention, what it does to rank and gradients, and the fix (Naderi et al.).

Constructed networks first: random Markov matrices and softmax of random keys and queries. Then the
models, trained and at their random start, with and without their mask.
"""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.related.spectrum.figure import figure
from qkvnorm_lens.experiments.related.spectrum.measure import parts
from qkvnorm_lens.experiments.related.spectrum.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="spectrum",
    title="The spectral gap of attention, rank in width and depth, gradients, and the fix",
    source="Naderi et al. 2024 (arXiv 2410.07799)",
    models="any",
    minutes={"smoke": 0.1, "quick": 0.4, "full": 2.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
    version=3,
)
