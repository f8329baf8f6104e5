"""One pass over prompts that shows each attention layer once: scores, pattern, vectors, stream.

For measurements that need more of a layer than its scores, on any supported model. Nothing outlives
a layer: the caller reduces what it wants to keep in ``on_layer``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooks.errors import UnsupportedModelError
from hooks.model import (
    AttentionTap,
    Finished,
    HookedModel,
    Prompts,
    Role,
    Taken,
    evaluating,
    hooked,
)
from hooks.sites.scores import ScoreParts, recheck, split, visible
from hooks.sites.types import LayerSites

Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class LayerView:
    """One attention layer of one batch of prompts of one length.

    Attributes:
        index: the layer's index among those watched.
        sites: its hook points.
        prompts: indices of the batch's prompts.
        scores: what goes into the softmax, float32 or wider.
        pattern: its softmax.
        vectors: those of q, k, v that were requested, as they enter the dot product (v: as they are
            averaged), ``[batch, pos, head, d_head]``.
        stream: the residual stream at the block's input, if requested.
    """

    index: int
    sites: LayerSites
    prompts: Sequence[int]
    scores: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]
    vectors: dict[Role, Float[Tensor, "batch _ _ d"]]
    stream: Float[Tensor, "batch pos d_model"] | None

    @cached_property
    def visible(self) -> Bool[Tensor, "batch head query key"]:
        """True where the key is not masked."""
        return visible(self.scores)

    @cached_property
    def parts(self) -> ScoreParts:
        """The scores split into parts; where a bias is added, q and k must have been requested."""
        q, k = (self.vectors.get(role) for role in ("q", "k"))
        wide = self.scores.dtype
        q, k = (None if x is None else x.to(wide) for x in (q, k))
        return split(self.sites, self.scores, q, k)


def observe(
    model: HookedModel,
    layers: Sequence[LayerSites],
    prompts: Prompts,
    on_layer: Callable[[LayerView], None],
    *,
    vectors: Collection[Role] = (),
    stream: bool = False,
    hooks: Sequence[Hook] = (),
    beside: bool = False,
    batch_size: int = 8,
    progress: bool | None = False,
    what: str = "prompts",
) -> None:
    """Run the prompts once; show each of these layers to ``on_layer`` while it exists.

    The pass ends after the last of them.

    Args:
        model: the model; left as found, run in eval mode and without gradients.
        layers: of `attention_sites`.
        prompts: of `encode`.
        on_layer: called for each layer and batch.
        vectors: which of q, k and v to show.
        stream: show the block's input too.
        hooks: further hooks, for interventions: they run first.
        beside: show layers even where they have keys beside those of their own tokens.
        batch_size: prompts per pass; only prompts of one length share one.
        progress: show a progress bar; None: in a terminal or a notebook.
        what: title of the progress bar.

    Raises:
        UnsupportedModelError: a stream that the model has no hook for; keys beside the tokens'.
    """
    with (
        evaluating(model),
        tqdm(
            total=len(prompts),
            desc=what,
            unit="prompt",
            disable=None if progress is None else not progress,
            leave=False,
        ) as bar,
    ):
        for indices, given in prompts.batches(batch_size):
            tap = AttentionTap() if any(s.tapped for s in layers) else None
            watch = _Watch(layers, indices, on_layer, tuple(vectors), stream, tap, beside)
            entries = [*hooks, *watch.hooks(model)]
            with (
                contextlib.suppress(Finished),
                tap or contextlib.nullcontext(),
                hooked(model, entries),
            ):
                given.run(model)
            bar.update(len(indices))


class _Watch:
    """Hooks of one forward pass."""

    def __init__(
        self,
        layers: Sequence[LayerSites],
        indices: Sequence[int],
        on_layer: Callable[[LayerView], None],
        vectors: tuple[Role, ...],
        stream: bool,
        tap: AttentionTap | None,
        beside: bool,
    ) -> None:
        self.beside = beside
        self.layers = layers
        self.indices = indices
        self.on_layer = on_layer
        self.vectors = vectors
        self.stream = stream
        self.tap = tap

    def hooks(self, model: HookedModel) -> list[Hook]:
        entries: list[Hook] = []
        for index, sites in enumerate(self.layers):
            entries += self._of_layer(model, index, sites)
        return entries

    def _of_layer(self, model: HookedModel, index: int, sites: LayerSites) -> list[Hook]:
        kept: dict[str, Tensor] = {}
        entries: list[Hook] = []
        roles: set[Role] = {*self.vectors}
        if sites.has_bias:
            roles |= {"q", "k"}
        if not sites.bare:
            entries += [(sites.vector(r).dot.hook, _keep(kept, r)) for r in sorted(roles)]
        if self.stream:
            entries.append((stream_hook(model, sites), _keep(kept, "stream")))

        def show(scores: Tensor, pattern: Tensor, taken: Taken | None = None) -> None:
            if not self.beside:
                _refuse_keys_beside(sites, scores)
            if self.stream:
                refuse_several_streams(kept["stream"], sites)
            wide = torch.promote_types(scores.dtype, torch.float32)
            if taken is not None:
                vectors = {r: x for r, x in taken.vectors(sites.kv_leaders).items() if r in roles}
            else:
                vectors = {r: sites.vector(r).dot.by_position(kept.pop(r)) for r in sorted(roles)}
            view = LayerView(
                index=index,
                sites=sites,
                prompts=self.indices,
                scores=scores.to(wide),
                pattern=pattern.to(wide),
                vectors=vectors,
                stream=kept.pop("stream", None),
            )
            self.on_layer(view)
            if index == len(self.layers) - 1:
                raise Finished

        def at_pattern(pattern: Tensor, hook: Any) -> None:
            scores = kept.pop("scores")
            recheck(sites, scores, pattern)
            show(scores, pattern)

        def at_z(z: Tensor, hook: Any) -> None:
            assert self.tap is not None
            taken = self.tap.take(z.shape[0])
            if taken is None:  # the self-check saw it happen
                raise RuntimeError(f"layer {sites.layer}: no softmax was seen before {hook.name}")
            show(taken.scores, taken.pattern)

        def at_anchor(tensor: Tensor, hook: Any) -> None:
            assert self.tap is not None
            self.tap.expect(sites, tensor, show=lambda t: show(t.scores, t.pattern, t))

        if sites.bare:
            assert sites.anchor is not None
            return [*entries, (sites.anchor.hook, at_anchor)]
        if sites.tapped:
            assert sites.z is not None
            return [*entries, (sites.z.hook, at_z)]
        return [*entries, (sites.scores, _keep(kept, "scores")), (sites.pattern, at_pattern)]


def _refuse_keys_beside(sites: LayerSites, scores: Tensor) -> None:
    """Refuse keys that are not tokens of the sequence: an encoder's, or compressed ones."""
    n_query, n_key = scores.shape[-2:]
    if sites.sequence("q") == sites.sequence("k") and n_key > n_query:
        raise UnsupportedModelError(
            "keys of the attention",
            wanted=f"one for each of {n_query} tokens",
            got=f"{n_key - n_query} more in {sites.label} (leave it out with layers=)",
            layer=sites.layer,
        )


def _keep(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook_fn(tensor: Tensor, hook: Any) -> None:
        kept[name] = tensor

    return hook_fn


def refuse_several_streams(stream: Tensor, sites: LayerSites) -> None:
    """Refuse a block with several parallel streams (hyper-connections)."""
    if stream.ndim != 3:
        raise UnsupportedModelError(
            "the residual stream",
            wanted="one, [batch, pos, d_model]",
            got=f"{list(stream.shape)}",
            layer=sites.layer,
        )


def stream_hook(model: HookedModel, sites: LayerSites) -> str:
    """Name of the hook with the residual stream at the input of a layer's block.

    Raises:
        UnsupportedModelError: the model has no hook of that name.
    """
    block = sites.block
    for name in (f"{block}.hook_in", f"{block}.hook_resid_pre"):
        if name in model.hook_dict:
            return name
    raise UnsupportedModelError(
        "the residual stream",
        wanted=f"a hook {block}.hook_in or {block}.hook_resid_pre",
        got="neither",
        layer=sites.layer,
    )
