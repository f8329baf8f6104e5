"""Interference: what one common length does to independent subspaces."""

from hooks.measures.interference.measure import interference
from hooks.measures.interference.report import InterferenceReport, InterferenceSettings

__all__ = ["InterferenceReport", "InterferenceSettings", "interference"]
