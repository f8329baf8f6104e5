"""The self-check, checked: our arithmetic is broken on purpose, and the user's model must object.

Each mutation is a mistake that could be in `hooks` itself. The model stays as it is; before the
mistake it passes, with the mistake `attention_sites` refuses it, in float32 and in bfloat16.
Mistakes that change nothing are at the end: the check must not object to those.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import NormNoise, UnsupportedModelError, attention_sites, collapse_probe
from hooks.model import tap
from hooks.model.inputs import ModelInput
from hooks.sites import copies, layer_check, selfcheck
from hooks.sites.scores import ScoreParts
from hooks.sites.types import AttentionSites, LayerSites, Site
from qkvnorm_lens.models.config import ARCHITECTURE as OURS
from tests.support import builders, models
from tests.support.watching import tiny_opt

Patch = pytest.MonkeyPatch
Sites = tuple[LayerSites, ...]


def _built(name: str, *heads: str, **options: Any) -> Callable[[], Any]:
    return lambda: builders.build(name, *heads, **options).model


MODELS: dict[str, Callable[[], Any]] = {
    **models.TINY,
    "gemma2": _built("Gemma2ForCausalLM", attn_logit_softcapping=20.0, num_hidden_layers=2),
    "opt": tiny_opt,  # scores read at the softmax
    "opt-sdpa": _built("OPTForCausalLM", attn="sdpa"),  # at the fused attention
    "ours-sdpa": _built(OURS, "gqa", attn="sdpa"),  # the same, keys shared, is_causal
    "olmo2": _built("Olmo2ForCausalLM"),  # a norm over all heads
    "gpt-oss": _built("GptOssForCausalLM", num_hidden_layers=2),  # sinks
    "t5": _built("T5ForConditionalGeneration"),  # a bias, tapped, an encoder and a decoder
    "t5-sdpa": _built("T5ForConditionalGeneration", attn="sdpa"),  # ... a scale of its own
    "bert": _built("BertForMaskedLM"),  # no mask
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@functools.cache
def model_of(kind: str, dtype: str) -> Any:
    """A model that passes: what is refused is the mistake."""
    model = MODELS[kind]()
    if dtype != "float32":
        model.to(DTYPES[dtype])
    judged(model)
    return model


def judged(model: Any, inputs: Tensor | None = None) -> AttentionSites:
    """The verdict, made afresh."""
    selfcheck.remembered.pop(model, None)
    try:
        return attention_sites(model, inputs)
    finally:
        selfcheck.remembered.pop(model, None)


# -- ways to break the library ----------------------------------------------------------------


def everywhere(patch: Patch, name: str, wrap: Callable[[Any], Any]) -> None:
    """Another function of `hooks.sites.scores` in its place, for every module that calls it."""
    original = getattr(sys.modules["hooks.sites.scores"], name)
    users = [m for n, m in sys.modules.items() if n == "hooks" or n.startswith("hooks.")]
    for module in users:
        if getattr(module, name, None) is original:
            patch.setattr(module, name, wrap(original))


def scores_function(name: str, wrap: Callable[[Any], Any]) -> Callable[[Patch], None]:
    return lambda patch: everywhere(patch, name, wrap)


def located(change: Callable[[Sites], Sites]) -> Callable[[Patch], None]:
    """Sites that were found wrongly."""

    def apply(patch: Patch) -> None:
        find = vars(selfcheck)["locate"]

        def found(*args: Any) -> AttentionSites:
            right = find(*args)
            return replace(right, layers=change(right.layers))

        patch.setattr(selfcheck, "locate", found)

    return apply


def each_layer(change: Callable[[LayerSites], LayerSites]) -> Callable[[Patch], None]:
    return located(lambda layers: tuple(change(sites) for sites in layers))


def measured(name: str, wrap: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """A measurement of the check that is wrong (its result is what the probe goes by)."""
    original = getattr(layer_check.LayerCheck, name)
    return lambda patch: patch.setattr(layer_check.LayerCheck, name, wrap(original))


def scaled_by(change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    """Noise that is written wrongly."""
    original = Site.scale

    def scale(self: Site, vectors: Tensor, factor: Tensor) -> Tensor:
        return original(self, vectors, change(factor))

    return lambda patch: patch.setattr(Site, "scale", scale)


def tapped_by(**wrong: Any) -> Callable[[Patch], None]:
    """A fused attention that is taken apart without one of its arguments."""
    original = tap.Fused.scores

    def scores(self: tap.Fused, *args: Any, **kwargs: Any) -> Tensor:
        return original(replace(self, **wrong), *args, **kwargs)

    return lambda patch: patch.setattr(tap.Fused, "scores", scores)


# -- the mistakes -----------------------------------------------------------------------------


def drop_bias(split: Any) -> Any:
    return lambda sites, *args, **kwargs: split(replace(sites, has_bias=False), *args, **kwargs)


def change_scores(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Masked scores stay as they are."""

    def wrap(split: Any) -> Any:
        def changed(sites: LayerSites, scores: Tensor, *args: Any, **kwargs: Any) -> Any:
            shown = torch.where(scores > -1e4, change(scores), scores)
            return split(sites, shown, *args, **kwargs)

        return changed

    return wrap


