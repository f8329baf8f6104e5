"""Three-digit addition without positional encoding, with and without skip connections.

Zuo & Guerzhoy 2024 (arXiv 2402.05969): a causal mask alone lets a transformer see order. Do skip
connections carry it? Small models, several seeds, trained on sums of two positive integers of three
digits: with rotary positions, without positions, and without positions and skip connections of
attention alone, or of attention and feed-forward. What they learned, how fast, and whether the
trained models see the order of a question's tokens.
"""

from typing import Final

from qkvnorm_lens.experiments.core import experiment
from qkvnorm_lens.experiments.related.positions import figure, measure, words

EXPERIMENT: Final = experiment(
    "positions",
    "Three-digit addition without positions, with and without skip connections",
    "Zuo & Guerzhoy 2024, arXiv 2402.05969",
    models="none",
    minutes=(0.1, 0.4, 2.0),
    modules=(measure, figure, words),
    version=3,
)
