"""Removes positions and the causal mask from a model, where it can be verified that they are gone.

Both are arguments of a forward pass, so the model stays what it is: *positions* are removed by
giving every token the same ``position_ids`` (learned, sinusoidal and rotary ones then say nothing),
*the mask* by an ``attention_mask`` ``[batch, 1, query, key]`` that hides nothing. Both are
verified:

- without positions, a prompt of one token repeated has the same residual stream and the same
  scores at every position; ALiBi and convolutions, which read no ids, are found out by that;
- with positions removed the same keys are visible as before. (Hugging Face models that are given
  ``position_ids`` alone take ids that do not rise by one for several prompts packed into one, and
  let each token see itself only: a mask ``[batch, pos]`` of ones beside them prevents it.)
- without the mask every score is finite in every layer, and those of the first layer that were
  visible before are what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import HookedModel, Prompts, arguments_of, model_dtype, pass_dtype
from hooks.sites import LayerSites, LayerView, observe

Status = Literal["removable", "absent", "unremovable"]
MaskKind = Literal["float", "bool"]
_REPEATED = 7  # tokens of the prompt of one token
_UNITS = 1e3  # of rounding: what deep layers may make of equal rows
_LOOSEST = 0.1  # in half precision


@dataclass(frozen=True)
class Variant:
    """Whether positions and mask are as the model has them (True), or removed."""

    positions: bool
    mask: bool

    @property
    def name(self) -> str:
        """``"as is"``, ``"positions removed"``, ``"mask removed"`` or ``"both removed"``."""
        if self.positions:
            return "as is" if self.mask else "mask removed"
        return "positions removed" if self.mask else "both removed"


VARIANTS = tuple(Variant(p, m) for m in (True, False) for p in (True, False))


@dataclass(frozen=True)
class Removal:
    """Whether something can be removed from a model, and if not, why.

    Attributes:
        status: ``"removable"`` (and verified), ``"absent"`` (there is none) or ``"unremovable"``.
        why: what prevents it; empty otherwise.
    """

    status: Status
    why: str = ""


@dataclass(frozen=True)
class Removals:
    """The inputs of a forward pass that remove a model's positions or its mask.

    Attributes:
        positions, mask: whether they can be.
        takes_mask: whether the model takes an attention mask.
        kind: of mask that it takes.
        says_ids: whether position ids are passed when the mask is removed (needed by a model that
            counts positions from the mask).
    """

    positions: Removal
    mask: Removal
    takes_mask: bool
    kind: MaskKind = "float"
    says_ids: bool = False

    def arguments(self, variant: Variant, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Arguments for one prompt, without the axis of prompts; none for the model as it is."""
        no_positions = not variant.positions and self.positions.status == "removable"
        no_mask = not variant.mask and self.mask.status == "removable"
        out: dict[str, Tensor] = {}
        if no_mask:
            out["attention_mask"] = _nothing_hidden(self.kind, length, dtype)
            if self.says_ids:
                out["position_ids"] = torch.arange(length)
        elif no_positions and self.takes_mask:
            out["attention_mask"] = torch.ones(length, dtype=torch.long)
        if no_positions:
            out["position_ids"] = torch.zeros(length, dtype=torch.long)
        return out

    def variants(self, positions: bool | None, mask: bool | None) -> list[Variant]:
        """The requested variants; None stands for both, as far as both exist.

        What was to be removed but is absent needs no removing.

        Raises:
            UnsupportedModelError: what was to be removed can't be.
        """
        kept = {"positions": positions, "mask": mask}
        options: dict[str, set[bool]] = {}
        for what, wanted in kept.items():
            removal: Removal = getattr(self, what)
            if wanted is False and removal.status == "unremovable":
                raise UnsupportedModelError(
                    f"{what} removed", wanted=f"a model whose {what} can be", got=removal.why
                )
            if wanted is not None:
                options[what] = {wanted or removal.status == "absent"}
            else:
                options[what] = {True, removal.status != "removable"}
        return [
            v for v in VARIANTS if v.positions in options["positions"] and v.mask in options["mask"]
        ]


def find_removals(model: HookedModel, layers: Sequence[LayerSites], prompts: Prompts) -> Removals:
    """What can be removed from this model, tried on it; masks on the longest prompt."""
    longest = max(prompts.first, key=len).cpu()
    plain = _look(model, layers, longest, {})
    takes_mask = "attention_mask" in arguments_of(model)
    mask, kind, says = _try_masks(model, layers, longest, plain)
    at_first = Removals(Removal("removable"), mask, takes_mask, kind, says)
    return replace(at_first, positions=_try_positions(model, layers, longest, plain, at_first))


def rounding(dtype: torch.dtype) -> float:
    """Rounding of a dtype, at least float32's: many models norm in float32 whatever their dtype."""
    return max(float(torch.finfo(dtype).eps), float(torch.finfo(torch.float32).eps))


def _nothing_hidden(kind: MaskKind, length: int, dtype: torch.dtype) -> Tensor:
    if kind == "bool":
        return torch.ones(1, length, length, dtype=torch.bool)
    return torch.zeros(1, length, length, dtype=dtype)


