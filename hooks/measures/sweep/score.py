"""Compares what the noisy rows of a sweep predict with their clean row, in cache.

For clean logits z, probabilities p = softmax(z) and noisy logits z + delta,

    KL(clean || noisy) = log sum_t p_t exp(g_t),        g_t = delta_t - sum_u p_u delta_u
    log sum_t exp(z_t + delta_t) = log sum_t exp(z_t) + sum_u p_u delta_u + KL

so one exponential per logit gives loss and KL; written with exp(g) - 1, even a KL far below the
rounding of the logits is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNSCORED = -100
"""Target of a position that is not scored, as in PyTorch."""

_CHUNK = 256 << 20  # bytes of logits made at once: fewer rows waste a matrix product's start
_BLOCK = {"cpu": 3 << 19, "other": 512 << 20}  # bytes compared at once: what a cache holds
_RARE = 1e-37  # clean probabilities below are no normal float32 ...
_STEEP = 60.0  # ... and matter where noise multiplies them by exp of this, or more
_WIDE = 1024  # vocabularies whose arg max is taken in two steps
_SPAN = 256

Head = Callable[[Tensor], Tensor]
Each: TypeAlias = Float[Tensor, "place condition"]


@dataclass(frozen=True)
class Scored:
    """Per scored position and condition; the loss is NaN where there is no target.

    ``top`` says whether the arg max is the target, ``agree`` whether it is the clean row's. The
    first of tied logits is the arg max.
    """

    top: Each
    agree: Each
    loss: Each
    kl: Each

    def stacked(self) -> Float[Tensor, "4 place condition"]:
        """All four, in this order, in float64 on the CPU."""
        return torch.stack([x.cpu().double() for x in (self.top, self.agree, self.loss, self.kl)])


def score(
    states: Float[Tensor, "row pos d"],
    places: tuple[Int[Tensor, "place"], Int[Tensor, "place"]],
    targets: Int[Tensor, "place"],
    n_conditions: int,
    head: Head,
    clean: Float[Tensor, "place d_vocab"] | None,
    keep: bool,
) -> tuple[Scored, Float[Tensor, "place d_vocab"] | None]:
    """Compare the rows of each prompt with its clean one.

    Args:
        states: what ``head`` turns into logits, ``n_conditions`` rows for each prompt in turn.
        places: prompt (counted in this batch) and position of each scored place.
        targets: token id that should be predicted there, or ``UNSCORED``.
        n_conditions: rows of a prompt, the clean one first unless ``clean`` is given.
        head: logits of states.
        clean: clean logits of the places, where an earlier batch held the clean row.
        keep: whether to return the clean logits for a later batch.

    Returns:
        the scores, and the clean logits or None.
    """
    prompt, pos = (x.to(states.device) for x in places)
    targets = targets.to(states.device)
    rows = prompt[:, None] * n_conditions + torch.arange(n_conditions, device=states.device)
    kind = "cpu" if states.device.type == "cpu" else "other"
    step, parts, kept = 1, [], []
    at = 0
    while at < len(pos):
        some = slice(at, at + step)
        logits = head(states[rows[some], pos[some, None]])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        reference = logits[:, 0] if clean is None else clean[some]
        parts.append(_scored(logits, reference, targets[some], clean is None, _BLOCK[kind]))
        if keep and clean is None:
            kept.append(reference.clone())
        at += step
        size = n_conditions * logits.shape[-1] * logits.element_size()
        step = max(1, _CHUNK // size)
    joined = [torch.cat(p) for p in zip(*(vars(part).values() for part in parts), strict=True)]
    return Scored(*joined), (torch.cat(kept) if kept else clean)


def _scored(
    logits: Float[Tensor, "place condition d_vocab"],
    clean: Float[Tensor, "place d_vocab"],
    targets: Int[Tensor, "place"],
    has_clean: bool,
    block: int,
) -> Scored:
    """Scores of one chunk of places."""
    if bool(clean.isneginf().any()):  # tokens that the model rules out: the same in every row
        floor = -1e4
        logits, clean = logits.clamp_min(floor), clean.clamp_min(floor)
    lse = torch.logsumexp(clean, -1)
    p = torch.exp(clean - lse[:, None])
    p = p / p.sum(-1, keepdim=True)
    noisy = logits[:, 1:] if has_clean else logits
    top, mean, kl = _compare(noisy, clean, p, lse, block)
    clean_top = argmax(clean)
    if has_clean:
        top = torch.cat([clean_top[:, None], top], 1)
        nothing = torch.zeros_like(lse)[:, None]
        mean, kl = torch.cat([nothing, mean], 1), torch.cat([nothing, kl], 1)
    wanted = targets.clamp_min(0)[:, None, None].expand(-1, logits.shape[1], 1)
    of_target = logits.gather(-1, wanted)[..., 0]
    loss = (lse[:, None] - of_target) + mean + kl
    missing = (targets == UNSCORED)[:, None]
    return Scored(
        top=(top == targets[:, None]).to(lse.dtype),
        agree=(top == clean_top[:, None]).to(lse.dtype),
        loss=loss.masked_fill(missing, torch.nan),
        kl=kl,
    )


def _compare(
    noisy: Float[Tensor, "place condition d_vocab"],
    clean: Float[Tensor, "place d_vocab"],
    p: Float[Tensor, "place d_vocab"],
    lse: Float[Tensor, "place"],
    block: int,
) -> tuple[Int[Tensor, "place condition"], Each, Each]:
    """Arg max, mean shift sum p delta and KL, block by block: each logit is read while in cache."""
    n_places, n_conditions, n_vocab = noisy.shape
    size = max(1, block // (n_vocab * noisy.element_size()))  # rows of a block
    n_rows = min(n_conditions, size)
    step = max(1, size // max(1, n_rows))
    top = torch.empty(n_places, n_conditions, dtype=torch.long, device=noisy.device)
    mean, kl = (noisy.new_empty(n_places, n_conditions) for _ in range(2))
    rare = bool((p < _RARE).any())  # clean probabilities that may have lost digits, or all
    scratch = noisy.new_empty(min(step, n_places) * n_rows * n_vocab)
    for a in range(0, n_places, step):
        here = slice(a, a + step)
        weights = p[here, :, None]
        for b in range(0, n_conditions, max(1, n_rows)):
            part = noisy[here, b : b + n_rows]
            top[here, b : b + n_rows] = argmax(part)
            g = scratch[: part.numel()].view(part.shape)
            torch.sub(part, clean[here, None], out=g)
            shift = torch.bmm(g, weights)
            g.sub_(shift)
            steep = g.amax(-1) > _STEEP if rare else None
            rest = torch.bmm(g, weights)  # zero up to rounding, which it takes out of what follows
            moved = torch.bmm(g.expm1_(), weights)
            kl[here, b : b + n_rows] = (torch.log1p(moved) - rest)[..., 0]
            mean[here, b : b + n_rows] = (shift + rest)[..., 0]
            # Without rare tokens only an exponential beyond the float's range is left.
            steep = ~moved[..., 0].isfinite() if steep is None else steep
            if bool(steep.any()):
                _directly(part, lse[here], mean[here, b:], kl[here, b:], steep)
    return top, mean, kl


def _directly(part: Tensor, lse: Tensor, mean: Tensor, kl: Tensor, steep: Tensor) -> None:
    """KL where noise raises a token by more than a float's range: as a difference of sums."""
    place, row = steep.nonzero(as_tuple=True)
    noisy = torch.logsumexp(part[place, row], -1)
    kl[place, row] = noisy - lse[place] - mean[place, row]


def argmax(z: Float[Tensor, "*row d_vocab"]) -> Int[Tensor, "*row"]:
    """Index of the first maximum: finds the maxima of spans first, which is ten times faster."""
    n = z.shape[-1]
    if n < _WIDE:
        return z.argmax(-1)
    whole = n // _SPAN
    spans = z[..., : whole * _SPAN].unflatten(-1, (whole, _SPAN)).amax(-1)
    tail = z[..., n - _SPAN :].amax(-1, keepdim=True)
    first = torch.cat([spans, tail], -1).argmax(-1, keepdim=True) * _SPAN
    at = first.clamp_max(n - _SPAN) + torch.arange(_SPAN, device=z.device)
    inside = z.gather(-1, at).argmax(-1, keepdim=True)
    return at.gather(-1, inside)[..., 0]
