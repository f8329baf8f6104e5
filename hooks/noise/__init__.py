"""The noise model: laws of a factor, factors on a model, collapse probabilities."""

from hooks.noise.cache_check import HookList
from hooks.noise.clock import Clock, Factors, refuse_cache
from hooks.noise.laws import (
    LAWS,
    Gaussian,
    Law,
    LogNormal,
    Uniform,
    check_sigma,
    get_law,
    read_sigmas,
)
from hooks.noise.norm_noise import NON_SPARSE, SPARSE, At, NormNoise, Rows, Shared
from hooks.noise.probability import collapse_probability, critical_half_width
from hooks.noise.streams import draw_uniforms, numbers, stream_keys

__all__ = [
    "LAWS", "NON_SPARSE", "SPARSE", "At", "Clock", "Factors", "Gaussian", "HookList", "Law",
    "LogNormal", "NormNoise", "Rows", "Shared", "Uniform", "check_sigma", "collapse_probability",
    "critical_half_width", "draw_uniforms", "get_law", "numbers", "read_sigmas", "refuse_cache",
    "stream_keys",
]  # fmt: skip
