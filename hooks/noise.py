"""NormNoise: multiplicative noise on the L2 norms of q, k and v, as TransformerLens hooks.

x -> (1 + kappa) x for each query, key or value vector x, kappa with mean 0 and RMS sigma. Source:
Menary et al. 2024, Sec. "noise on the L2 norms", Fig. 2 and 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks import _state
from hooks._inputs import has_decoder, real_spans
from hooks._threads import intervening
from hooks.errors import UnsupportedModelError
from hooks.laws import check_sigma, get_law
from hooks.scores import expand_factors, split
from hooks.selfcheck import attention_sites
from hooks.sites import ROLES, HookedModel, LayerSites, Role, Site, Stream

Shared = Literal["none", "heads", "kv", "token"]
At = Literal["dot", "projection"]
Rows = Literal["all", "sparse", "non-sparse"]
HookList = list[tuple[str, Callable[..., Any]]]

SPARSE = 0.95
"""A row is sparse where max_t a_t >= 0.95 (Menary et al. 2024)."""
NON_SPARSE = 0.70
"""A row is non-sparse where max_t a_t < 0.70 (Menary et al. 2024)."""

# What a factor's stream is keyed by when it is shared: one stream for several sites.
_STREAM = {"q": 0, "k": 1, "v": 2}
_SHARED_KV_STREAM = 3
_WORDS_PER_BLOCK = 4  # Philox gives its numbers in blocks of four


@dataclass(frozen=True, kw_only=True)
class NormNoise:
    """Multiplicative noise on L2 norms: x -> (1 + kappa) x.

    The factor is a pure function of (seed, draw, layer, site, prompt index, position counted from
    the first real token, head), whatever the batch size, padding, device, or what else is noised.
    Every forward pass under one context repeats it; another ``draw`` is another sample.

    Args:
        sigma: RMS of the relative change kappa.
        on: which vectors, any of ``"q"``, ``"k"``, ``"v"`` (for example ``"qk"``).
        law: ``"uniform"`` (the paper's; half-width sqrt(3) sigma), ``"gaussian"`` or
            ``"lognormal"`` (see :mod:`hooks.laws`).
        shared: which vectors share a factor: ``"none"`` (every vector its own, as in the paper),
            ``"heads"`` (one for all heads of a token, q, k and v apart), ``"kv"`` (one for k and v
            of a head), ``"token"`` (one for all heads and for k and v of a token, which is what
            Pre-Norm's common length really does; q, the receiver, has its own).
        at: ``"dot"``, the vectors that enter the dot product (v: that are averaged), or
            ``"projection"``, the projection's output. Where a norm stands between them, it removes
            the second in part or whole: a warning says so.
        rows: ``"all"``, or only ``"sparse"`` (max a >= 0.95) or ``"non-sparse"`` (max a < 0.70)
            rows as in the paper's Fig. 2 right, judged by the layer's un-noised scores in the
            running pass and applied to the q.k part of those rows' scores; q and k only.
        layers: block indices; None for every attention layer.
        seed, draw: name the sample.

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

    def __post_init__(self) -> None:
        check_sigma(self.sigma, get_law(self.law))
        if not self.on or set(self.on) - set(ROLES) or len(set(self.on)) != len(self.on):
            raise ValueError(f"on: wanted some of 'q', 'k', 'v', each once; got {self.on!r}")
        for name, value, known in (
            ("shared", self.shared, ("none", "heads", "kv", "token")),
            ("at", self.at, ("dot", "projection")),
            ("rows", self.rows, ("all", "sparse", "non-sparse")),
        ):
            if value not in known:
                raise ValueError(f"{name}: wanted one of {list(known)}; got {value!r}")
        for name, number in (("seed", self.seed), ("draw", self.draw)):
            if number < 0:
                raise ValueError(f"{name}: wanted an integer >= 0; got {number}")
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers(self.layers))
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
        """The numbers in (0, 1) behind the factors of one prompt, from position ``start``.

        A counter-based generator (Philox) is keyed by (seed, draw, layer, site, prompt) and set to
        the position: any part of the sequence can be drawn alone.
        """
        together = self.shared in ("kv", "token") and role in ("k", "v")
        stream = _SHARED_KV_STREAM if together else _STREAM[role]
        width = 1 if self.shared in ("heads", "token") else n_heads
        entropy = (self.seed, self.draw, layer, stream, prompt)
        key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
        blocks = -(-width // _WORDS_PER_BLOCK)
        bits = np.random.Philox(key=key, counter=start * blocks)
        drawn = np.random.Generator(bits).random((n_pos, blocks * _WORDS_PER_BLOCK))[:, :width]
        open_interval = np.maximum(drawn, 2.0**-54)
        return np.broadcast_to(open_interval, (n_pos, n_heads))

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
        """1 + kappa of each vector, float32, on the CPU.

        Args:
            layer: block index.
            role: ``"q"``, ``"k"`` or ``"v"``.
            n_heads: heads at that site (key/value heads for k and v).
            prompts: index of each prompt.
            n_pos: number of positions.
            start: position of the first, counted from each prompt's first real token; padding
                before it (a negative position) is left alone.
        """
        starts = [start] * len(prompts) if isinstance(start, int) else list(start)
        out = torch.ones(len(prompts), n_pos, n_heads, dtype=torch.float32)
        if self.sigma == 0:
            return out
        law = get_law(self.law)
        for i, (prompt, first) in enumerate(zip(prompts, starts, strict=True)):
            padding = min(max(-first, 0), n_pos)
            u = self.uniforms(
                layer=layer,
                role=role,
                prompt=prompt,
                start=max(first, 0),
                n_pos=n_pos - padding,
                n_heads=n_heads,
            )
            out[i, padding:] = law.factor(torch.tensor(u), self.sigma).float()
        return out

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
            decoder_attention_mask: the same for the decoder's tokens of an encoder-decoder, where
                ``attention_mask`` is of the encoder's.

        Raises:
            UnsupportedModelError: the self-check failed, or noise on v where what it does could not
                be verified.
            ValueError: unknown layer, active dropout, a mask with gaps, or rows-only noise on a
                model whose scores can't be edited.

        These hooks take every forward pass for a whole sequence; for ``generate`` with a cache use
        :meth:`applied` (a cached step under these hooks raises).
        """
        masks = _masks(model, attention_mask, decoder_attention_mask)
        return self._hooks(model, _Clock(first_prompt, masks))

    @contextmanager
    def applied(
        self,
        model: HookedModel,
        *,
        first_prompt: int = 0,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        decoder_attention_mask: Int[Tensor, "batch decoder_pos"] | None = None,
    ) -> Iterator[NormNoise]:
        """The same as a context manager; inside ``generate`` each token keeps its factor.

        Arguments and errors as :meth:`hooks`. The hooks that were on the model stay.
        """
        clock = _Clock(first_prompt, _masks(model, attention_mask, decoder_attention_mask))
        inner = getattr(model, "original_model", None)
        handle = None
        with intervening(model, self._hooks(model, clock)):
            if inner is not None:
                handle = inner.register_forward_pre_hook(clock.read_cache, with_kwargs=True)
                clock.follows = True
            else:
                clock.advice = (
                    "Pass use_past_kv_cache=False to generate: this model hides its cache"
                )
            try:
                yield self
            finally:
                if handle is not None:
                    handle.remove()

    def _hooks(self, model: HookedModel, clock: _Clock) -> HookList:
        sites = attention_sites(model)
        dropout = _state.active_dropout(model)
        if dropout:
            raise ValueError(
                f"noise would mix with active dropout: wanted model.eval(); got {dropout} in "
                "training mode"
            )
        chosen = self.layers if self.layers is not None else [s.layer for s in sites]
        entries: HookList = []
        layers = [sites.layer(layer) for layer in chosen]
        for layer in layers:
            entries += self._layer_hooks(layer, clock)
        shown = [s for s in layers if not s.tapped and s.sequence("k") == "target"]
        if shown:
            clock.guarded = True
            entries.append((shown[0].pattern, clock.guard))
        self._tell_shields(layers)
        return [(name, _state.resting(hook_fn)) for name, hook_fn in entries]

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

    def _layer_hooks(self, sites: LayerSites, clock: _Clock) -> HookList:
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
        for role in self.roles:
            vector = sites.vector(role)
            site = vector.dot if self.at == "dot" else vector.projection
            if not site.hooked:
                raise UnsupportedModelError(
                    f"noise on {role}",
                    wanted="a hook point where it enters the dot product",
                    got="none of TransformerLens's; collapse_probe needs none",
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
        self, sites: LayerSites, role: Role, site: Site, clock: _Clock
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

    def _row_hooks(self, sites: LayerSites, clock: _Clock) -> HookList:
        if not sites.scores_editable:
            got = f"{sites.scores}, whose do not" if sites.scores else "no hook with scores"
            raise ValueError(
                f"rows={self.rows!r}: layer {sites.layer}: wanted scores whose edits change the "
                f"pattern; got {got}"
            )
        kept: dict[str, Tensor] = {}

        def keep(role: Role) -> Callable[..., None]:
            def hook_fn(tensor: Tensor, hook: Any) -> None:
                kept[role] = sites.vector(role).dot.by_position(tensor)

            return hook_fn

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
            parts = split(
                sites, scores, kept.pop("q", None), kept.pop("k", None), dtype=_wide(scores)
            )
            spans = {"q": (n_query, clock.cached), "k": (n_key, 0)}  # (length, first position)
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
            entries += [(sites.vector(r).dot.hook, keep(r)) for r in ("q", "k")]
        entries.append((sites.scores, scale_rows))
        return entries


def check_layers(layers: Any) -> tuple[int, ...]:
    """Layer indices as a tuple of ints.

    Raises:
        ValueError: none, one twice, or something that is no integer.
    """
    given = list(layers) if isinstance(layers, Iterable) else [layers]
    integers = all(isinstance(x, Integral) and not isinstance(x, bool) for x in given)
    if not given or not integers or len(set(given)) != len(given) or isinstance(layers, Integral):
        raise ValueError(f"layers: wanted one or more indices in a list, each once; got {layers!r}")
    return tuple(int(x) for x in given)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _masks(
    model: HookedModel, mask: Tensor | None, decoder_mask: Tensor | None
) -> dict[Stream, Tensor]:
    """Attention masks by the sequence they belong to."""
    if decoder_mask is not None and not has_decoder(model):
        raise ValueError(
            "decoder_attention_mask: wanted an encoder-decoder model; got "
            f"{type(model).__name__} without a decoder of its own"
        )
    of_mask: Stream = "source" if has_decoder(model) else "target"
    given: dict[Stream, Any] = {"target": decoder_mask, of_mask: mask}
    masks = {s: torch.as_tensor(given[s]) for s in given if given[s] is not None}
    for tensor in masks.values():
        if tensor.ndim != 2:
            raise ValueError(f"attention_mask: wanted shape [batch, pos]; got {list(tensor.shape)}")
    return masks


class _Clock:
    """Which prompts and positions the running forward pass holds."""

    def __init__(self, first_prompt: int, masks: Mapping[Stream, Tensor]) -> None:
        if first_prompt < 0:
            raise ValueError(f"first_prompt: wanted an integer >= 0; got {first_prompt}")
        self.first_prompt = first_prompt
        self.cached = 0
        self.new: int | None = None
        self.follows = False  # whether it is told what the cache holds
        self.known = False  # whether it was told so in this pass
        self.guarded = False  # whether a pattern will show that there is a cache
        self.advice = "Use NormNoise.applied(model) around generate"
        self.width = {stream: int(mask.shape[1]) for stream, mask in masks.items()}
        self.padding = {
            stream: [first for first, _ in real_spans(mask)] for stream, mask in masks.items()
        }

    def prompts(self, batch: int) -> range:
        for padding in self.padding.values():
            if len(padding) != batch:
                raise ValueError(
                    f"attention_mask: wanted one row for each of {batch} prompts; got "
                    f"{len(padding)}"
                )
        return range(self.first_prompt, self.first_prompt + batch)

    def drawn(
        self, noise: NormNoise, sites: LayerSites, role: Role, site: Site, shape: tuple[int, ...]
    ) -> Float[Tensor, "batch pos head"]:
        """Factors of one site; ``shape`` is (batch, positions, index of the first of them)."""
        batch, n_pos, first = shape
        padding = self.padding.get(sites.sequence(role), [0] * batch)
        return noise.factors(
            layer=sites.layer,
            role=role,
            n_heads=site.n_heads,
            prompts=self.prompts(batch),
            n_pos=n_pos,
            start=[first - before for before in padding],
        )

    def check_width(self, n_pos: int, stream: Stream) -> None:
        """Refuse a mask of another length than the sequence that it is said to be of."""
        width = self.width.get(stream, n_pos)
        if self.cached == 0 and n_pos != width:
            raise ValueError(
                f"attention_mask: wanted an entry for each of {n_pos} positions; got {width}"
            )

    def check_new(self, n_pos: int, name: str) -> None:
        """Refuse a hook that also carries cached vectors: they would be scaled again."""
        if self.new is not None and n_pos != self.new:
            raise ValueError(
                f"noise on a cached step: wanted the {self.new} new positions at {name}; got "
                f"{n_pos}"
            )
        if not self.follows and not self.guarded and n_pos == 1:
            raise ValueError(
                f"noise on one position at {name}, as in a cached step: wanted a whole sequence. "
                f"{self.advice}"
            )

    def read_cache(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = kwargs.get("layer_past")
        length = getattr(cache, "get_seq_length", None)
        if cache is not None and not callable(length):
            raise ValueError(
                "noise on a cached step: wanted a cache that says how many positions it holds "
                f"(get_seq_length); got {type(cache).__name__}"
            )
        self.known = cache is not None
        self.cached = 0 if cache is None else int(length())  # type: ignore[misc]
        tokens = kwargs.get("decoder_input_ids")
        if tokens is None:
            tokens = kwargs.get("input_ids", args[0] if args else None)
        self.new = int(tokens.shape[1]) if isinstance(tokens, Tensor) else None

    def guard(self, matrix: Tensor, hook: Any) -> None:
        """Refuse a cached step whose position is not known: its factors would be wrong."""
        n_query, n_key = matrix.shape[-2:]
        # A sliding window keeps fewer than it has seen, a static cache has room for more.
        if n_key != n_query + self.cached and not self.known:
            raise ValueError(
                f"noise on a cached step: wanted {self.cached} cached positions; got "
                f"{n_key - n_query}. {self.advice}"
            )
