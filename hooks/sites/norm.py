"""The norm before a layer's attention: found and analysed by running the model.

    y_t = g * (x_t - [mean x_t]) / s_t + b,        s_t = sqrt(mean (x_t - [mean x_t])^2 + eps)

Nothing is read from a module, as every family stores its gain in its own way (Gemma: 1 + weight).
Inputs of our choice at the norm's hook give g, b and eps; what these predict is compared with the
norm's real output, there and on every measured prompt.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import (
    BlockCall,
    Finished,
    HookedModel,
    ModelInput,
    Role,
    checking,
    keeping_calls,
    run_with,
)
from hooks.sites.scores import visible
from hooks.sites.types import AttentionSites, LayerSites
from hooks.sites.watch import Hook, SeenLayer, stream_hook, watch_layers

_LARGE, _SMALL = 64.0, 1e-3  # sizes of the inputs that tell a gain and an eps
_ROUNDINGS = 16  # of the output's dtype that a norm may be off
_OUTPUTS = ("hook_out", "hook_normalized")  # a bridge's; HookedTransformer's
CHECK = "the norm in front of the attention"


@dataclass(frozen=True)
class InnerNorm:
    """One layer's norm, ``y = gain (x - [mean]) / s + bias`` at its output's hook.

    Attributes:
        layer: block index.
        before: hook with its input x.
        after: hook with its output y.
        gain, bias: float64; ones and zeros where another hook precedes them.
        centred: whether the mean is subtracted.
        eps: added to the mean square.
        again: whether the block alone, run again with this norm edited, gives a pass's scores.
    """

    layer: int
    before: str
    after: str
    gain: Float[Tensor, "d"]
    bias: Float[Tensor, "d"]
    centred: bool
    eps: float
    again: bool

    def scale(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos"]:
        """s_t, float64."""
        return (self.squares(x).mean(-1) + self.eps).sqrt()

    def squares(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """(x_t - [mean])^2, float64: what each dimension adds to d (s_t^2 - eps)."""
        return _centre(x, self.centred).square()

    def frozen(
        self, y: Float[Tensor, "batch pos d"], factor: Float[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d"]:
        """The output with other scales: bias + (y - bias) factor, factor = s_t / c_t."""
        bias = self.bias.to(y.device)
        out: Tensor = (bias + (y.double() - bias) * factor.to(y.device)[..., None]).to(y.dtype)
        return out

    def error(self, x: Tensor, y: Tensor) -> float:
        """Largest difference between y and its prediction from x, in units of rounding."""
        z, s = _centre(x, self.centred), self.scale(x)[..., None]
        unit = z / s
        gain, bias = self.gain.to(y.device), self.bias.to(y.device)
        # Sums round by the vector's size, including what the mean's subtraction removes.
        made_of = 1 + unit.abs()
        if self.centred:
            made_of += (x.double() - z).abs() / s
        room = torch.finfo(y.dtype).eps * (gain.abs() * made_of + bias.abs() + y.double().abs())
        off = (y.double() - bias - gain * unit).abs() / room.clamp_min(1e-300)
        return float(off.nan_to_num(torch.inf, torch.inf).max())

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse an output that is not what the input predicts."""
        off = self.error(x, y)
        if not off <= _ROUNDINGS:
            raise UnsupportedModelError(
                CHECK,
                wanted=f"at {self.after} what its input predicts, up to {_ROUNDINGS} roundings",
                got=f"{off:.3g} roundings off (a norm of another form, or an edit there)",
                layer=self.layer,
            )


def _centre(x: Tensor, centred: bool) -> Tensor:
    x = x.double()
    return x - x.mean(-1, keepdim=True) if centred else x


def inner_norms(
    model: HookedModel,
    sites: AttentionSites,
    layers: Sequence[LayerSites],
    example: ModelInput,
) -> tuple[InnerNorm, ...]:
    """The norm before each of these layers' attention, verified on the model.

    Its output is what q and k are made from, and edits there reach both; with q put back, k alone.
    Remembered with the self-check. The model is in eval mode, the example a short prompt.

    Raises:
        UnsupportedModelError: a layer has none (No-Norm, QKV-Norm, post-norm), or one that is
            neither LayerNorm nor RMSNorm, or the check failed.
    """
    new = [s for s in layers if ("norm", s.layer) not in sites.known]
    if new:
        with checking():
            found = _found(model, new, example)
        sites.known.update({("norm", norm.layer): norm for norm in found})
    return tuple(sites.known["norm", s.layer] for s in layers)


def _found(
    model: HookedModel, layers: Sequence[LayerSites], example: ModelInput
) -> list[InnerNorm]:
    finder = _Finder(model, layers, example)
    places = [finder.place(sites) for sites in layers]
    zero, large, small = (finder.outputs(places, size) for size in (0.0, _LARGE, _SMALL))
    norms = []
    for i, (sites, place) in enumerate(zip(layers, places, strict=True)):
        x, y = finder.seen[place[0]], finder.seen[place[1]]
        again = sites.block in finder.calls
        both = [
            _fit(sites.layer, place, zero[i][1], large[i], small[i], centred, again)
            for centred in (False, True)
        ]
        norm = min(both, key=lambda n: n.error(x, y))
        norm.check(x, y)
        finder.see_edits(sites, norm)
        norms.append(norm)
    return norms


