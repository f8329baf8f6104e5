"""Rank of the tokens by depth, trained and at random start (Wu et al. 2024)."""

from typing import Final

from qkvnorm_lens.experiments.core import Experiment
from qkvnorm_lens.experiments.related.rank.figure import figure
from qkvnorm_lens.experiments.related.rank.measure import parts
from qkvnorm_lens.experiments.related.rank.words import claims, text

__all__ = ["EXPERIMENT"]

EXPERIMENT: Final = Experiment(
    name="rank",
    title="Rank of the tokens by depth, trained and at random start",
    source="Wu et al. 2024",
    models="any",
    minutes={"smoke": 0.1, "quick": 0.5, "full": 2.5},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
