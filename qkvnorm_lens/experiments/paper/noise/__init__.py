"""Accuracy under norm noise in all layers of one pass (Menary et al. 2024, Fig. 2).

Noise on q, k, v or all of them, of all rows; and, on q and k, of sparse or of non-sparse rows only.
A curve is of the vectors that enter the dot product (``at = "dot"``) unless it says
``"projection"``: there the noise meets the norm behind the projection, where a model has one.
"""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.paper.noise.figure import figure
from qkvnorm_lens.experiments.paper.noise.measure import parts
from qkvnorm_lens.experiments.paper.noise.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="noise",
    title="Accuracy under noise on the norms of q, k and v in all layers at once",
    source="Menary et al. 2024, Fig. 2",
    models="any",
    minutes={"smoke": 0.2, "quick": 1.0, "full": 16.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
