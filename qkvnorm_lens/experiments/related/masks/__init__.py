"""Rank collapse of attention alone: masks, temperature, norm; equilibria (Wu et al. 2024).

Random tokens of length 1 run through layers of attention with fresh random queries and keys, in
float64; everything is drawn from fixed seeds.
"""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.related.masks.figure import figure
from qkvnorm_lens.experiments.related.masks.measure import parts
from qkvnorm_lens.experiments.related.masks.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="masks",
    title="Rank collapse of attention alone, by mask, temperature and norm",
    source="Wu et al. 2024",
    models="none",
    minutes={"smoke": 0.1, "quick": 0.3, "full": 1.3},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
