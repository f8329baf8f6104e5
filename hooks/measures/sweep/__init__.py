"""Loss, KL and accuracy under noise."""

from hooks.measures.sweep.measure import sweep
from hooks.measures.sweep.report import SweepReport, SweepSettings
from hooks.measures.sweep.targets import scored_places, scored_targets

__all__ = ["SweepReport", "SweepSettings", "scored_places", "scored_targets", "sweep"]
