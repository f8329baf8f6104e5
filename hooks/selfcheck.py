"""Does noise do on this model what the noise model says? Asked of the model itself.

One forward pass over copies of one short prompt. Copy 0 is clean; for each layer there is one copy
in which only that layer's q is noised, one for k, one for v (its scores edited too), and one with q
set to zero (what remains of the scores is the bias; noised at the projection too). So every
layer is judged on its clean inputs, in one pass, and its prediction

    softmax(cap((1 + kq)(1 + k_t) s_t + b_t))

from the clean copy is held against the pattern that the noised copy shows. Two things may stand in
the way of that:

- *No noise moves a weight*, as a saturated attention's. Then the noised scores are held against
  the predicted ones, and the pattern against the softmax of the scores that were seen.
- *No hook shows the scores, or the vectors behind a norm.* Scores and pattern are then read where
  the model takes its softmax (:mod:`hooks._tap`), and where what was noised at the hooks of q and k
  is not what arrives, the factors multiply the operands of the dot product themselves.

What neither decides is refused.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hooks import _state
from hooks._inputs import ModelInput, short_input
from hooks._known import refuse_known_wrong
from hooks._layercheck import LayerCheck, Undecided, Unpredicted
from hooks._layercopies import KINDS, LayerCopies
from hooks._locate import locate
from hooks._prompts import encode
from hooks._tap import AttentionTap
from hooks.errors import UnsupportedModelError
from hooks.sites import AttentionSites, HookedModel, LayerSites

_ATTEMPTS = 3
# Switches of a HookedTransformer that change where q, k and v are computed, or the heads of k.
_FLAGS = ("use_split_qkv_input", "use_attn_in", "ungroup_grouped_query_attention")
_LAYERS_PER_PASS = 8  # bounds the logits of the copies, which nobody reads

_remembered: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], AttentionSites]] = (
    weakref.WeakKeyDictionary()
)


def attention_sites(
    model: HookedModel, inputs: Mapping[str, Any] | Tensor | None = None
) -> AttentionSites:
    """Where q, k, v, scores and pattern are in each attention layer, verified on the model.

    Runs a self-check (a few short tokens, some forward passes): every hook point fires once per
    forward; scaling q, k and v there changes what follows; the pattern predicted from the clean
    scores under a drawn noise equals the pattern observed under that noise, in every layer. The
    result is remembered per model, attention implementation, compatibility mode, dtype, device and
    switches such as ``use_split_qkv_input``, and made again when one of them changes, or while
    hooks of the user's are on the attention.
    Attention modules that are left out are named in ``silent`` and ``outside`` of the result.

    Args:
        model: a TransformerBridge, or anything else that can be called and has ``cfg``,
            ``hook_dict``, ``hooks`` and ``run_with_hooks``.
        inputs: one example to check with, for a model that a few random tokens (an image, a wave
            form) do not run: pixel values, or named inputs such as
            ``{"input_ids": ..., "pixel_values": ...}``. The first prompt is taken. The result is
            that of later calls without an example, too.

    Returns:
        :class:`AttentionSites`, one :class:`LayerSites` per attention layer.

    Raises:
        UnsupportedModelError: a check failed, or its effect drowns in rounding. The message names
            layer, check, wanted and got.
        TypeError: something else than such a model.
    """
    if not isinstance(model, HookedModel):
        raise TypeError(
            "model: wanted a TransformerBridge (TransformerBridge.boot_transformers(name)) or a "
            f"HookedTransformer; got {type(model).__name__}"
        )
    unreadable = _state.refuse_unreadable(model)
    if unreadable:
        raise UnsupportedModelError(
            "readable weights", wanted="floating-point weights in memory", got=unreadable
        )
    refuse_known_wrong(model)
    key = _configuration(model)
    known = _remembered.setdefault(model, {})
    # A hook of the user's on attention may change what a site carries: look again each time.
    points = model.hook_dict.items()
    hooked = sorted(n for n, p in points if "attn" in n and _state.foreign_hooks(p))
    if hooked or key not in known or inputs is not None:
        with _state.evaluating(model), _state.checking():
            try:
                sites = _verify(model, inputs)
            except UnsupportedModelError as error:
                if not hooked:
                    raise
                raise _naming(error, hooked) from error
        if hooked:
            return sites
        known[key] = sites
    return known[key]


def _naming(error: UnsupportedModelError, hooked: list[str]) -> UnsupportedModelError:
    """The same refusal, with the user's own hooks, which may be its cause."""
    return UnsupportedModelError(
        error.check,
        wanted=error.wanted,
        got=f"{error.got}; hooks of yours are on {', '.join(hooked[:3])}"
        f"{' and others' if len(hooked) > 3 else ''}: where they change what a pattern is, probe "
        "without them, and open the noise's context before theirs",
        layer=error.layer,
    )


