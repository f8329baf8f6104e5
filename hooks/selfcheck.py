"""Does noise do on this model what the noise model says? Asked of the model itself.

One forward pass over copies of one short prompt. Copy 0 is clean; for each layer there is one copy
in which only that layer's q is noised, one for k, one for v (its scores edited too), and one with q
set to zero (what remains of the scores is the bias; noised at the projection too). So every
layer is judged on its clean inputs, in one pass, and its prediction

    softmax(cap((1 + kq)(1 + k_t) s_t + b_t))

from the clean copy is held against the pattern that the noised copy shows.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hooks import _state
from hooks._layercheck import KINDS, FusedLayerCheck, LayerCheck, Undecided
from hooks.errors import UnsupportedModelError
from hooks.sites import AttentionSites, HookedModel, LayerSites, locate, short_tokens

_ATTEMPTS = 3
_LAYERS_PER_PASS = 8  # bounds the logits of the copies, which nobody reads

_remembered: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], AttentionSites]] = (
    weakref.WeakKeyDictionary()
)


def attention_sites(model: HookedModel) -> AttentionSites:
    """Where q, k, v, scores and pattern are in each attention layer, verified on the model.

    Runs a self-check (a few short tokens, some forward passes): every hook point fires once per
    forward; scaling q, k and v there changes what follows; the pattern predicted from the clean
    scores under a drawn noise equals the pattern observed under that noise, in every layer. The
    result is remembered per model, attention implementation, compatibility mode, dtype and device,
    and made again when one of them changes, or while hooks of the user's are on the attention.

    Args:
        model: a TransformerBridge or anything with ``cfg``, ``hook_dict``, ``hooks`` and
            ``run_with_hooks``.

    Returns:
        :class:`AttentionSites`, one :class:`LayerSites` per attention layer.

    Raises:
        UnsupportedModelError: a check failed, or its effect drowns in rounding. The message names
            layer, check, wanted and got.
    """
    unreadable = _state.refuse_unreadable(model)
    if unreadable:
        raise UnsupportedModelError(
            "readable weights", wanted="floating-point weights in memory", got=unreadable
        )
    key = _configuration(model)
    known = _remembered.setdefault(model, {})
    # A hook of the user's on attention may change what a site carries: look again each time.
    hooked = any("attn" in n and _state.foreign_hooks(p) for n, p in model.hook_dict.items())
    if hooked or key not in known:
        with _state.evaluating(model), _state.checking():
            sites = _verify(model)
        if hooked:
            return sites
        known[key] = sites
    return known[key]


def _configuration(model: HookedModel) -> tuple[Any, ...]:
    """What a verdict hangs on."""
    inner = getattr(model, "original_model", None)
    implementations = (
        getattr(getattr(inner, "config", None), "_attn_implementation", None),
        getattr(model.cfg, "attn_implementation", None),
        getattr(model.cfg, "attention_implementation", None),
    )
    flags = tuple(getattr(model.cfg, name, None) for name in ("use_split_qkv_input", "use_attn_in"))
    return (
        *implementations,
        bool(getattr(model, "compatibility_mode", False)),
        _state.model_dtype(model),
        str(next(iter(p.device for m in _state.modules(model) for p in m.parameters()), "cpu")),
        flags,
    )


def _verify(model: HookedModel) -> AttentionSites:
    layers = locate(model)
    undecided: UnsupportedModelError | None = None
    for attempt in range(_ATTEMPTS):
        try:
            return _check_all(model, layers, attempt)
        except Undecided as error:  # another prompt may show more
            undecided = error.refusal
    assert undecided is not None
    raise undecided


def _check_all(model: HookedModel, layers: tuple[LayerSites, ...], attempt: int) -> AttentionSites:
    verified: list[LayerSites] = []
    table: list[dict[str, Any]] = []
    for at in range(0, len(layers), _LAYERS_PER_PASS):
        checks = _check_some(model, layers[at : at + _LAYERS_PER_PASS], attempt)
        verified += [check.judge() for check in checks]
        table += [row for check in checks for row in check.table]
    return AttentionSites(tuple(verified), pd.DataFrame(table))


def _check_some(
    model: HookedModel, layers: tuple[LayerSites, ...], attempt: int
) -> list[LayerCheck]:
    heads = {n for s in layers for n in (s.n_heads, s.n_kv_heads)}
    tokens = short_tokens(model, 1 + len(KINDS) * len(layers), heads, attempt)
    generator = torch.Generator().manual_seed(2 + attempt)
    eps = torch.finfo(_state.model_dtype(model)).eps
    causal = getattr(model.cfg, "attention_dir", "causal") == "causal"
    window = int(getattr(model.cfg, "window_size", None) or 0)
    checks = [
        (FusedLayerCheck if sites.fused else LayerCheck)(
            sites, index, tokens, generator, eps, causal=causal, window=window
        )
        for index, sites in enumerate(layers)
    ]
    fwd_hooks = [hook for check in checks for hook in check.hooks()]
    if checks[-1].sites.z is not None:
        fwd_hooks.append((checks[-1].sites.z.hook, _finish))  # nothing later is looked at
    with warnings.catch_warnings():
        # TransformerLens warns where an edit of the scores is discarded: that is what we test.
        warnings.filterwarnings("ignore", message=".*has already consumed the original values")
        with contextlib.suppress(_state.Finished), model.hooks(fwd_hooks=fwd_hooks):
            model(tokens)  # type: ignore[operator]
    return checks


def _finish(tensor: Tensor, hook: Any) -> None:
    raise _state.Finished
