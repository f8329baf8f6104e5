"""The collapse that Pre-Norm models really suffer, with no injected noise (not in any paper).

Menary et al. 2024 simulate interference with independent noise. Here the scale of the norm in front
of each layer's attention is frozen at one constant, and the sparse rows are counted that attend to
another token then.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.interference import figure, measure, words
from qkvnorm_lens.experiments.core import experiment

EXPERIMENT: Final = experiment(
    "interference",
    "The collapse that Pre-Norm's common length really causes",
    "not in a paper; Menary et al. 2024 name it as missing (theorems 2 and 7, limitations)",
    models="any",
    minutes=(0.2, 0.6, 2.0),
    modules=(measure, figure, words),
)
