"""CentredAttention: attention with A - U in place of its pattern A, as TransformerLens hooks.

U is uniform over each row's visible keys. Without a mask U = (1/T) 1 1^T, and A - U removes the one
large singular value of a random Markov matrix. Source: Naderi et al. 2024 (arXiv 2410.07799).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.arguments import check_layers
from hooks.errors import UnsupportedModelError
from hooks.model import (
    AttentionTap,
    HookedModel,
    TapOfThreads,
    checking,
    evaluating,
    intervening,
    measurement,
    pass_dtype,
    paused_in_checks,
    run_with,
    short_input,
)
from hooks.noise import HookList, refuse_cache
from hooks.sites import LayerSites, as_hooked, attention_sites, choose_layers, visible

_ROUNDING, _ROUNDING_HALF = 64.0, 4.0  # eps of the sizes added up
_HALF_PRECISION = 1e-4  # eps above this: bfloat16, float16
_MARGIN = 4.0  # the edit must exceed rounding this many times
_COPIES = 4
_ADVICE = "Pass use_past_kv_cache=False to generate"
_CENTRED = "_hooks_centred"  # on the hooks at z, by which a second one is seen


@dataclass(frozen=True, kw_only=True)
class CentredAttention:
    """The fix of the spectral gap: z_q -> z_q - mean of v over the keys that q sees.

        z_q = sum_t (A_qt - U_qt) v_t,    U_qt = 1 / |visible keys of q|, 0 for the others

    Without a mask that is A applied to values centred over all tokens, A (v - 1 mean(v)^T), and A -
    (1/T) 1 1^T applied to v. Under a causal mask each row has a mean of its own, so the values are
    not centred as a whole. The pattern remains A. Values that are equal for all tokens give zero.
    Source: Naderi et al. 2024, arXiv 2410.07799.

    Two of them on one layer would give A - 2U: the second is refused.

    Args:
        layers: block indices; None for every attention layer.

    Raises:
        ValueError: layers that are not a list of indices.

    Example:
        >>> fix = CentredAttention()
        >>> with fix.applied(model):          # doctest: +SKIP
        ...     logits = model(tokens)
    """

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers(self.layers))

    def hooks(self, model: HookedModel) -> HookList:
        """TransformerLens hooks for ``model.run_with_hooks(tokens, fwd_hooks=...)``.

        For whole sequences: a cached step of ``generate`` raises (earlier keys and values pass no
        hook). Padded batches need no mask here: padding is masked in the scores.

        Args:
            model: the model; its self-check runs first, then a short pass in which the edit must
                land: what the attention writes must change as W_O applied to the change of z.

        Raises:
            UnsupportedModelError: the self-check failed; cross-attention; a layer without hooks for
                z or v, or whose z is not a plain average of v, or whose rows share their weight
                with a sink; a layer on which a CentredAttention is active (or becomes active later:
                then the pass raises); an edit that does not land; or no hook that shows the scores
                (there :meth:`applied` works).
            ValueError: unknown layer.
        """
        chosen = self._checked(model)
        for sites in chosen:
            if sites.tapped:
                raise UnsupportedModelError(
                    "CentredAttention.hooks",
                    wanted="a hook that shows the scores, and with them each row's visible keys",
                    got="none; use CentredAttention.applied(model), which reads them where the "
                    "model takes its softmax",
                    layer=sites.layer,
                )
        return _entries(model, chosen, None)

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[CentredAttention]:
        """A context in which the model's attention is centred; hooks already on the model stay.

        Raises what :meth:`hooks` raises, except that layers without a hook for the scores work
        here.
        """
        chosen = self._checked(model)
        tap = TapOfThreads(model) if any(sites.tapped for sites in chosen) else None
        with tap or contextlib.nullcontext(), intervening(model, _entries(model, chosen, tap)):
            yield self

    @measurement
    def _checked(self, model: HookedModel) -> list[LayerSites]:
        """The layers, after a check that the edit lands."""
        sites = attention_sites(model)
        chosen = list(choose_layers(sites, self.layers))
        for layer in chosen:
            _refuse(layer)
            assert layer.z is not None
            _refuse_second(model.hook_dict[layer.z.hook], layer, at_most=0)
        _check_landing(model, sorted(chosen, key=lambda s: s.layer))
        return chosen


def _refuse(sites: LayerSites) -> None:
    """Raise where z is not the pattern's average of values that a hook shows."""
    wanted, got = "", ""
    if sites.sequence("q") != sites.sequence("k"):
        wanted, got = "self-attention", f"cross-attention {sites.label} (name layers= without it)"
    elif sites.z is None or sites.bare:
        wanted, got = "hooks of TransformerLens for v and z", "none for one of them"
    elif sites.averaging != "plain":
        wanted = "a z that is the pattern's average of v"
        got = f"another ({sites.averaging}; a model that is centred already is one)"
    elif sites.sink:
        wanted, got = "rows that sum to one", "rows that share their weight with a sink"
    if wanted:
        raise UnsupportedModelError("CentredAttention", wanted=wanted, got=got, layer=sites.layer)


