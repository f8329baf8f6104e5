"""Spread of the lengths of attended embeddings (Menary et al. 2024, Fig. 1 and 9-12)."""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.paper.spread.figure import figure
from qkvnorm_lens.experiments.paper.spread.measure import parts
from qkvnorm_lens.experiments.paper.spread.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="spread",
    title="Spread of the lengths of attended embeddings",
    source="Menary et al. 2024, Fig. 1 and 9-12",
    models="any",
    minutes={"smoke": 0.1, "quick": 0.3, "full": 1.5},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
