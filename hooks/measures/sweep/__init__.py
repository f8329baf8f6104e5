"""Loss, KL and accuracy under noise."""

from hooks.measures.sweep.measure import given_targets, next_tokens, sweep
from hooks.measures.sweep.passes import has_next_token
from hooks.measures.sweep.report import SweepReport, SweepSettings
from hooks.measures.sweep.score import UNSCORED

__all__ = [
    "SweepReport",
    "SweepSettings",
    "UNSCORED",
    "given_targets",
    "has_next_token",
    "next_tokens",
    "sweep",
]
