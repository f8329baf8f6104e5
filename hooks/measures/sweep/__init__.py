"""Loss, KL and accuracy under noise."""

from hooks.measures.sweep.measure import sweep
from hooks.measures.sweep.report import SweepReport, SweepSettings
from hooks.measures.sweep.score import UNSCORED
from hooks.measures.sweep.targets import scored_targets

__all__ = ["SweepReport", "SweepSettings", "UNSCORED", "scored_targets", "sweep"]
