"""One pass over prompts that shows each attention layer once: scores, pattern, vectors, stream.

For measurements that need more of a layer than its scores, on any supported model. Nothing outlives
a layer: the caller reduces what it wants to keep in ``on_layer``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.arguments import (
    brief,
    check_booleans,
    check_choice,
    check_integers,
    check_kind,
    check_optional,
    check_text,
    read_list,
)
from hooks.errors import UnsupportedModelError
from hooks.model import (
    ROLES,
    AttentionTap,
    BlockCall,
    Finished,
    HookedModel,
    ModelInput,
    Prompts,
    Role,
    Taken,
    check_model,
    over_batches,
    run_with,
)
from hooks.sites.scores import ScoreParts, recheck, split, visible
from hooks.sites.types import LayerSites

Hook = tuple[str, Callable[..., Any]]
_LAYERS = "a list of layers of attention_sites"
_HOOKS = "a list of pairs, a hook's name and a function"


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
        TypeError, ValueError: a wrong argument.
    """
    check_model(model)
    layers = read_list("layers", layers, _LAYERS)
    for layer in layers:
        check_kind("layers", layer, LayerSites, _LAYERS)
    check_kind("prompts", prompts, Prompts, "what hooks.encode gives")
    roles = read_list("vectors", vectors, "some of q, k and v")
    shown = tuple(cast(Role, check_choice("vectors", role, ROLES)) for role in roles)
    stream, beside = check_booleans(stream=stream, beside=beside)
    (batch_size,) = check_integers(batch_size=(batch_size, 1))
    (progress,) = check_optional(progress=progress)
    what = check_text("what", what)
    if not callable(on_layer):
        raise TypeError(f"on_layer: wanted a function of a LayerView; got {brief(on_layer)}")
    hooks = [_check_hook(hook) for hook in read_list("hooks", hooks, _HOOKS)]
    streams = [stream_hook(model, sites) for sites in layers] if stream else []

    def measure(indices: Sequence[int], given: ModelInput) -> None:
        view_layers(model, given, layers, on_layer, indices, shown, streams, hooks, beside)

    over_batches(model, prompts, batch_size, measure, what=what, progress=progress)


def view_layers(
    model: HookedModel,
    given: ModelInput | BlockCall,
    layers: Sequence[LayerSites],
    on_layer: Callable[[LayerView], None],
    indices: Sequence[int],
    roles: tuple[Role, ...] = (),
    streams: Sequence[str] = (),
    hooks: Sequence[Hook] = (),
    beside: bool = False,
    *,
    whole: bool = False,
) -> Any:
    """:func:`observe` of one batch, these prompts; of a `BlockCall` that block's layer alone.

    ``whole``: the pass goes on after the last layer, to the output that is returned.
    """

    def show(seen: SeenLayer) -> None:
        on_layer(_view(seen, indices, roles, bool(streams), beside))

    return watch_layers(
        model, given, layers, show, roles=roles, streams=streams, hooks=hooks, whole=whole
    )


def _check_hook(hook: Any) -> Hook:
    pair = isinstance(hook, (tuple, list)) and len(hook) == 2
    if not pair or not isinstance(hook[0], str) or not callable(hook[1]):
        raise TypeError(f"hooks: wanted {_HOOKS}; got {brief(hook)} in it")
    return hook[0], hook[1]


@dataclass(frozen=True)
class SeenLayer:
    """What a pass shows of one attention layer at its end.

    Attributes:
        index: of the layer among those watched.
        sites: its hook points.
        taken: the softmax that the model took itself, where no hook shows one.
    """

    index: int
    sites: LayerSites
    taken: Taken | None
    _kept: dict[str, Tensor]

    def scores_and_pattern(self) -> tuple[Tensor, Tensor]:
        """What goes into the softmax and what comes out, held against each other."""
        if self.taken is not None:
            return self.taken.scores, self.taken.pattern
        scores, pattern = self._kept.pop("scores"), self._kept.pop("pattern")
        recheck(self.sites, scores, pattern)
        return scores, pattern

    def vectors(self, roles: Collection[Role] = ()) -> dict[Role, Tensor]:
        """These of q, k, v, and q and k where a bias is added: ``[batch, pos, head, d_head]``."""
        needed = _needed(self.sites, roles)
        if self.sites.bare:
            assert self.taken is not None
            taken = self.taken.vectors(self.sites.kv_leaders)
            return {role: taken[role] for role in needed}
        dots = {role: self.sites.vector(role).dot for role in needed}
        return {role: dot.by_position(self._kept.pop(role)) for role, dot in dots.items()}

    def stream(self) -> Tensor:
        """The residual stream at the block's input."""
        return self._kept.pop("stream")