def interleave(patch: Patch) -> None:
    heads = property(lambda self: tuple(h % self.n_kv_heads for h in range(self.n_heads)))
    patch.setattr(LayerSites, "kv_head_of", heads)


def first_key_head(patch: Patch) -> None:
    patch.setattr(LayerSites, "kv_head_of", property(lambda self: (0,) * self.n_heads))


def at_projection(sites: LayerSites) -> LayerSites:
    q, k = (replace(site, dot=site.projection) for site in (sites.q, sites.k))
    return replace(sites, q=q, k=k)


def swap_heads_and_positions(sites: LayerSites) -> LayerSites:
    def turned(site: Site) -> Site:
        assert site.head_axis == 2
        return replace(site, head_axis=1)

    sides: dict[str, Any] = {
        role: replace(
            sites.vector(role),
            projection=turned(sites.vector(role).projection),
            dot=turned(sites.vector(role).dot),
        )
        for role in ("q", "k", "v")
    }
    return replace(sites, **sides)


def rotate_layers(*names: str) -> Callable[[Sites], Sites]:
    """Each layer gets these sites of the next one."""

    def change(layers: Sites) -> Sites:
        others = layers[1:] + layers[:1]
        return tuple(
            replace(mine, **{name: getattr(other, name) for name in names})
            for mine, other in zip(layers, others, strict=True)
        )

    return change


def twice_for_missing(patch: Patch) -> None:
    """The hook of k left out, that of q there twice: as many firings as there should be."""
    original = copies.LayerCopies.hooks

    def entries(self: Any) -> list[tuple[str, Any]]:
        q, k = (self.sites.vector(role).dot.hook for role in ("q", "k"))
        found = original(self)
        return [e for e in found if e[0] != k] + [e for e in found if e[0] == q]

    patch.setattr(copies.LayerCopies, "hooks", entries)


def lag(patch: Patch) -> None:
    """What the tap gives is the attention before, from the second one on."""
    take = tap.AttentionTap.take

    def late(self: Any, batch: int) -> Any:
        now = take(self, batch)
        before, self.before = getattr(self, "before", now), now
        return before

    patch.setattr(tap.AttentionTap, "take", late)


def mix_batch_and_heads(patch: Patch) -> None:
    """Axes of a tapped attention told apart the wrong way round."""
    take = tap.AttentionTap.take

    def mixed(self: Any, batch: int) -> Any:
        def turn(x: Tensor) -> Tensor:
            return x.transpose(0, 1).reshape(x.shape)

        taken = take(self, batch)
        if taken is None:
            return None
        made = (turn(taken.scores), turn(taken.pattern))
        return replace(taken, made=made, fused=None)

    patch.setattr(tap.AttentionTap, "take", mixed)
    patch.setattr(LayerSites, "without_hooks", lambda self: self)  # no other way to see them


def keys_for_queries(expand: Any) -> Any:
    def wrong(sites: LayerSites, q: Tensor | None, k: Tensor | None) -> Any:
        factor = expand(sites, q, k)
        return factor.transpose(2, 3) if factor.shape[2] == 1 < factor.shape[3] else factor

    return wrong


def cap_last(patch: Patch) -> None:
    """Noise behind the soft cap: f c tanh(s / c) for c tanh(f s / c)."""
    original = ScoreParts.scores

    def wrong(self: ScoreParts, factor: Tensor | None = None) -> Tensor:
        clean = original(self)
        return clean if factor is None else torch.where(self.mask, clean * factor, clean)

    patch.setattr(ScoreParts, "scores", wrong)