def is_centred(model: HookedModel, sites: LayerSites) -> bool:
    """Whether a layer averages with A - U, by itself or by an active CentredAttention."""
    if sites.averaging == "centred":
        return True
    return sites.z is not None and _active(model.hook_dict.get(sites.z.hook)) > 0


def _active(point: Any) -> int:
    """How many CentredAttention are on a hook point."""
    handles = getattr(point, "fwd_hooks", ())
    return sum(hasattr(getattr(h, "user_hook", None), _CENTRED) for h in handles)


def _refuse_second(point: Any, sites: LayerSites, *, at_most: int) -> None:
    """Raise where U would be subtracted twice."""
    n = _active(point)
    if n > at_most:
        raise UnsupportedModelError(
            "CentredAttention",
            wanted="a layer that averages with A: one CentredAttention at a time",
            got=f"{n} on {sites.z.hook if sites.z else sites.label}: two would give A - 2U",
            layer=sites.layer,
        )


def visible_mean(
    values: Float[Tensor, "batch key head d_head"], mask: Bool[Tensor, "batch #head query key"]
) -> Float[Tensor, "batch query head d_head"]:
    """Mean of the values over each row's visible keys; zero for a row that sees none."""
    share = mask.to(values.dtype)
    share = share / share.sum(-1, keepdim=True).clamp_min(1)
    mean: Tensor = torch.einsum(
        "bhqk,bkhd->bqhd", share.expand(-1, values.shape[2], -1, -1), values
    )
    return mean


class _Layer(threading.local):
    """What one layer's hooks keep of a pass until z comes; of each thread its own."""

    v: Tensor | None = None
    mask: Tensor | None = None

    def __init__(
        self, sites: LayerSites, tap: AttentionTap | TapOfThreads | None, module: Any = None
    ) -> None:
        self.sites = sites
        self.tap = tap
        self.module = module  # whose call would show a cache

    def hooks(self, at_z: Callable[..., Tensor]) -> HookList:
        assert self.sites.z is not None
        entries: HookList = [(self.sites.v.dot.hook, self._keep_values)]
        if not self.sites.tapped:
            entries.append((self.sites.scores, self._keep_mask))
        return [*entries, (self.sites.z.hook, at_z)]

    def _keep_values(self, tensor: Tensor, hook: Any) -> None:
        self.v = self.sites.v.dot.by_position(tensor)

    def _keep_mask(self, tensor: Tensor, hook: Any) -> None:
        self.mask = visible(tensor)

    def mean(self, z: Tensor) -> Float[Tensor, "batch query head d_head"]:
        """What is subtracted from z ``[batch, query, head, d_head]``; in float32 or wider."""
        v, mask = self.v, self.mask
        self.v = self.mask = None
        if self.sites.tapped:
            taken = None if self.tap is None else self.tap.take(z.shape[0])
            mask = None if taken is None else visible(taken.scores)
        if v is None or mask is None:
            raise RuntimeError(f"layer {self.sites.layer}: wanted v and scores before z; got none")
        if mask.shape[-1] != v.shape[1]:
            raise ValueError(
                f"CentredAttention on a cached step: wanted the values of {mask.shape[-1]} visible "
                f"positions at {self.sites.v.dot.hook}; got {v.shape[1]}. {_ADVICE}"
            )
        wide = torch.promote_types(z.dtype, torch.float32)
        return visible_mean(v[:, :, list(self.sites.kv_head_of)].to(wide), mask)

    def centred(self, tensor: Tensor, hook: Any) -> Tensor:
        """The edit of z, in the hook's own layout."""
        assert self.sites.z is not None
        refuse_cache(self.module, "CentredAttention on a cached step", _ADVICE)
        _refuse_second(hook, self.sites, at_most=1)  # hooks that were made before both were active
        z = self.sites.z.by_position(tensor)
        mean = self.mean(z)
        return as_hooked(self.sites.z, (z.to(mean.dtype) - mean).to(z.dtype))