def _needed(sites: LayerSites, roles: Collection[Role]) -> list[Role]:
    """Roles whose vectors a layer is shown with: a bias is told apart by q and k."""
    return sorted({*roles, "q", "k"} if sites.has_bias else {*roles})


def watch_layers(
    model: HookedModel,
    given: ModelInput | BlockCall,
    layers: Sequence[LayerSites],
    on_seen: Callable[[SeenLayer], None],
    *,
    roles: Collection[Role] = (),
    streams: Sequence[str] = (),
    hooks: Sequence[Hook] = (),
    whole: bool = False,
) -> Any:
    """One forward pass that hands each layer over while it exists, and ends after the last.

    Args:
        model, given: in eval mode, and its input.
        layers: in the order in which they run.
        on_seen: takes each.
        roles: which of q, k and v to keep for it; q and k are kept where a bias is added.
        streams: for each layer the hook of the residual stream to keep, if any.
        hooks: run before those that look on.
        whole: do not end the pass; its output is returned.
    """
    tap = AttentionTap() if any(s.tapped for s in layers) else None
    entries = list(hooks)
    for index, sites in enumerate(layers):
        points: dict[str, str] = {"stream": streams[index]} if streams else {}
        if not sites.bare:
            points |= {role: sites.vector(role).dot.hook for role in _needed(sites, roles)}
        last = index == len(layers) - 1 and not whole
        entries += _layer_hooks(index, sites, points, tap, on_seen, last)
    return run_with(model, given, entries, tap)


def _layer_hooks(
    index: int,
    sites: LayerSites,
    points: Mapping[str, str],
    tap: AttentionTap | None,
    on_seen: Callable[[SeenLayer], None],
    last: bool,
) -> list[Hook]:
    kept: dict[str, Tensor] = {}

    def show(taken: Taken | None = None) -> None:
        on_seen(SeenLayer(index, sites, taken, kept))
        kept.clear()
        if last:
            raise Finished  # what follows, the unembedding above all, is not needed

    def at_pattern(pattern: Tensor, hook: Any) -> None:
        kept["pattern"] = pattern
        show()

    def at_z(z: Tensor, hook: Any) -> None:
        assert tap is not None
        taken = tap.take(z.shape[0])
        if taken is None:  # the self-check saw it happen
            raise RuntimeError(f"layer {sites.layer}: no softmax was seen before {hook.name}")
        show(taken)

    def at_anchor(tensor: Tensor, hook: Any) -> None:
        assert tap is not None
        tap.expect(sites, tensor, show=show)

    keep = partial(_keep, kept=kept)
    entries: list[Hook] = [(hook, partial(keep, name=name)) for name, hook in points.items()]
    if sites.bare:
        assert sites.anchor is not None
        return [*entries, (sites.anchor.hook, at_anchor)]
    if sites.tapped:
        assert sites.z is not None
        return [*entries, (sites.z.hook, at_z)]
    return [*entries, (sites.scores, partial(keep, name="scores")), (sites.pattern, at_pattern)]


def _view(
    seen: SeenLayer, indices: Sequence[int], roles: tuple[Role, ...], streamed: bool, beside: bool
) -> LayerView:
    """What a pass shows, as a measurement reads it."""
    scores, pattern = seen.scores_and_pattern()
    if not beside:
        _refuse_keys_beside(seen.sites, scores)
    stream = seen.stream() if streamed else None
    if stream is not None:
        refuse_several_streams(stream, seen.sites)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return LayerView(
        index=seen.index,
        sites=seen.sites,
        prompts=indices,
        scores=scores.to(wide),
        pattern=pattern.to(wide),
        vectors=seen.vectors(roles),
        stream=stream,
    )


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


def _keep(tensor: Tensor, hook: Any, kept: dict[str, Tensor], name: str) -> None:
    kept[name] = tensor


def refuse_several_streams(stream: Tensor, sites: LayerSites) -> None:
    """Refuse a block with several parallel streams (hyper-connections)."""
    if stream.ndim != 3:
        raise UnsupportedModelError(
            "the residual stream",
            wanted="one, [batch, pos, d_model]",
            got=f"{list(stream.shape)}",
            layer=sites.layer,
        )


def stream_hook(model: HookedModel, sites: LayerSites, *, after: bool = False) -> str:
    """Name of the hook with the residual stream at the input of a layer's block, or after it."""
    check, ends = "the residual stream", ("hook_in", "hook_resid_pre")
    if after:
        check, ends = "the residual stream after a block", ("hook_out", "hook_resid_post")
    names = [f"{sites.block}.{end}" for end in ends]
    for name in names:
        if name in model.hook_dict:
            return name
    raise UnsupportedModelError(
        check, wanted=f"a hook {names[0]} or {names[1]}", got="neither", layer=sites.layer
    )