@dataclass(frozen=True)
class Mutation:
    """One mistake, models on which it matters, and what the refusal's name must match.

    ``half``: the one of them that is looked at in bfloat16 too; the first, if not said. A small
    bias or a wide soft cap drowns in bfloat16's rounding on some, an error of z on all.
    """

    apply: Callable[[Patch], None]
    kinds: tuple[str, ...]
    check: str
    half: str = ""


NOISE = r"(pattern|scores) under [qk]-noise"
Q_NOISE, K_NOISE = r"(pattern|scores) under q-noise", r"(pattern|scores) under k-noise"
SOFTMAX = r"pattern = softmax"
Z = r"^z under v-noise"
# Tapped layers are tried again where they multiply, and so without the mistake; the hooks have it.
WRITTEN = Q_NOISE + "|^what is written at|" + Z
# The search for hooks takes other ways where they do not fit.
SEEN = SOFTMAX + "|^shape of|fires once"
ONE_OF_EACH = ("gpt2", "bloom", "gemma2", "opt", "gpt-oss", "bert")

MUTATIONS: dict[str, Mutation] = {
    # s + b
    "bias dropped": Mutation(
        scores_function("split", drop_bias), ("bloom", "t5", "t5-sdpa"), Q_NOISE, half="t5"
    ),
    "bias not measured": Mutation(
        measured(
            "measure_bias",
            lambda f: lambda *args: replace(f(*args), has_bias=False),
        ),
        ("bloom", "t5"),
        Q_NOISE,
        half="t5",
    ),
    "q.k doubled": Mutation(
        scores_function("qk_part", lambda f: lambda *args: 2 * f(*args)), ("bloom", "t5"), Q_NOISE
    ),
    "q.k of the other sign": Mutation(
        scores_function("qk_part", lambda f: lambda *args: -f(*args)), ("bloom", "t5"), Q_NOISE
    ),
    "q.k without its scale": Mutation(
        scores_function("qk_part", lambda f: sys.modules["hooks.sites.scores"].qk_product),
        ("bloom",),
        Q_NOISE,
    ),
    # w
    "scores doubled": Mutation(
        scores_function("split", change_scores(lambda w: 2 * w)), ONE_OF_EACH, SOFTMAX
    ),
    "scores of the other sign": Mutation(
        scores_function("split", change_scores(lambda w: -w)), ONE_OF_EACH, SOFTMAX
    ),
    "scores are the pattern": Mutation(
        each_layer(lambda sites: replace(sites, scores=sites.pattern)),
        ("gpt2", "llama", "bloom", "qwen3", "gemma2", "gpt-oss"),
        "carries pre-softmax scores|softmax",
    ),
    "scores of the next layer": Mutation(
        located(rotate_layers("scores")), ("gpt2", "llama", "bloom"), "softmax|noise"
    ),
    "scores and pattern of the next layer": Mutation(
        located(rotate_layers("scores", "pattern")), ("gpt2", "llama", "bloom"), NOISE
    ),
    "softmax over queries": Mutation(
        lambda patch: patch.setattr(
            ScoreParts, "pattern_of", lambda self, w: w.softmax(-2).nan_to_num(0.0)
        ),
        ONE_OF_EACH,
        SOFTMAX,
    ),
    # the mask
    "the query's own token masked": Mutation(
        scores_function(
            "visible",
            lambda f: lambda w: f(w) & ~torch.eye(*w.shape[-2:]).bool(),
        ),
        ONE_OF_EACH,
        SEEN,
    ),
    "only positive scores visible": Mutation(
        scores_function("visible", lambda f: lambda w: w > 0), ONE_OF_EACH, SEEN
    ),
    "nothing masked": Mutation(
        scores_function("visible", lambda f: lambda w: torch.ones_like(w).bool()),
        ("gpt2", "llama", "bloom", "qwen3", "gemma2", "opt", "gpt-oss"),
        SOFTMAX,
    ),
    "causal flag ignored": Mutation(tapped_by(is_causal=False), ("opt-sdpa", "ours-sdpa"), Z),
    "mask argument ignored": Mutation(tapped_by(attn_mask=None), ("t5-sdpa",), Z),
    # cap and sink
    "soft cap ignored": Mutation(
        each_layer(lambda sites: replace(sites, soft_cap=0.0)), ("gemma2",), Q_NOISE
    ),
    "soft cap invented": Mutation(
        each_layer(lambda sites: replace(sites, soft_cap=20.0)),
        ("gpt2", "llama", "bloom", "opt"),
        "softmax|noise",
        half="llama",
    ),
    "soft cap doubled": Mutation(
        each_layer(lambda sites: replace(sites, soft_cap=2 * sites.soft_cap)),
        ("gemma2",),
        Q_NOISE,
    ),
    "noise behind the soft cap": Mutation(cap_last, ("gemma2",), Q_NOISE),
    "sink dropped": Mutation(
        measured("measure_sink", lambda f: lambda *args: ()), ("gpt-oss",), SOFTMAX
    ),
    "sink invented": Mutation(
        measured("measure_sink", lambda f: lambda self, clean, p: (0.0,) * p.shape[1]),
        ("gpt2", "llama", "bloom", "opt", "bert"),
        SOFTMAX,
    ),
    "sink scaled by the noise": Mutation(
        lambda patch: patch.setattr(
            ScoreParts,
            "pattern",
            lambda self, factor=None: (
                self.pattern_of(self.scores(factor))
                if factor is None or self.sink is None
                else replace(self, sink=self.sink * 3 + 1).pattern_of(self.scores(factor))
            ),
        ),
        ("gpt-oss",),
        Q_NOISE,
    ),
    # heads
    "key heads interleaved": Mutation(
        interleave, ("llama", "qwen3", "gemma2", "gpt-oss", "ours-sdpa"), K_NOISE + "|" + Z
    ),
    "first key head for all": Mutation(
        first_key_head, ("gpt2", "llama", "bloom", "opt", "ours-sdpa"), NOISE + "|" + Z
    ),
    "noise on the next head": Mutation(
        scaled_by(lambda factor: factor.roll(1, -1)), ONE_OF_EACH, WRITTEN
    ),
    "noise of one head on all": Mutation(
        scaled_by(lambda factor: factor[..., :1].expand_as(factor)), ONE_OF_EACH, WRITTEN
    ),
    "noise on the next token": Mutation(
        scaled_by(lambda factor: factor.roll(1, 1)), ONE_OF_EACH, WRITTEN
    ),
    # vectors
    "noise twice": Mutation(scaled_by(lambda factor: factor**2), ONE_OF_EACH, WRITTEN),
    # both read as a bias and agree with themselves: only what was written shows them
    "noise at half strength": Mutation(
        scaled_by(lambda factor: (1 + factor) / 2), ("gpt2", "bloom", "qwen3"), "what is written"
    ),
    "noise mirrored": Mutation(
        scaled_by(lambda factor: 2 - factor), ("gpt2", "bloom", "qwen3"), "what is written"
    ),
    "noise never": Mutation(scaled_by(torch.ones_like), ONE_OF_EACH, "noise"),
    "noise before the QK-norm": Mutation(each_layer(at_projection), ("qwen3", "olmo2"), Q_NOISE),
    "q and k exchanged": Mutation(
        each_layer(lambda sites: replace(sites, q=sites.k, k=sites.q)),
        ("gpt2", "bloom"),
        Q_NOISE,
    ),
    "q and k of the next layer": Mutation(
        located(rotate_layers("q", "k")), ("gpt2", "llama", "bloom"), "noise"
    ),
    "key noise on queries": Mutation(
        scores_function("expand_factors", keys_for_queries), ("gpt2", "llama", "opt"), K_NOISE
    ),
    "v is k": Mutation(
        each_layer(lambda sites: replace(sites, v=sites.k)),
        ("opt", "opt-sdpa", "t5", "bert"),
        Z,
        half="opt-sdpa",
    ),
    "q twice, k never": Mutation(twice_for_missing, ("gpt2", "llama", "opt"), "fires once"),
    # the tap
    "tap one attention late": Mutation(
        lag, ("opt", "opt-sdpa", "ours-sdpa", "t5", "bert"), NOISE + "|^shape of"
    ),
    "tap mixes batch and heads": Mutation(
        mix_batch_and_heads, ("opt", "opt-sdpa", "ours-sdpa", "bert"), SEEN + "|" + NOISE + "|" + Z
    ),
    "scale argument ignored": Mutation(tapped_by(scale=None), ("t5-sdpa",), Z),
}

