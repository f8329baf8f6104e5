"""Key/value caches: their formats to the bit, what each costs, which layer should have which."""

from hooks.measures.cache.affine import HQQ, KIVI, Quanto
from hooks.measures.cache.errors import recomputed as recomputed
from hooks.measures.cache.exports import ENGINES
from hooks.measures.cache.fisher import Gradients as Gradients
from hooks.measures.cache.formats import (
    CacheFormat,
    Float8,
    Full,
    TransformersFloat8,
    kinds,
    read_format,
    stored,
    text_of,
)
from hooks.measures.cache.ggml import GGML
from hooks.measures.cache.measure import DEFAULT_FORMATS, cache_risk
from hooks.measures.cache.recipe import CacheRecipe, choose
from hooks.measures.cache.report import CacheRisk, CacheSettings

__all__ = [
    "DEFAULT_FORMATS", "ENGINES", "GGML", "HQQ", "KIVI", "CacheFormat", "CacheRisk",
    "CacheSettings", "Float8", "Full", "Quanto", "CacheRecipe", "TransformersFloat8",
    "cache_risk", "kinds", "choose", "read_format", "stored", "text_of",
]  # fmt: skip
