"""At which learning rates training fails, by width and placement (Menary et al. 2024, Fig. 24).

Small models, trained from their start with the paper's recipe (AdamW, decay of all parameters, a
constant rate) for a fixed number of steps.
"""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.paper.stability.figure import figure
from qkvnorm_lens.experiments.paper.stability.measure import parts
from qkvnorm_lens.experiments.paper.stability.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="stability",
    title="Loss after training, and failed runs, against the learning rate",
    source="Menary et al. 2024, Fig. 24",
    models="none",
    minutes={"smoke": 0.2, "quick": 2.0, "full": 38.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
