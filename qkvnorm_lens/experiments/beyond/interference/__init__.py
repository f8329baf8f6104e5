"""The collapse that Pre-Norm models really suffer, with no injected noise (not in any paper).

Menary et al. 2024 simulate interference with independent noise. Here the scale of the norm in front
of each layer's attention is frozen at one constant, and the sparse rows are counted that attend to
another token then.
"""

from typing import Final

from qkvnorm_lens.experiments.beyond.interference.figure import figure
from qkvnorm_lens.experiments.beyond.interference.measure import parts
from qkvnorm_lens.experiments.beyond.interference.words import claims, text
from qkvnorm_lens.experiments.core import Experiment

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="interference",
    title="The collapse that Pre-Norm's common length really causes",
    source="not in a paper; Menary et al. 2024 name it as missing (theorems 2 and 7, limitations)",
    models="any",
    minutes={"smoke": 0.2, "quick": 0.6, "full": 2.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
