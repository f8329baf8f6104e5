"""NormNoise: multiplicative noise on the L2 norms of q, k and v, as TransformerLens hooks.

x -> (1 + kappa) x for each query, key or value vector x, kappa with mean 0 and RMS sigma. Source:
Menary et al. 2024, Sec. "noise on the L2 norms", Fig. 2 and 3.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.arguments import (
    SEEDS,
    brief,
    check_choice,
    check_integers,
    check_layers,
    plain,
    read_list,
)
from hooks.errors import UnsupportedModelError
from hooks.model import (
    ROLES,
    AttentionTap,
    HookedModel,
    Role,
    active_dropout,
    intervening,
    on_cpu,
    paused_in_checks,
)
from hooks.noise.cache_check import HookList, cached_steps
from hooks.noise.clock import Clock, read_masks
from hooks.noise.heads import check_heads, read_heads, spare_others
from hooks.noise.laws import LAWS, check_sigma, get_law
from hooks.noise.writing import Writer
from hooks.sites import (
    AttentionSites,
    LayerSites,
    Site,
    attention_sites,
    choose_layers,
    expand_factors,
    split,
)

Shared = Literal["none", "heads", "kv", "token"]
At = Literal["dot", "projection"]
Rows = Literal["all", "sparse", "non-sparse"]

SPARSE = 0.95
"""A row is sparse where max_t a_t >= 0.95 (Menary et al. 2024)."""
NON_SPARSE = 0.70
"""A row is non-sparse where max_t a_t < 0.70 (Menary et al. 2024)."""

# What a factor's stream is keyed by when it is shared: one stream for several sites.
STREAM = {"q": 0, "k": 1, "v": 2}
SHARED_KV_STREAM = 3
_FAR = 1 << 62
WORDS_PER_BLOCK = 4  # Philox gives its numbers in blocks of four


@dataclass(frozen=True, kw_only=True)
class NormNoise:
    """Multiplicative noise on L2 norms: x -> (1 + kappa) x.

    The factor is a pure function of (seed, draw, layer, site, prompt index, position counted from
    the first real token, head), whatever the batch size, padding or device, and whatever else is
    noised. Every forward pass in one context repeats it; another ``draw`` is another sample.

    Args:
        sigma: RMS of the relative change kappa.
        on: which vectors, any of ``"q"``, ``"k"``, ``"v"`` (for example ``"qk"``).
        law: ``"uniform"`` (the paper's; half-width sqrt(3) sigma), ``"gaussian"`` or
            ``"lognormal"`` (see :mod:`hooks.noise.laws`).
        shared: which vectors share a factor: ``"none"`` (every vector its own, as in the paper),
            ``"heads"`` (one for all heads of a token, q, k and v apart), ``"kv"`` (one for k and v
            of a head), ``"token"`` (one for all heads and for k and v of a token, which is what
            Pre-Norm's common length really does; q, the receiver, has its own).
        at: ``"dot"``, the vectors that enter the dot product (v: that are averaged), or
            ``"projection"``, the projection's output. Where a norm lies between them, it removes
            noise at the projection in part or whole: a warning says so.
        rows: ``"all"``, or only ``"sparse"`` (max a >= 0.95) or ``"non-sparse"`` (max a < 0.70)
            rows as in the paper's Fig. 2 right, judged by the layer's un-noised scores in the
            running pass and applied to the q.k part of those rows' scores; q and k only.
        layers: block indices; None for every attention layer.
        heads: pairs (layer, head) in place of ``layers``; None for every head. Heads are counted
            as queries; of k and v it is the head that such a query head reads, which other query
            heads may read too (grouped keys).
        seed, draw: identify the sample.

    Raises:
        ValueError: a sigma the law can't have, an unknown name, ``rows`` with v or at the
            projection.

    Example:
        >>> noise = NormNoise(sigma=0.05, on="k")
        >>> with noise.applied(model):          # doctest: +SKIP
        ...     logits = model(tokens)
    """

    sigma: float
    on: str = "qkv"
    law: str = "uniform"
    shared: Shared = "none"
    at: At = "dot"
    rows: Rows = "all"
    layers: tuple[int, ...] | None = None
    seed: int = 0
    draw: int = 0
    heads: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        known = (("shared", Shared), ("at", At), ("rows", Rows))
        seed, draw = check_integers(seed=(self.seed, 0, SEEDS), draw=(self.draw, 0, SEEDS))
        read: dict[str, Any] = {
            "law": check_choice("law", self.law, sorted(LAWS)),
            "on": _roles(self.on),
            **{n: check_choice(n, getattr(self, n), get_args(kind)) for n, kind in known},
            "seed": seed,
            "draw": draw,
            "layers": None if self.layers is None else check_layers(self.layers),
        }
        read["sigma"] = check_sigma(self.sigma, LAWS[read["law"]])
        if self.heads is not None:
            if self.layers is not None:
                raise ValueError("heads: wanted None beside layers; got both")
            read["heads"] = read_heads(self.heads)
        for name, value in read.items():
            object.__setattr__(self, name, value)
        if self.rows != "all" and ("v" in self.on or self.at != "dot"):
            raise ValueError(
                "rows: noise on some rows only acts on their scores: wanted on='q', 'k' or 'qk' "
                f"and at='dot'; got on={self.on!r}, at={self.at!r}"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        """The noised vectors, in the order q, k, v."""
        return tuple(role for role in ROLES if role in self.on)

    # -- factors ----------------------------------------------------------------------------

    def uniforms(
        self, *, layer: int, role: Role, prompt: int, start: int, n_pos: int, n_heads: int
    ) -> Float[np.ndarray, "pos head"]:
        """The numbers in (0, 1) from which one prompt's factors are made, from position ``start``.

        A counter-based generator (Philox) is keyed by (seed, draw, layer, site, prompt) and set to
        the position: any part of the sequence can be drawn alone.
        """
        check_choice("role", role, ROLES)
        layer, prompt, start, n_pos, n_heads = check_integers(
            layer=(layer, 0),
            prompt=(prompt, 0),
            start=(start, 0),
            n_pos=(n_pos, 0),
            n_heads=(n_heads, 1),
        )
        return self._uniforms(
            layer=layer, role=role, prompt=prompt, start=start, n_pos=n_pos, n_heads=n_heads
        )

    def _uniforms(
        self, *, layer: int, role: Role, prompt: int, start: int, n_pos: int, n_heads: int
    ) -> Float[np.ndarray, "pos head"]:
        """:meth:`uniforms` without checks of its arguments: a probe draws hundreds of rows."""
        together = self.shared in ("kv", "token") and role in ("k", "v")
        stream = SHARED_KV_STREAM if together else STREAM[role]
        width = 1 if self.shared in ("heads", "token") else n_heads
        entropy = (self.seed, self.draw, layer, stream, prompt)
        key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
        blocks = -(-width // WORDS_PER_BLOCK)
        bits = np.random.Philox(key=key, counter=start * blocks)
        drawn = np.random.Generator(bits).random((n_pos, blocks * WORDS_PER_BLOCK))[:, :width]
        open_interval = np.maximum(drawn, 2.0**-54)
        return np.broadcast_to(open_interval, (n_pos, n_heads))

    @on_cpu()
    def factors(
        self,
        *,
        layer: int,
        role: Role,
        n_heads: int,
        prompts: Sequence[int],
        n_pos: int,
        start: Sequence[int] | int = 0,
    ) -> Float[Tensor, "prompt pos head"]:
        """1 + kappa of each vector, float32, on the CPU; of every head, whatever ``heads`` says.

        Args:
            layer: block index.
            role: ``"q"``, ``"k"`` or ``"v"``.
            n_heads: heads at that site (key/value heads for k and v).
            prompts: index of each prompt.
            n_pos: number of positions.
            start: position of the first, counted from each prompt's first real token; padding
                before it (a negative position) is left alone.
        """
        check_choice("role", role, ROLES)
        layer, n_pos, n_heads = check_integers(
            layer=(layer, 0), n_pos=(n_pos, 0), n_heads=(n_heads, 1)
        )
        given = read_list("prompts", prompts, "a list of indices")
        prompts = [check_integers(prompts=(p, 0))[0] for p in given]
        starts = _starts(start, len(prompts))
        out = torch.ones(len(prompts), n_pos, n_heads, dtype=torch.float32)
        if self.sigma == 0:
            return out
        law = get_law(self.law)
        for i, (prompt, first) in enumerate(zip(prompts, starts, strict=True)):
            padding = min(max(-first, 0), n_pos)
            u = self._uniforms(
                layer=layer,
                role=role,
                prompt=prompt,
                start=max(first, 0),
                n_pos=n_pos - padding,
                n_heads=n_heads,
            )
            out[i, padding:] = law.factor(torch.tensor(u), self.sigma).float()
        return out

    def in_heads(
        self, factors: Float[Tensor, "batch pos head"], sites: LayerSites, role: Role
    ) -> Float[Tensor, "batch pos head"]:
        """These factors, and 1 in heads that have no noise."""
        return factors if self.heads is None else spare_others(factors, self.heads, sites, role)

    # -- hooks ------------------------------------------------------------------------------

    def hooks(
        self,
        model: HookedModel,
        *,
        first_prompt: int = 0,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        decoder_attention_mask: Int[Tensor, "batch decoder_pos"] | None = None,
    ) -> HookList:
        """TransformerLens hooks for ``model.run_with_hooks(tokens, fwd_hooks=...)``.

        Args:
            model: the model; its self-check runs first.
            first_prompt: index of the first prompt of the batch, so that batches of a corpus
                continue each other's noise.
            attention_mask: 1 for real tokens, where the batch is padded: positions count from each
                prompt's first real token. Without it no token is padding.
            decoder_attention_mask: the mask of an encoder-decoder's decoder tokens;
                ``attention_mask`` is then the encoder's.

        Raises:
            UnsupportedModelError: the self-check failed, or noise on v whose effect could not be
                verified.
            ValueError: unknown layer, active dropout, a mask with gaps, or rows-only noise on a
                model whose scores can't be edited.

        These hooks take every forward pass for a whole sequence; for ``generate`` with a cache use
        :meth:`applied` (a cached step under these hooks raises). Use it too for a model whose hooks
        do not carry the vectors: only a context can write where they are multiplied.
        """
        masks = read_masks(model, attention_mask, decoder_attention_mask)
        return self._hooks(model, attention_sites(model), Clock(first_prompt, masks), None)

    @contextmanager
    def applied(
        self,
        model: HookedModel,
        *,
        first_prompt: int = 0,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        decoder_attention_mask: Int[Tensor, "batch decoder_pos"] | None = None,
    ) -> Iterator[NormNoise]:
        """A context with the noise on the model; in ``generate`` each token keeps its factor.

        Takes the arguments of :meth:`hooks` and raises its errors. Hooks already on the model stay.
        """
        clock = Clock(first_prompt, read_masks(model, attention_mask, decoder_attention_mask))
        sites = attention_sites(model)
        tap = AttentionTap()
        entries = self._hooks(model, sites, clock, tap)
        inner = getattr(model, "original_model", None)
        with ExitStack() as stack:
            stack.enter_context(intervening(model, entries))
            if inner is None:
                clock.advice = (
                    "Pass use_past_kv_cache=False to generate: this model hides its cache"
                )
            else:
                clock.steps = cached_steps(model, sites, partial(_strong, sites))
                stack.enter_context(clock.following(inner))
            if tap.needed:
                stack.enter_context(tap.of_passes(inner))
            yield self

    def _hooks(
        self, model: HookedModel, sites: AttentionSites, clock: Clock, tap: AttentionTap | None
    ) -> HookList:
        """Hooks on the model; ``tap`` writes in layers where no hook does."""
        clock.module = getattr(model, "original_model", None)
        dropout = active_dropout(model)
        if dropout:
            raise ValueError(
                f"noise would mix with active dropout: wanted model.eval(); got {dropout} in "
                "training mode"
            )
        entries: HookList = []
        of_heads = None if self.heads is None else sorted({layer for layer, _ in self.heads})
        layers = list(choose_layers(sites, self.layers if of_heads is None else of_heads))
        check_heads(self.heads or (), layers)
        writer = None if tap is None else Writer(self, clock, tap)
        for layer in layers:
            entries += self._layer_hooks(layer, clock, writer)
        shown = [s for s in layers if not s.tapped and s.sequence("k") == "target"]
        if shown:
            clock.guarded = True
            entries.append((shown[0].pattern, clock.guard))
        self._tell_shields(layers)
        says = f"{self!r}, prompts from {clock.first_prompt}, padding {clock.padding or 'none'}"
        return [(name, paused_in_checks(hook_fn, says)) for name, hook_fn in entries]

    def _tell_shields(self, layers: list[LayerSites]) -> None:
        if self.at != "projection":
            return
        for shield, what in (
            ("removed", "is removed by a norm over each head"),
            ("mixed", "passes a norm over all heads, which removes a part and leaks between heads"),
        ):
            roles = [r for r in self.roles if any(s.vector(r).shield == shield for s in layers)]
            if roles:
                warnings.warn(
                    f"noise at the projection of {', '.join(roles)} {what} before the dot product; "
                    "at='dot' noises the vectors that enter it",
                    stacklevel=4,
                )

    def _layer_hooks(self, sites: LayerSites, clock: Clock, writer: Writer | None) -> HookList:
        if self.rows != "all":
            return self._row_hooks(sites, clock)
        entries: HookList = []
        if "v" in self.roles and sites.averaging == "unverified":
            raise UnsupportedModelError(
                "noise on v",
                wanted="a z that is the pattern's average of v, up to a gate",
                got="another; q and k can be noised",
                layer=sites.layer,
            )
        if sites.bare and self.at == "dot" and writer is not None:
            assert sites.anchor is not None
            return [(sites.anchor.hook, writer.hook(sites))]
        for role in self.roles:
            vector = sites.vector(role)
            site = vector.dot if self.at == "dot" else vector.projection
            if role == "v" and not site.hooked and vector.shield == "none":
                site = vector.projection  # what is written there was seen to arrive
            if not site.hooked:
                at = "where it enters the attention" if self.at == "dot" else "at its projection"
                advice = "; NormNoise.applied needs none" if self.at == "dot" else ""
                raise UnsupportedModelError(
                    f"noise on {role}",
                    wanted=f"a hook point {at}",
                    got=f"none of TransformerLens's{advice}",
                    layer=sites.layer,
                )
            if site.n_heads != vector.dot.n_heads:
                raise UnsupportedModelError(
                    f"noise at the projection of {role}",
                    wanted=f"{vector.dot.n_heads} vectors at {site.hook}",
                    got=f"{site.n_heads}: it holds something else beside them",
                    layer=sites.layer,
                )
            entries.append((site.hook, self._scaling_hook(sites, role, site, clock)))
        return entries

    def _scaling_hook(
        self, sites: LayerSites, role: Role, site: Site, clock: Clock
    ) -> Callable[..., Tensor]:
        def scale_norms(tensor: Tensor, hook: Any) -> Tensor:
            n_pos, first, stream = site.n_pos(tensor), 0, sites.sequence(role)
            if stream == "target":
                clock.check_new(n_pos, site.hook)
                first = clock.cached
            clock.check_width(n_pos, stream)
            factor = clock.drawn(self, sites, role, site, (tensor.shape[0], n_pos, first))
            return site.scale(tensor, factor.to(tensor.device))

        return scale_norms

    def _row_hooks(self, sites: LayerSites, clock: Clock) -> HookList:
        if not sites.scores_editable:
            got = f"{sites.scores}, whose do not" if sites.scores else "no hook with scores"
            raise ValueError(
                f"rows={self.rows!r}: layer {sites.layer}: wanted scores whose edits change the "
                f"pattern; got {got}"
            )
        kept = threading.local()

        def keep(tensor: Tensor, hook: Any, role: Role) -> None:
            kept.__dict__[role] = sites.vector(role).dot.by_position(tensor)

        def scale_rows(scores: Tensor, hook: Any) -> Tensor:
            clock.guard(scores, hook)
            if self.sigma == 0:
                return scores
            if sites.has_bias and clock.cached:
                raise ValueError(
                    f"rows={self.rows!r} on layer {sites.layer}, which adds a bias to its scores: "
                    "wanted whole sequences; got a cached step"
                )
            n_query, n_key = scores.shape[-2:]
            q, k = (kept.__dict__.pop(role, None) for role in ("q", "k"))
            parts = split(sites, scores, q, k, dtype=_wide(scores))
            # (length, first position)
            spans = {"q": (n_query, clock.cached), "k": (n_key, clock.first_key(n_query, n_key))}
            drawn = {
                role: clock.drawn(
                    self, sites, role, sites.vector(role).dot, (scores.shape[0], *spans[role])
                ).to(scores.device)
                for role in self.roles
            }
            factor = expand_factors(sites, drawn.get("q"), drawn.get("k"))
            top = parts.pattern().amax(-1, keepdim=True)
            chosen = top >= SPARSE if self.rows == "sparse" else top < NON_SPARSE
            noisy = parts.scores(factor).to(scores.dtype)
            return torch.where(chosen & parts.mask, noisy, scores)

        entries: HookList = []
        if sites.has_bias:
            roles: tuple[Role, ...] = ("q", "k")
            entries += [(sites.vector(r).dot.hook, partial(keep, role=r)) for r in roles]
        entries.append((sites.scores, scale_rows))
        return entries


def _starts(start: Any, n: int) -> list[int]:
    """The first position of each prompt; negative in padding."""
    if isinstance(plain(start), Integral):
        return [check_integers(start=(start, -_FAR))[0]] * n
    given = read_list("start", start, f"an integer, or {n} of them in a list")
    if len(given) != n:
        raise ValueError(f"start: wanted an integer, or {n} of them in a list; got {len(given)}")
    return [check_integers(start=(first, -_FAR))[0] for first in given]


def _roles(on: Any) -> str:
    """Some of q, k and v, as a string."""
    with suppress(TypeError):
        on = str(on) if isinstance(on, str) else "".join(read_list("on", on, "some"))
    if not isinstance(on, str) or not on or set(on) - set(ROLES) or len(set(on)) != len(on):
        raise ValueError(f"on: wanted some of 'q', 'k', 'v', each once; got {brief(on)}")
    return on


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _strong(sites: AttentionSites, clock: Clock, tap: AttentionTap) -> HookList:
    """Hooks of strong noise wherever noise can be written."""
    entries: HookList = []
    for layer in sites:
        on = "qkv" if layer.averaging != "unverified" else "qk"
        noise = NormNoise(sigma=0.5, on=on, seed=1)
        with contextlib.suppress(UnsupportedModelError):
            entries += noise._layer_hooks(layer, clock, Writer(noise, clock, tap))
    return entries
