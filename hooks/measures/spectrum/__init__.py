"""Singular values of attention matrices."""

from hooks.measures.spectrum.measure import spectral_gap
from hooks.measures.spectrum.report import SpectrumReport, SpectrumSettings

__all__ = ["SpectrumReport", "SpectrumSettings", "spectral_gap"]
