"""How sparse attention is: histograms of row maxima (Menary et al. 2024, Fig. 25-27)."""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.paper.sparsity.figure import figure
from qkvnorm_lens.experiments.paper.sparsity.measure import parts
from qkvnorm_lens.experiments.paper.sparsity.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="sparsity",
    title="How sparse attention is: largest attention of each row",
    source="Menary et al. 2024, Fig. 25-27",
    models="any",
    minutes={"smoke": 0.1, "quick": 0.2, "full": 1.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
