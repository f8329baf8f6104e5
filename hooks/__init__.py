"""Noise on the L2 norms of queries, keys and values, and the circuits that collapse under it."""

from hooks.collapse import (
    DEFAULT_SIGMAS,
    CollapseReport,
    KeptRows,
    ProbeSettings,
    RowTable,
    collapse_probe,
)
from hooks.corpus import measure_corpus, merge_corpus, probe_corpus
from hooks.errors import ReportFileError, UnsupportedModelError
from hooks.measures.cache import (
    CacheFormat,
    CacheRecipe,
    CacheRisk,
    CacheSettings,
    cache_risk,
)
from hooks.measures.interference import InterferenceReport, InterferenceSettings, interference
from hooks.measures.rank import RankReport, RankSettings, RankSite, rank_profile
from hooks.measures.spectrum import SpectrumReport, SpectrumSettings, spectral_gap
from hooks.measures.spread import SpreadReport, SpreadSettings, spread
from hooks.measures.sweep import SweepReport, SweepSettings, sweep
from hooks.measures.symmetry import CentredAttention, SymmetryReport, SymmetrySettings, symmetry_gap
from hooks.model import Prompts, encode
from hooks.noise import (
    LAWS,
    NON_SPARSE,
    SPARSE,
    Gaussian,
    Law,
    LogNormal,
    NormNoise,
    Uniform,
    collapse_probability,
    critical_half_width,
)
from hooks.sites import (
    AttentionSites,
    LayerSites,
    LayerView,
    ScoreParts,
    Site,
    VectorSite,
    attention_sites,
    observe,
    split,
)

__all__ = [
    "attention_sites",
    "NormNoise",
    "collapse_probe",
    "CollapseReport",
    "probe_corpus",
    "measure_corpus",
    "merge_corpus",
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
    "cache_risk",
    "CacheRisk",
    "CacheRecipe",
    "CacheFormat",
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
    "CacheSettings",
    "RankSettings",
    "RankSite",
    "RowTable",
    "KeptRows",
    "encode",
    "Prompts",
    "observe",
    "LayerView",
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
