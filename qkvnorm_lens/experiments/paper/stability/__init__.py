"""At which learning rates training fails, by width and placement (Menary et al. 2024, Fig. 24).

Small models, trained from their start with the paper's recipe (AdamW, decay of all parameters, a
constant rate) for a fixed number of steps.
"""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.paper.stability import figure, measure, words

EXPERIMENT: Final = experiment(
    "stability",
    "Loss after training, and failed runs, against the learning rate",
    "Menary et al. 2024, Fig. 24",
    models="none",
    minutes=(0.2, 2.0, 38.0),
    modules=(measure, figure, words),
)
