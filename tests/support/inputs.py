"""What every adapter is given besides plain tokens, and what must come out.

- *A mask of ones* hides nothing: rows and shifts are those of the plain tokens; refused where the
  bridge's own logits are others.
- *Positions* that leave a gap are the model's own business: rows and shifts are those of the
  Hugging Face model with the same positions, called as people call it.
- *Padding* on the left: each prompt of a batch counts what it counts alone, or is refused where the
  model's own logits are others.
- *bfloat16* runs, or is refused by name.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

import hooks
from hooks.sites.types import AttentionSites
from tests.oracles.recompute import POS, Disagreement, Truth, compare, probe, truth
from tests.support import builders

GAP, AT = 20, 8  # positions that are left out, and before which token
PAD = 3


def check_inputs(
    name: str, hf: Any, built: builders.Built, sites: AttentionSites, sparse: float, real: Truth
) -> str:
    """What was tried, in words.

    Raises:
        Disagreement: a count is not what it should be, or bfloat16 ends in another error than the
            documented one.
    """
    (first,), named = built.inputs(1, POS, 0)
    tried = []
    if not first.is_floating_point():
        given = {"input_ids": first, **named}
        takes = set(inspect.signature(hf.forward).parameters)
        if "attention_mask" in takes:
            ones = given | {"attention_mask": torch.ones_like(first)}
            tried.append(_check_mask(built, ones, sites, real, sparse))
            if tried == ["mask"]:
                tried.append(_check_padding(built, given, sparse))
        if "position_ids" in takes and _check_positions(hf, built, given, sites, sparse):
            tried.append("positions")
    return ", ".join([*tried, _check_half(name, built, sparse)])


def _as(check: Any, *given: Any, what: str) -> None:
    """A check whose disagreement says on which inputs."""
    try:
        check(*given)
    except Disagreement as error:
        raise Disagreement(f"{what}: {error}") from error


def _check_mask(
    built: builders.Built, given: dict[str, Any], sites: AttentionSites, real: Truth, sparse: float
) -> str:
    """The same with a mask of ones, or a refusal where the model's own logits are others."""
    try:
        report = probe(built.model, given, sparse)
    except hooks.UnsupportedModelError as error:
        named = dict(given)
        first, ones = named.pop("input_ids"), named.pop("attention_mask")
        with torch.no_grad():
            plain, masked = (
                built.model(first, **named),
                built.model(first, attention_mask=ones, **named),
            )
        if error.check == "a mask of ones" and not torch.allclose(plain, masked, atol=1e-2):
            return "mask refused"
        raise Disagreement(f"mask of ones: {error}") from error
    _as(compare, report, sites, real, sparse, what="mask of ones")
    return "mask"


def _check_positions(
    hf: Any, built: builders.Built, given: dict[str, Any], sites: AttentionSites, sparse: float
) -> bool:
    """Positions with a gap; False where the model itself takes none of this shape."""
    ids = given["input_ids"]
    positions = torch.arange(POS)[None] + GAP * (torch.arange(POS) >= AT)
    named = {n: x for n, x in given.items() if n != "input_ids"} | {"position_ids": positions}
    try:
        real = truth(hf, ((ids,), named), sites)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    report = probe(built.model, {"input_ids": ids, **named}, sparse)
    _as(compare, report, sites, real, sparse, what="positions with a gap")
    return True


def _check_padding(built: builders.Built, given: dict[str, Any], sparse: float) -> str:
    """Two prompts of two lengths, the shorter one padded on the left."""
    ids = given["input_ids"]
    rest = {n: x for n, x in given.items() if n != "input_ids"}
    other = ids.flip(-1)
    both = torch.cat([ids, other])
    both[0, :PAD] = 0
    mask = torch.ones_like(both)
    mask[0, :PAD] = 0
    named = {n: torch.cat([x, x]) for n, x in rest.items()}
    given = {"input_ids": both, "attention_mask": mask, **named}
    try:
        padded = probe(built.model, given, sparse, batch_size=1)
    except hooks.UnsupportedModelError as error:
        if error.check == "left padding" and _padding_counts(built, given, ids[:, PAD:], rest):
            return "padding refused"
        raise Disagreement(f"padding on the left: {error}") from error
    for number, row in enumerate((ids[:, PAD:], other)):
        alone = probe(built.model, {"input_ids": row, **rest}, sparse, first_prompt=number)
        for what in ("rows", "loose"):
            mine, wanted = (getattr(r, what) for r in (padded, alone))
            if not np.array_equal(mine[..., number, :], wanted[..., 0, :]):
                raise Disagreement(
                    f"padding on the left: {what} of prompt {number} are not its own"
                )
    together = probe(built.model, given, sparse)  # one pass, where the model allows it
    if not np.array_equal(together.rows, padded.rows):
        raise Disagreement("two lengths in one pass: other rows than alone")
    # A draw whose two best scores differ by rounding alone may fall either way.
    if not np.allclose(together.loose, padded.loose, atol=2 / together.settings.draws):
        raise Disagreement("two lengths in one pass: other rates than alone")
    return "padding"


def _padding_counts(
    built: builders.Built, given: dict[str, Any], alone: torch.Tensor, rest: dict[str, Any]
) -> bool:
    """Whether the model's own call gives other logits for a prompt behind padding."""
    with torch.no_grad():
        padded = built.model(given.pop("input_ids"), **given)[0, -1]
        return not torch.allclose(padded, built.model(alone, **rest)[0, -1], atol=1e-2, rtol=1e-2)


def _check_half(name: str, built: builders.Built, sparse: float) -> str:
    """bfloat16: whether it runs or is refused."""
    half = builders.build(name, dtype=torch.bfloat16)
    inputs = built.inputs(1, POS, 0)
    (first,), named = inputs
    if first.is_floating_point():
        first = first.to(torch.bfloat16)
    try:
        with torch.no_grad():
            half.model(first, **named)
    except Exception:  # the model itself has no such dtype here
        return "no bf16"
    try:
        report = probe(half.model, ((first,), named), sparse)
    except hooks.UnsupportedModelError:
        return "bf16 refused"
    except Exception as error:
        raise Disagreement(f"bfloat16: {type(error).__name__}: {error}") from error
    if not np.isfinite(report.loose).all():
        raise Disagreement("bfloat16: rates that are no numbers")
    return "bf16"
