"""Does the place of the norm matter for text? Menary et al. 2024 ask it of sums alone.

Small language models trained on old books by our own trainer: no norm in attention, one on the
block's input, on q and k, on q, k and v; all else is equal, the order of the data too. Loss on
books that were never read; sparse rows, sinks and collapse; spread and interference; rank and
spectrum by depth; what a quantised cache costs.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.language import figure, measure, words
from qkvnorm_lens.experiments.core import experiment

EXPERIMENT: Final = experiment(
    "language",
    "The place of the norm in small language models",
    "the questions of Menary et al. 2024, asked of text",
    models="none",
    minutes=(0.3, 3.0, 20.0),
    modules=(measure, figure, words),
)
