"""Circuit collapse against the noise's size (Menary et al. 2024, Fig. 3 and 13).

Noise in each layer on its own, on clean inputs. The loose rate is computed and, to check that,
sampled; the strict rate is sampled.
"""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.paper.collapse.figure import figure
from qkvnorm_lens.experiments.paper.collapse.measure import parts
from qkvnorm_lens.experiments.paper.collapse.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="collapse",
    title="Circuit collapse of sparse attention under norm noise",
    source="Menary et al. 2024, Fig. 3 and 13",
    models="any",
    minutes={"smoke": 0.3, "quick": 2.0, "full": 8.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
    version=2,
)
