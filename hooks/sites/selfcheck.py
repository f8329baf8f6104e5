"""Does noise do to this model what the noise model says? Tried on the model itself.

One forward pass over copies of one short prompt. Copy 0 is clean; for each layer there is one copy
in which only that layer's q is noised, one for k, one for v (its scores edited too), and one with q
set to zero (what remains of the scores is the bias; noised at the projection too). So one pass
judges every layer on its clean inputs. The layer's prediction

    softmax(cap((1 + kq)(1 + k_t) s_t + b_t))

from the clean copy is compared with the pattern that the noised copy shows. Two things may prevent
that:

- *No noise moves a weight*, as in saturated attention. Then the noised scores are compared with the
  predicted ones, and the pattern with the softmax of the observed scores.
- *No hook shows the scores, or the vectors after a norm.* Scores and pattern are then read where
  the model takes its softmax (:mod:`hooks.model.tap`); where noise at the hooks of q and k does not
  arrive, the factors multiply the operands of the dot product themselves.

If neither decides, the model is refused.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import (
    TOKENS_ALONE,
    AttentionTap,
    Finished,
    HookedModel,
    ModelInput,
    NoRoom,
    Prompts,
    Standing,
    changing,
    check_model,
    checking,
    encode,
    evaluating,
    key_of,
    learn_cache,
    measurement,
    names,
    pass_dtype,
    refuse_known_wrong,
    refuse_unreadable,
    resting,
    run_with,
    short_input,
    shorten,
    states,
    users,
)
from hooks.sites.copies import KINDS, LayerCopies, Undecided
from hooks.sites.layer_check import LayerCheck, Unpredicted
from hooks.sites.locate import locate
from hooks.sites.masks import Key, beginning, check_masks, once
from hooks.sites.types import AttentionSites, LayerSites

_ATTEMPTS = 3
_LAYERS_PER_PASS = 8  # bounds the logits of the copies, which nobody reads
_LONGEST = 128  # tokens of a prompt of the caller's that a check runs copies of
_KEPT = 4  # states of one model whose check is remembered

_Remembered = OrderedDict[tuple[Any, ...], AttentionSites]
remembered: weakref.WeakKeyDictionary[Any, _Remembered] = weakref.WeakKeyDictionary()


@measurement
def attention_sites(model: HookedModel, inputs: Any = None) -> AttentionSites:
    """Where q, k, v, scores and pattern are in each attention layer, verified on the model.

    Runs a self-check (a few short tokens, some forward passes): every hook point fires once per
    pass; scaling q, k and v there changes what follows; the pattern predicted from the clean scores
    under a drawn noise equals the pattern observed under that noise, in every layer. The result is
    remembered, and reused only while nothing has changed: all weights and buffers, configurations,
    modules, hooks of yours, autocast, dtype, device and attention implementation. ``silent`` and
    ``outside`` of the result name attention modules that are left out.

    Your hooks on the model are part of it. Where the check can't be done with them (they insert
    vectors of another prompt, or leave nothing to see), it is done without them, and ``notes`` of
    the result says so.

    Args:
        model: a TransformerBridge, or anything else that can be called and has ``cfg``,
            ``hook_dict``, ``hooks`` and ``run_with_hooks``.
        inputs: an example to check with, in any form that measurements take, for a model that a few
            random tokens (an image, a wave form) can't run or can't decide. Later calls without an
            example reuse the result.

    Returns:
        :class:`AttentionSites`, one :class:`LayerSites` per attention layer.

    Raises:
        UnsupportedModelError: a check failed, or its effect is lost in rounding. The message names
            layer, check, wanted and got.
        TypeError: not such a model.
    """
    check_model(model)
    if inputs is None:
        return _sites(model, None, asked=False)[0]
    prompts = encode(model, inputs)
    sites, key = _sites(model, prompts, asked=True)
    _check_longest(model, sites, prompts, key)
    return sites


def sites_for(model: HookedModel, prompts: Prompts) -> AttentionSites:
    """The sites for a measurement; its prompts decide where random tokens can't."""
    return sites_and_key(model, prompts)[0]