def _entries(
    model: HookedModel, layers: Sequence[LayerSites], tap: TapOfThreads | None
) -> HookList:
    entries: HookList = []
    for sites in layers:
        layer = _Layer(sites, tap, getattr(model, "original_model", None))
        mine = [
            (name, paused_in_checks(hook_fn, "CentredAttention"))
            for name, hook_fn in layer.hooks(layer.centred)
        ]
        setattr(mine[-1][1], _CENTRED, True)  # the one at z
        entries += mine
    return entries


# -- does the edit land? --------------------------------------------------------------------------


def _check_landing(model: HookedModel, layers: Sequence[LayerSites]) -> None:
    """One short pass over four copies: their z become z, z - m, m and 0 in each of these layers.

    What is written must be affine in z: f(z) - f(z - m) = f(m) - f(0). After each attention the
    copies are made equal again, so that every layer is judged on clean inputs.
    """
    counts = {n for s in layers for n in (s.n_heads, s.n_kv_heads)}
    tap = AttentionTap() if any(sites.tapped for sites in layers) else None
    written: dict[int, Tensor] = {}
    entries: HookList = []
    for sites in layers:
        layer = _Layer(sites, tap)
        entries += layer.hooks(_copies_of_z(layer))
        entries.append((_output_hook(model, sites), _keep_output(written, sites)))
    given = short_input(model, _COPIES, counts | {_COPIES})
    with evaluating(model), checking():
        run_with(model, given, entries, tap)
    for sites in layers:
        _judge(model, sites, written.get(sites.layer))


def _copies_of_z(layer: _Layer) -> Callable[..., Tensor]:
    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:
        assert layer.sites.z is not None
        z = layer.sites.z.by_position(tensor)
        mean = layer.mean(z)[0].to(z.dtype)
        copies = torch.stack([z[0], z[0] - mean, mean, torch.zeros_like(mean)])
        return as_hooked(layer.sites.z, copies)

    return hook_fn


def _keep_output(written: dict[int, Tensor], sites: LayerSites) -> Callable[..., Tensor]:
    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:
        written[sites.layer] = tensor.detach().double()
        return tensor[:1].expand_as(tensor).clone()

    return hook_fn


def _output_hook(model: HookedModel, sites: LayerSites) -> str:
    """Name of the hook with W_O's output, before a norm that may follow it."""
    block = sites.block
    names = (f"{sites.prefix}.o.hook_out", f"{sites.prefix}.hook_out", f"{block}.hook_attn_out")
    for name in names:
        if name in model.hook_dict:
            return name
    raise UnsupportedModelError(
        "CentredAttention",
        wanted=f"a hook {', '.join(names[:-1])} or {names[-1]}, to see the edit land",
        got="none",
        layer=sites.layer,
    )


def _judge(model: HookedModel, sites: LayerSites, written: Tensor | None) -> None:
    """Raise unless the edit moved what is written, and moved it linearly."""
    check = "an edit of z in what the attention writes"
    if written is None or len(written) != _COPIES:
        raise UnsupportedModelError(
            check, wanted="the attention's output", got="no such hook fired", layer=sites.layer
        )
    eps = torch.finfo(pass_dtype(model, sites.prefix)).eps
    rounding = _ROUNDING_HALF if eps > _HALF_PRECISION else _ROUNDING
    clean, edited, mean, nothing = written
    moved, predicted = clean - edited, mean - nothing
    allowed = rounding * eps * float(written.abs().max())
    error, effect = float((moved - predicted).abs().max()), float(moved.abs().max())
    if not error <= allowed:  # NaN fails
        raise UnsupportedModelError(
            check,
            wanted=f"a change of W_O times that of z, up to {allowed:.2g}",
            got=f"a difference of {error:.2g}",
            layer=sites.layer,
        )
    needed = _MARGIN * allowed
    if not effect > needed:
        raise UnsupportedModelError(
            check, wanted=f"more than {needed:.2g}", got=f"{effect:.2g}", layer=sites.layer
        )