@dataclass(frozen=True)
class _Seen:
    """What one forward pass showed: scores and streams of each layer, of one prompt.

    ``unit`` is the rounding that it was computed with.
    """

    unit: float
    scores: list[Tensor]
    visible: list[Tensor]
    streams: list[Tensor]


def _look(
    model: HookedModel, layers: Sequence[LayerSites], ids: Tensor, named: dict[str, Tensor]
) -> _Seen:
    seen = _Seen(rounding(pass_dtype(model)), [], [], [])

    def on_layer(view: LayerView) -> None:
        seen.scores.append(view.scores[0].cpu())
        seen.visible.append(view.visible[0].cpu())
        assert view.stream is not None
        seen.streams.append(view.stream[0].cpu().to(view.scores.dtype))

    each = {name: (value,) for name, value in named.items()}
    observe(model, layers, Prompts((ids,), (0,), ((),), each=each), on_layer, stream=True)
    return seen


def _try_masks(
    model: HookedModel, layers: Sequence[LayerSites], ids: Tensor, plain: _Seen
) -> tuple[Removal, MaskKind, bool]:
    """The kind of mask that hides nothing, if there is one, and whether it needs position ids."""
    takes = arguments_of(model)
    if all(bool(v.all()) for v in plain.visible):
        return Removal("absent"), "float", False
    if "attention_mask" not in takes:
        why = "its forward pass takes no attention_mask"
        return Removal("unremovable", why), "float", False
    why = ""
    kinds: tuple[MaskKind, ...] = ("float", "bool")
    for says in (True, False) if "position_ids" in takes else (False,):
        for kind in kinds:
            named = {"attention_mask": _nothing_hidden(kind, len(ids), model_dtype(model))}
            if says:
                named["position_ids"] = torch.arange(len(ids))
            try:
                seen = _look(model, layers, ids, named)
            except Exception as error:  # whatever a model makes of a mask that it does not know
                got = str(error).strip().splitlines() or [""]
                why = why or f"its forward pass takes no mask [batch, 1, query, key]: {got[0]}"
                continue
            wrong = _hidden_or_changed(layers, plain, seen)
            if not wrong:
                return Removal("removable"), kind, says
            why = wrong
    return Removal("unremovable", why), "float", False


def _hidden_or_changed(layers: Sequence[LayerSites], plain: _Seen, seen: _Seen) -> str:
    """What went wrong under a mask that hides nothing."""
    for sites, visible in zip(layers, seen.visible, strict=True):
        if not bool(visible.all()):
            return f"a mask that hides nothing leaves keys hidden in {sites.label}"
    before, after = (s.scores[0].masked_fill(~plain.visible[0], 0) for s in (plain, seen))
    if _differ(before, after, seen.unit):
        return f"a mask that hides nothing changes the visible scores of {layers[0].label}"
    return ""


def _try_positions(
    model: HookedModel, layers: Sequence[LayerSites], ids: Tensor, plain: _Seen, known: Removals
) -> Removal:
    """Whether equal ids leave no trace of positions."""
    length = min(_REPEATED, len(ids))
    repeated = ids[:1].repeat(length)
    if not _trace(layers, _look(model, layers, repeated, {})):
        return Removal("absent")
    if "position_ids" not in arguments_of(model):
        return Removal("unremovable", "its forward pass takes no position_ids")
    without, dtype = Variant(positions=False, mask=True), model_dtype(model)
    named = known.arguments(without, length, dtype)
    trace = _trace(layers, _look(model, layers, repeated, named))
    if trace:
        return Removal("unremovable", f"equal position_ids leave positions in {trace}")
    seen = _look(model, layers, ids, known.arguments(without, len(ids), dtype))
    for sites, before, after in zip(layers, plain.visible, seen.visible, strict=True):
        if not torch.equal(before, after):
            return Removal("unremovable", f"equal position_ids change the mask of {sites.label}")
    return Removal("removable")


def _trace(layers: Sequence[LayerSites], seen: _Seen) -> str:
    """Where positions show in a prompt of one token repeated; empty where they do not.

    A learned attention sink takes another share of each row, and reveals positions to the layers
    after it: there only the first layer is checked.
    """
    looked = 1 if any(s.sink for s in layers) else len(layers)
    for index, sites in enumerate(layers[:looked]):
        stream = seen.streams[index]
        if _differ(stream, stream[:1].expand_as(stream), seen.unit):
            return f"the residual stream at {sites.label}"
        scores, visible = seen.scores[index], seen.visible[index]
        own = scores.diagonal(dim1=-2, dim2=-1)[:, :1, None]  # that of the first token with itself
        if _differ(scores.where(visible, own), own.expand_as(scores), seen.unit):
            return f"the scores of {sites.label}"
    return ""


def _differ(a: Tensor, b: Tensor, unit: float) -> bool:
    """Whether two differ by more than rounding; NaN always does."""
    scale = float(torch.maximum(a.abs(), b.abs()).max())
    return not bool(((a - b).abs() <= min(_UNITS * unit, _LOOSEST) * scale).all())
