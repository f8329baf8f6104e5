"""Rank of the residual stream, layer by layer."""

from hooks.measures.rank.measure import rank_profile
from hooks.measures.rank.numbers import distance_to_mean, measures
from hooks.measures.rank.report import RankReport, RankSettings, RankSite

__all__ = ["RankReport", "RankSettings", "RankSite", "distance_to_mean", "measures", "rank_profile"]
