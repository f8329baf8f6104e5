"""Where a model keeps q, k, v, scores and pattern, and the proof that they are there."""

from hooks.sites.facts import attention_facts, model_facts
from hooks.sites.masks import check_masks, once
from hooks.sites.norm import CHECK, InnerNorm, inner_norms
from hooks.sites.scores import (
    ScoreParts,
    expand_factors,
    qk_part,
    split,
    uncapped,
    visible,
)
from hooks.sites.selfcheck import attention_sites, sites_and_key, sites_for
from hooks.sites.together import LONGEST, may_always_share, may_share
from hooks.sites.types import (
    AttentionSites,
    LayerSites,
    Site,
    Stream,
    VectorSite,
    as_hooked,
    choose_layers,
)
from hooks.sites.watch import (
    Hook,
    LayerView,
    SeenLayer,
    observe,
    refuse_several_streams,
    stream_hook,
    view_layers,
    watch_layers,
)

__all__ = [
    "CHECK", "LONGEST", "AttentionSites", "Hook", "InnerNorm", "LayerSites", "LayerView",
    "ScoreParts", "SeenLayer", "Site", "Stream", "VectorSite", "as_hooked", "attention_facts",
    "attention_sites", "check_masks", "choose_layers", "expand_factors", "inner_norms",
    "may_always_share", "may_share", "model_facts", "observe", "once", "qk_part",
    "refuse_several_streams", "sites_and_key", "sites_for", "split", "stream_hook", "uncapped",
    "view_layers", "visible", "watch_layers",
]  # fmt: skip