CASES = [
    (name, kind, dtype)
    for name, mutation in MUTATIONS.items()
    for kind in mutation.kinds
    for dtype in DTYPES
    if dtype == "float32" or kind == (mutation.half or mutation.kinds[0])
]


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_a_mistake_is_caught(name: str, kind: str, dtype: str, monkeypatch: Patch) -> None:
    model, mutation = model_of(kind, dtype), MUTATIONS[name]
    mutation.apply(monkeypatch)
    with pytest.raises(UnsupportedModelError) as caught:
        judged(model)
    assert re.search(mutation.check, caught.value.check), caught.value


def test_every_model_is_broken_somehow() -> None:
    assert {kind for mutation in MUTATIONS.values() for kind in mutation.kinds} == set(MODELS)


def test_every_model_has_what_is_broken_on_it() -> None:
    """A bias dropped where there is none would be no mistake."""
    sites = {kind: judged(model_of(kind, "float32")) for kind in MODELS}

    def those(has: Callable[[LayerSites], Any]) -> set[str]:
        return {kind for kind, layers in sites.items() if any(has(layer) for layer in layers)}

    assert those(lambda s: s.has_bias) == {"bloom", "t5", "t5-sdpa"}
    assert those(lambda s: s.soft_cap) == {"gemma2"}
    assert those(lambda s: s.sink) == {"gpt-oss"}
    assert those(lambda s: s.tapped) == {"opt", "opt-sdpa", "ours-sdpa", "t5", "t5-sdpa", "bert"}
    shared = {"llama", "qwen3", "gemma2", "olmo2", "gpt-oss", "ours-sdpa"}
    assert those(lambda s: s.n_kv_heads < s.n_heads) == shared
    assert those(lambda s: s.q.shield == "removed") == {"qwen3", "ours-sdpa"}
    assert those(lambda s: s.q.shield == "mixed") == {"olmo2"}


