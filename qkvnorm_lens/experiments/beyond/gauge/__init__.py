"""How much of a difference in collapse rates is a difference in score level only.

softmax ignores a constant added to a row's scores, w -> w + c; the collapse rate does not, for
noise multiplies. Two models with the same attention patterns can so differ in their rates. Shown:
each model's rate at its own level, in the centred gauge (each row's mean visible q.k part taken
away), and as a function of the level, every row moved by one constant so that the model's mean
attended q.k part is the level wanted.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.gauge.figure import figure
from qkvnorm_lens.experiments.beyond.gauge.measure import parts
from qkvnorm_lens.experiments.beyond.gauge.words import claims, text
from qkvnorm_lens.experiments.core import Experiment

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="gauge",
    title="The score level's part in the collapse rate",
    source="beyond Menary et al. 2024: a control",
    models="any",
    minutes={"smoke": 0.3, "quick": 2.0, "full": 8.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
    version=2,
)