def sites_and_key(model: HookedModel, prompts: Prompts) -> tuple[AttentionSites, Key]:
    """:func:`sites_for`, and the key of verdicts on this model, which takes time to make."""
    check_model(model)
    sites, key = _sites(model, prompts, asked=False)
    check_masks(model, prompts, key)
    _check_longest(model, sites, prompts, key)
    return sites, key


def _sites(
    model: HookedModel, prompts: Prompts | None, *, asked: bool
) -> tuple[AttentionSites, Key]:
    """The sites and the model's key; ``asked``: checked anew, on the prompts, else remembered."""
    unreadable = refuse_unreadable(model)
    if unreadable:
        raise UnsupportedModelError(
            "readable weights", wanted="weights that have values", got=unreadable
        )
    refuse_known_wrong(model)
    key, known = key_of(model), remembered.setdefault(model, OrderedDict())
    kinds = () if prompts is None else _unusual(prompts)
    if not asked and (*key, kinds) in known:
        return known[(*key, kinds)], key
    if asked or kinds:
        examples = [_Example(model, prompts)]
    else:
        examples = [_Example(model, None)] + [_Example(model, p) for p in (prompts,) if p]
    held = states(model)
    with evaluating(model), checking():
        learn_cache(model, lambda: examples[0].copies(2, {2}))
        sites = _with_or_without_hooks(model, examples)
    moved = changing(model, held)
    if moved:
        note = (
            f"Hooks or modules of yours ({', '.join(moved[:3])}) change some of what they hold in "
            "each pass: they are identified by the rest."
        )
        sites, key = replace(sites, notes=(*sites.notes, note)), key_of(model)
    known[(*key, kinds)] = sites
    if asked:
        known[(*key, ())] = sites
    while len(known) > _KEPT:
        known.popitem(last=False)
    return sites, key


def _unusual(prompts: Prompts) -> tuple[str, ...]:
    """Names of the inputs that random tokens can't replace."""
    signal = prompts.first[0].is_floating_point()
    return tuple(n for n in prompts.extra if n not in TOKENS_ALONE) + ("a signal",) * signal


def _with_or_without_hooks(model: HookedModel, examples: Sequence[_Example]) -> AttentionSites:
    """The check with all hooks on the model or, if that fails, without the user's own."""
    standing = users(model)
    try:
        sites = verify(model, examples)
    except Exception as error:  # a hook of the user's may raise what it likes
        if not standing:
            raise
        with resting(standing):
            sites = verify(model, examples)
        edits = _on_scores(model, sites, standing)
        if edits:
            raise _naming(error, edits) from error
        note = (
            f"The self-check ran without hooks of yours on {names(standing)}: with them it fails "
            f"({shorten(str(error), 160)})."
        )
        layers = tuple(replace(layer, recheck=True) for layer in sites)
        sites = replace(sites, layers=layers, notes=(note,))
    if standing and _draws(model, examples[-1]):
        note = (
            f"Hooks of yours on {names(standing)} make two passes of one prompt differ: what is "
            "measured is one pass among many."
        )
        sites = replace(sites, notes=(*sites.notes, note))
    return sites


def _check_longest(model: HookedModel, sites: AttentionSites, prompts: Prompts, key: Key) -> None:
    """The check on the longest prompt, as hooks at the scores may act on no other."""
    standing = users(model)
    edits = _on_scores(model, sites, standing) if standing else []
    if not edits:
        return

    def check() -> None:
        try:
            with evaluating(model), checking():
                again = _check_all(_Example(model, prompts, whole=True), sites.layers, 0)
            for few, many in zip(sites.layers, again, strict=True):
                if few.has_bias != many.has_bias:
                    raise UnsupportedModelError(
                        "a bias of the scores",
                        wanted="one at every length, or none",
                        got="one on the longest prompt alone" if many.has_bias else "none on it",
                        layer=few.layer,
                    )
        except Undecided:
            pass  # short prompts decided it
        except UnsupportedModelError as error:
            raise _naming(error, edits) from error

    once(model, ("longest", *key, max(len(row) for row in prompts.first)), check)