@pytest.mark.parametrize("kind", ["opt", "bert"])
def test_wrong_hooks_of_a_tapped_layer_are_not_used(kind: str, monkeypatch: Patch) -> None:
    """The scores are read without them, so the probe's numbers stand; noise there is refused."""
    model, ids = model_of(kind, "float32"), models.tokens(2, 12)
    before = collapse_probe(model, ids, progress=False, sigmas=[0.3], draws=0, sparse=0.8)
    each_layer(lambda sites: replace(sites, q=sites.k, k=sites.q))(monkeypatch)
    assert not any(s.vector(r).dot.hooked for s in judged(model) for r in ("q", "k"))
    after = collapse_probe(model, ids, progress=False, sigmas=[0.3], draws=0, sparse=0.8)
    assert before.n_sparse > 10
    assert (before.rows == after.rows).all()
    assert (before.loose == after.loose).all()
    for role in ("q", "k"):
        with pytest.raises(UnsupportedModelError, match=f"noise on {role}"):
            NormNoise(sigma=0.1, on=role).hooks(model)
    selfcheck.remembered.pop(model, None)


def test_heads_taken_for_positions_are_caught(monkeypatch: Patch) -> None:
    """As many tokens as heads: no shape tells the axes apart, the noise does."""
    model, find = model_of("gpt2", "float32"), vars(selfcheck)["locate"]
    monkeypatch.setattr(selfcheck, "beginning", lambda prompts, avoid: prompts)
    four = models.tokens(1, 4)
    assert all(layer.bare for layer in judged(model, four)), "products have their axes in order"
    longer = ModelInput(models.tokens(1, 5).expand(2, -1))
    monkeypatch.setattr(selfcheck, "locate", lambda model, given: find(model, longer))
    judged(model, four)
    each_layer(swap_heads_and_positions)(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=NOISE):
        judged(model, four)


HARMLESS: dict[str, tuple[Callable[[Patch], None], str]] = {
    # a rotation leaves lengths alone
    "noise before the rotary": (each_layer(at_projection), "llama"),
    "a bias of zero": (
        measured("measure_bias", lambda f: lambda *args: replace(f(*args), has_bias=True)),
        "llama",
    ),
    "a soft cap far above the scores": (
        each_layer(lambda sites: replace(sites, soft_cap=1e6)),
        "gpt2",
    ),
    "a sink far below the scores": (
        measured("measure_sink", lambda f: lambda self, clean, p: (-1e3,) * p.shape[1]),
        "gpt2",
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_not_refused(name: str, monkeypatch: Patch) -> None:
    apply, kind = HARMLESS[name]
    model = model_of(kind, "float32")
    apply(monkeypatch)
    assert len(judged(model)) == 2
