"""How much of a difference in collapse rates is a difference in score level only.

softmax ignores a constant added to a row's scores, w -> w + c; the collapse rate does not, for
noise multiplies. Two models with the same attention patterns can so differ in their rates. Shown:
each model's rate at its own level, in the centred gauge (each row's mean visible q.k part taken
away), and as a function of the level, every row moved by one constant so that the model's mean
attended q.k part is the level wanted.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.gauge import figure, measure, words
from qkvnorm_lens.experiments.core import experiment

EXPERIMENT: Final = experiment(
    "gauge",
    "The score level's part in the collapse rate",
    "beyond Menary et al. 2024: a control",
    models="any",
    minutes=(0.3, 2.0, 8.0),
    modules=(measure, figure, words),
    version=2,
)
