"""What a model loses with its positions and its mask."""

from hooks.measures.symmetry.centring import CentredAttention, is_centred
from hooks.measures.symmetry.measure import symmetry_gap
from hooks.measures.symmetry.report import SymmetryReport, SymmetrySettings

__all__ = ["CentredAttention", "SymmetryReport", "SymmetrySettings", "is_centred", "symmetry_gap"]
