"""Noise on the L2 norms of queries, keys and values, and the circuits that collapse under it."""

from hooks._interference_report import InterferenceReport, InterferenceSettings
from hooks._kept import KeptRows
from hooks._rank_report import RankReport, RankSettings, RankSite
from hooks._spectrum_report import SpectrumReport, SpectrumSettings
from hooks._spread_report import SpreadReport, SpreadSettings
from hooks._sweep_report import SweepReport, SweepSettings
from hooks._symmetry_report import SymmetryReport, SymmetrySettings
from hooks.centring import CentredAttention
from hooks.collapse import DEFAULT_SIGMAS, collapse_probe
from hooks.errors import ReportFileError, UnsupportedModelError
from hooks.interference import interference
from hooks.laws import LAWS, Gaussian, Law, LogNormal, Uniform
from hooks.noise import NON_SPARSE, SPARSE, NormNoise
from hooks.probability import collapse_probability, critical_half_width
from hooks.rank import rank_profile
from hooks.results import CollapseReport, ProbeSettings, RowTable
from hooks.scores import ScoreParts, split
from hooks.selfcheck import attention_sites
from hooks.sites import AttentionSites, LayerSites, Site, VectorSite
from hooks.spectrum import spectral_gap
from hooks.spread import spread
from hooks.sweep import sweep
from hooks.symmetry import symmetry_gap

__all__ = [
    "attention_sites",
    "NormNoise",
    "collapse_probe",
    "CollapseReport",
    "sweep",
    "SweepReport",
    "spread",
    "SpreadReport",
    "interference",
    "InterferenceReport",
    "spectral_gap",
    "SpectrumReport",
    "CentredAttention",
    "symmetry_gap",
    "SymmetryReport",
    "rank_profile",
    "RankReport",
    "UnsupportedModelError",
    "ReportFileError",
    "AttentionSites",
    "LayerSites",
    "VectorSite",
    "Site",
    "ProbeSettings",
    "SweepSettings",
    "SpreadSettings",
    "SpectrumSettings",
    "SymmetrySettings",
    "InterferenceSettings",
    "RankSettings",
    "RankSite",
    "RowTable",
    "KeptRows",
    "ScoreParts",
    "split",
    "critical_half_width",
    "collapse_probability",
    "DEFAULT_SIGMAS",
    "LAWS",
    "Law",
    "Uniform",
    "Gaussian",
    "LogNormal",
    "NON_SPARSE",
    "SPARSE",
]
