"""How far apart the norms of attended keys lie."""

from hooks.measures.spread.measure import spread
from hooks.measures.spread.report import SpreadReport, SpreadSettings

__all__ = ["SpreadReport", "SpreadSettings", "spread"]