def _configuration(model: HookedModel) -> tuple[Any, ...]:
    """What a verdict hangs on."""
    inner = getattr(model, "original_model", None)
    implementations = (
        getattr(getattr(inner, "config", None), "_attn_implementation", None),
        getattr(model.cfg, "attn_implementation", None),
        getattr(model.cfg, "attention_implementation", None),
    )
    flags = tuple(getattr(model.cfg, name, None) for name in _FLAGS)
    return (
        *implementations,
        bool(getattr(model, "compatibility_mode", False)),
        _state.model_dtype(model),
        str(next(iter(p.device for m in _state.modules(model) for p in m.parameters()), "cpu")),
        flags,
    )


class _Example:
    """Makes the copies of a check's prompt: random ones, or the user's example."""

    def __init__(self, model: HookedModel, inputs: Mapping[str, Any] | Tensor | None) -> None:
        self.model = model
        self.example = None if inputs is None else encode(model, inputs).batch([0])

    def copies(self, batch: int, avoid: set[int], attempt: int = 0) -> ModelInput:
        """A batch of one prompt, another one at each attempt where there is a choice."""
        if self.example is not None:
            return self.example.rows([0] * batch)
        return short_input(self.model, batch, avoid, attempt)


def _verify(model: HookedModel, inputs: Mapping[str, Any] | Tensor | None) -> AttentionSites:
    """Find the attentions and judge them, on other prompts while one decides nothing."""
    cfg = model.cfg
    counts = {int(cfg.n_heads), int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)}
    example = _Example(model, inputs)
    found = locate(model, example.copies(2, counts | {2}))
    for attempt in range(_ATTEMPTS):
        try:
            sites = _check_all(example, found.layers, attempt)
            return replace(
                sites, silent=found.silent, outside=found.outside, left_out=found.left_out
            )
        except Undecided as error:  # another prompt may show more
            undecided = error.refusal
    raise undecided


def _check_all(
    example: _Example, layers: tuple[LayerSites, ...], attempt: int, *, may_strip: bool = True
) -> AttentionSites:
    """The verdict on every layer, from one prompt.

    A tapped layer whose hooks of q and k do not predict its pattern is judged again at the operands
    of the dot product (``may_strip``: once).
    """
    verified: list[LayerSites] = []
    table: list[dict[str, Any]] = []
    stripped: dict[int, LayerSites] = {}
    for at in range(0, len(layers), _LAYERS_PER_PASS):
        checks = _check_some(example, layers[at : at + _LAYERS_PER_PASS], attempt)
        for check in checks:
            _refuse_not_finite(check)
            try:
                verified.append(check.judge())
            except Unpredicted:
                # A norm that no hook shows may stand behind these hooks: try at the operands.
                seen = check.sites.anchor is not None and not check.sites.bare
                if not may_strip or not check.sites.tapped or not seen:
                    raise
                stripped[check.sites.layer] = check.sites.without_hooks()
            table += check.table
    if stripped:
        again = tuple(stripped.get(sites.layer, sites) for sites in layers)
        return _check_all(example, again, attempt, may_strip=False)
    return AttentionSites(tuple(verified), pd.DataFrame(table))


def _refuse_not_finite(check: LayerCheck) -> None:
    """NaN passes for a masked key, and every verdict behind it would be on nothing.

    Asked of the clean copy; -inf is what masks write.
    """
    scores = check.seen.tensors.get("scores")
    if scores is None:  # the verdict says that they did not fire
        return
    clean = scores[:1]
    nan = bool(clean.isnan().any())
    if nan or bool(clean.isposinf().any()):
        raise UnsupportedModelError(
            "the scores of the self-check",
            wanted="finite numbers",
            got="NaN" if nan else "an infinite one",
            layer=check.sites.layer,
        )


def _check_some(
    example: _Example, layers: tuple[LayerSites, ...], attempt: int
) -> list[LayerCheck]:
    """One forward pass with the copies of these layers, and what their hooks saw."""
    model = example.model
    heads = {n for s in layers for n in (s.n_heads, s.n_kv_heads)}
    batch = 1 + len(KINDS) * len(layers)
    given = example.copies(batch, heads, attempt)
    generator = torch.Generator().manual_seed(2 + attempt)
    eps = torch.finfo(_state.model_dtype(model)).eps
    tap = AttentionTap()
    copies = [
        LayerCopies(sites, index, batch, generator, eps, tap) for index, sites in enumerate(layers)
    ]
    fwd_hooks = [hook for layer in copies for hook in layer.hooks()]
    last = layers[-1]
    if last.bare:
        copies[-1].last = True
    elif last.z is not None:
        fwd_hooks.append((last.z.hook, _finish))  # nothing later is looked at
    with (
        warnings.catch_warnings(),
        contextlib.suppress(_state.Finished),
        tap if any(sites.tapped for sites in layers) else contextlib.nullcontext(),
        model.hooks(fwd_hooks=fwd_hooks),
    ):
        # TransformerLens warns where an edit of the scores is discarded: that is what we test.
        warnings.filterwarnings("ignore", message=".*has already consumed the original values")
        given.run(model)
    return [LayerCheck(layer) for layer in copies]


def _finish(tensor: Tensor, hook: Any) -> None:
    """A hook behind which nothing is looked at."""
    raise _state.Finished