def _vector(d: int, size: float, like: Tensor) -> Tensor:
    """A vector of alternating signs, with no entry near zero and hardly any mean."""
    at = torch.arange(d, dtype=torch.float32)  # integers divide in the default dtype
    ramp = 1 + (at % 5) / 8
    return (size * ramp * (1 - 2 * (at % 2))).to(like)


def _fit(
    layer: int,
    place: tuple[str, str],
    zero: Tensor,
    large: tuple[Tensor, Tensor],
    small: tuple[Tensor, Tensor],
    centred: bool,
    again: bool,
) -> InnerNorm:
    """Gain, bias and eps of a norm of this kind: of N(0), N(large u) and N(small u)."""
    bias = zero
    u = _centre(large[0], centred)
    unit = u / u.square().mean().sqrt()
    gain = (large[1] - bias) / unit
    u = _centre(small[0], centred)
    mean_square = float(u.square().mean())
    line = gain * u / mean_square**0.5
    # (small y - b) = line r / sqrt(r^2 + eps)
    ratio = float(((small[1] - bias) * line).sum() / line.square().sum())
    eps = max(0.0, mean_square * (1 / ratio**2 - 1)) if ratio else 0.0
    return InnerNorm(layer, *place, gain, bias, centred, eps, again)


def _ramped(y: Tensor, hook: Any) -> Tensor:
    """A norm's output with another length at each position."""
    if y.ndim != 3:
        return y
    return y * torch.linspace(1.5, 2.0, y.shape[1], dtype=torch.float32).to(y)[:, None]