def _on_scores(
    model: HookedModel, sites: AttentionSites, standing: Sequence[Standing]
) -> list[Standing]:
    """Hooks at scores or pattern, where noise no longer does what the noise model says."""
    points = model.hook_dict
    names_of = {name for layer in sites for name in (layer.scores, layer.pattern) if name}
    tables = [points[name]._forward_hooks for name in names_of]
    return [hook for hook in standing if any(hook.table is table for table in tables)]


def _naming(error: Exception, edits: list[Standing]) -> UnsupportedModelError:
    """A refusal that also names the user's own hooks, which caused it."""
    if not isinstance(error, UnsupportedModelError):
        error = UnsupportedModelError("the self-check", wanted="a pass that runs", got=str(error))
    return UnsupportedModelError(
        error.check,
        wanted=error.wanted,
        got=f"{error.got}; hooks of yours are on {names(edits)}: where they change what a pattern "
        "is, probe without them, and open the noise's context before theirs",
        layer=error.layer,
    )


def _draws(model: HookedModel, example: _Example) -> bool:
    """Whether two passes of one prompt differ; False where they can't be run."""
    try:
        first, second = (example.copies(1, set()).run(model) for _ in range(2))
    except (ValueError, RuntimeError, IndexError, TypeError):
        return False
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.shape != second.shape or not torch.equal(first.nan_to_num(), second.nan_to_num())


@dataclass(frozen=True)
class _Example:
    """Makes the copies of a check's prompt: random, or from the caller's prompts."""

    model: HookedModel
    prompts: Prompts | None
    whole: bool = False  # the longest prompt, to its end

    def copies(self, batch: int, avoid: set[int], attempt: int = 0) -> ModelInput:
        """A batch of one prompt, a different one at each attempt where possible."""
        if self.prompts is None:
            return short_input(self.model, batch, avoid, attempt)
        if self.whole:
            rows = self.prompts.first
            longest = max(range(len(rows)), key=lambda i: len(rows[i]))
            return self.prompts.batch([longest]).rows([0] * batch)
        index = attempt % len(self.prompts)
        given = beginning(self.prompts.some([index]), avoid).batch([0])
        return given.rows([0] * batch)


def verify(model: HookedModel, examples: Sequence[_Example]) -> AttentionSites:
    """Find the attentions and judge them, on further prompts while one decides nothing."""
    cfg = model.cfg
    counts = {int(cfg.n_heads), int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)}
    undecided: UnsupportedModelError | None = None
    for example in examples:
        try:
            found = locate(model, example.copies(2, counts | {2}))
            for attempt in range(_ATTEMPTS):
                try:
                    sites = _check_all(example, found.layers, attempt)
                    return replace(found, layers=sites.layers, check=sites.check)
                except Undecided as error:  # another prompt may show more
                    undecided = undecided or error.refusal
        except NoRoom as error:
            undecided = undecided or error
    assert undecided is not None
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
                # A norm that no hook shows may follow these hooks: try at the operands.
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
    """Refuse NaN: it would pass for a masked key, and later verdicts would be void.

    Checked on the clean copy; -inf is what masks write.
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
    tap = AttentionTap()
    copies = []
    for index, sites in enumerate(layers):
        eps = torch.finfo(pass_dtype(model, sites.prefix)).eps
        copies.append(LayerCopies(sites, index, batch, generator, eps, tap))
    fwd_hooks = [hook for layer in copies for hook in layer.hooks()]
    last = layers[-1]
    if last.bare:
        copies[-1].last = True
    elif last.z is not None:
        fwd_hooks.append((last.z.hook, _finish))  # nothing later is read
    with warnings.catch_warnings():
        # TransformerLens warns where an edit of the scores is discarded: that is what we test.
        warnings.filterwarnings("ignore", message=".*has already consumed the original values")
        run_with(model, given, fwd_hooks, tap if any(s.tapped for s in layers) else None)
    return [LayerCheck(layer) for layer in copies]


def _finish(tensor: Tensor, hook: Any) -> None:
    """A hook after which nothing is read."""
    raise Finished