class _Finder:
    """Short forward passes of one model, and of its blocks where these give the same."""

    def __init__(
        self, model: HookedModel, layers: Sequence[LayerSites], example: ModelInput
    ) -> None:
        self.model = model
        self.example = example
        self.candidates = {s.layer: _candidates(model, s) for s in layers}
        wanted = {name for pairs in self.candidates.values() for pair in pairs for name in pair}
        wanted |= {_projection(s, role) for s in layers for role in ("q", "k")}
        wanted |= {s.q.dot.hook for s in layers} - {""}
        self.order: list[str] = []
        self.seen: dict[str, Tensor] = {}
        self.unlike: set[str] = set()  # those that carry other than one [batch, pos, d]
        self.calls: Mapping[str, BlockCall] = {}
        with keeping_calls(model, {s.block for s in layers}) as calls:
            self._run([(name, partial(self._record, name=name)) for name in sorted(wanted)])
        trusted = self._trusted(layers)
        self.calls = {name: call for name, call in calls.items() if name in trusted}

    def _trusted(self, layers: Sequence[LayerSites]) -> set[str]:
        """Blocks that, run again with edited norms, give the scores that a pass with them gave."""
        afters = {after for pairs in self.candidates.values() for _, after in pairs}
        edits: list[Hook] = [(after, _ramped) for after in sorted(afters)]
        trusted: set[str] = set()
        # Whatever a block makes of a call outside a pass: the others are then not trusted either.
        with suppress(Exception), keeping_calls(self.model, {s.block for s in layers}) as calls:
            wanted = self._scores(self.example, layers, edits)
            for sites in layers:
                mine = [edit for edit in edits if edit[0].startswith(f"{sites.block}.")]
                again = self._scores(calls[sites.block], [sites], mine)
                if _agree(wanted[sites.layer], again[sites.layer]):
                    trusted.add(sites.block)
        return trusted

    def _scores(
        self, given: ModelInput | BlockCall, layers: Sequence[LayerSites], edits: Sequence[Hook]
    ) -> dict[int, Tensor]:
        """Each layer's scores under the edits."""
        found: dict[int, Tensor] = {}

        def keep(seen: SeenLayer) -> None:
            found[seen.sites.layer] = seen.scores_and_pattern()[0].clone()

        watch_layers(self.model, given, layers, keep, hooks=edits)
        return found

    def place(self, sites: LayerSites) -> tuple[str, str]:
        """Hooks before and after the norm from which this layer's q and k are made."""
        names = tuple(_projection(sites, role) for role in ("q", "k"))
        first = min(self.order.index(name) for name in names)
        # A bridge has an Identity where a model has no norm.
        early = [
            p
            for p in self.candidates[sites.layer]
            if p[1] in self.order[:first]
            and self.seen.keys() >= {*p}
            and not torch.equal(self.seen[p[0]], self.seen[p[1]])
        ]
        early.sort(key=lambda p: self.order.index(p[1]), reverse=True)
        found = next((p for p in early if self._is_read(sites, p, names)), None)
        if found is None:
            others = ", ".join(after for _, after in early)
            _refuse(
                sites,
                f"a norm in {sites.block} from whose output q and k are made",
                f"{others}, which q and k do not follow" if early else "none before q and k",
            )
        return found

    def _is_read(self, sites: LayerSites, place: tuple[str, str], names: tuple[str, ...]) -> bool:
        """Whether q and k follow an edit there."""
        before, after = place
        if after in self.unlike or self.order.count(before) != 1:
            _refuse(sites, f"{after} to carry one [batch, pos, d]", "several that are unlike")
        return all(self._moved(sites, [(after, _ramped)], names))

    def outputs(
        self, places: Sequence[tuple[str, str]], size: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Each norm's input and output for one vector of that size in every place, float64."""
        given: dict[str, Tensor] = {}
        got: dict[str, Tensor] = {}

        def give(x: Tensor, hook: Any, name: str) -> Tensor:
            given[name] = _vector(x.shape[-1], size, x)
            return given[name].expand_as(x).clone()

        def take(y: Tensor, hook: Any, name: str) -> None:
            got[name] = y[0, -1].double()

        entries: list[Hook] = [(before, partial(give, name=before)) for before, _ in places]
        entries += [(after, partial(take, name=after)) for _, after in places]
        self._run(entries)
        return [(given[before].double(), got[after]) for before, after in places]

    def see_edits(self, sites: LayerSites, norm: InnerNorm) -> None:
        """Do other scales reach q and k, and, with the clean q put back, k alone?"""
        x, y = self.seen[norm.before], self.seen[norm.after]
        ramp = torch.linspace(0.5, 1.5, x.shape[1], dtype=torch.float32)
        factor = ramp.to(x).double().expand(x.shape[:2])
        q, k = (_projection(sites, role) for role in ("q", "k"))
        edit: Hook = (norm.after, lambda t, hook: norm.frozen(y, factor))
        if not all(self._moved(sites, [edit], (q, k))):
            _refuse(sites, "q and k that follow a frozen norm", "one that does not")
        dot = sites.q.dot.hook
        if not dot:
            _refuse(sites, "a hook where q enters the dot product", "none of TransformerLens's")
        put_back: Hook = (dot, lambda t, hook: self.seen[dot].clone())
        if self._moved(sites, [edit, put_back], (dot, k)) != [False, True]:
            _refuse(sites, "k to move and q not, with the clean q put back", "another result")

    def _moved(
        self, sites: LayerSites, edits: Sequence[Hook], names: Collection[str]
    ) -> list[bool]:
        """Which of these hooks carry other values under the edits."""
        kept: dict[str, Tensor] = {}

        def look(tensor: Tensor, hook: Any, name: str) -> None:
            kept[name] = tensor
            if len(kept) == len(set(names)):
                raise Finished

        entries: list[Hook] = [*edits, *((name, partial(look, name=name)) for name in names)]
        run_with(self.model, self.calls.get(sites.block, self.example), entries)
        return [not torch.equal(kept[name], self.seen[name]) for name in names]

    def _record(self, tensor: Any, hook: Any, name: str) -> None:
        self.order.append(name)
        if not isinstance(tensor, Tensor):
            return
        before = self.seen.setdefault(name, tensor.clone())
        # HookedTransformer calls its norm once each for q, k and v.
        if tensor.ndim != 3 or not torch.equal(before, tensor):
            self.unlike.add(name)

    def _run(self, entries: Sequence[Hook]) -> None:
        run_with(self.model, self.example, entries)


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two passes' scores are equal up to rounding, of the same visible keys."""
    seen, eps = visible(a), torch.finfo(a.dtype).eps
    if not torch.equal(seen, visible(b)):
        return False
    a, b = (x.double().masked_fill(~seen, 0.0) for x in (a, b))
    return bool((a - b).abs().max() <= _ROUNDINGS * eps * a.abs().max())


def _projection(sites: LayerSites, role: Role) -> str:
    """Hook of a projection's output, before any norm of its own."""
    name = sites.vector(role).projection.hook
    if not name:
        _refuse(sites, f"a hook at the projection of {role}", "none of TransformerLens's")
    return name


def _candidates(model: HookedModel, sites: LayerSites) -> list[tuple[str, str]]:
    """Hooks before and after each module beside the attention in its block."""
    block = sites.block
    points: Mapping[str, Any] = model.hook_dict
    found: dict[str, tuple[str, str]] = {}
    for name in points:
        match = re.fullmatch(rf"({re.escape(block)}\.\w+)\.({'|'.join(_OUTPUTS)})", name)
        if match is None or match[1] == sites.prefix:
            continue
        before = f"{match[1]}.hook_in"
        if match[2] == "hook_out":  # a bridge shows input and output
            if before in points:
                found[match[1]] = (before, name)
        elif before not in points:
            found[match[1]] = (stream_hook(model, sites), name)
    return list(found.values())


def _refuse(sites: LayerSites, wanted: str, got: str) -> NoReturn:
    raise UnsupportedModelError(CHECK, wanted=wanted, got=got, layer=sites.layer)
