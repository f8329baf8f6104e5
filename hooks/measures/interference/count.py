"""Counts of one layer's rows: sparse, moved, and predicted to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.noise import LAWS, collapse_probability
from hooks.sites import LayerView, ScoreParts

_ROWS = 1 << 12  # rows whose competitors lie gathered at a time
ALL_ROWS, CONTENT_ROWS, SINK_ROWS = 0, 1, 2
TOTAL, LENGTH, DIRECTION = 0, 1, 2


@dataclass(frozen=True)
class CleanRows:
    """Which keys a layer attends to before anything is frozen.

    Attributes:
        star: the attended key of each row.
        sparse: rows whose maximum is at least the threshold, with two or more visible keys, of
            which no two share the maximum.
        examined: rows with two or more visible keys.
        ties: sparse rows left out, as two keys share their maximum.
        first: the prompts' first tokens, packed documents' own included.
    """

    star: Int[Tensor, "batch head query"]
    sparse: Bool[Tensor, "batch head query"]
    examined: Bool[Tensor, "batch head query"]
    ties: Bool[Tensor, "batch head query"]
    first: Bool[Tensor, "batch key"]

    def on_first(self, star: Int[Tensor, "batch head query"]) -> Bool[Tensor, "batch head query"]:
        """Whether these keys are first tokens."""
        batch, heads, queries = star.shape
        first = self.first[:, None].expand(batch, heads, -1)
        return first.gather(-1, star.reshape(batch, heads, queries))

    def sums(self, values: Tensor) -> Float[np.ndarray, "head batch kind"]:
        """Sums over rows of ``[batch, head, query]``: content, then those on the first token."""
        sink = self.on_first(self.star)
        both = torch.stack([(values * ~sink).sum(-1), (values * sink).sum(-1)], -1)
        return both.double().transpose(0, 1).cpu().numpy()


def clean_rows(
    view: LayerView,
    sparse: float,
    prompts: Sequence[int],
    first: Bool[Tensor, "batch key"] | None = None,
) -> CleanRows:
    """Sparse rows of a layer as it is; ``first``: first tokens, where a prompt has several."""
    refuse_broken(view, prompts, "")
    scores = _scores(view)
    top, star = scores.max(-1)
    shared = (scores == top[..., None]).sum(-1) > 1
    examined = view.visible.sum(-1) > 1
    reached = examined & (view.pattern.amax(-1) >= sparse)
    if first is None:
        first = first_of([(0,)] * len(top), view.scores.shape[-1])
    return CleanRows(star, reached & ~shared, examined, reached & shared, first.to(star.device))


def first_of(starts: Sequence[Sequence[int]], n_key: int) -> Bool[Tensor, "batch key"]:
    """True where prompts, or documents packed into them, begin."""
    first = torch.zeros(len(starts), n_key, dtype=torch.bool)
    for row, mine in zip(first, starts, strict=True):
        row[list(mine)] = True
    return first


def refuse_broken(view: LayerView, prompts: Sequence[int], when: str) -> None:
    """Refuse NaN, and infinite scores that are not masks."""
    broken = view.scores.isnan() | (view.scores == torch.inf)
    if bool(broken.any()):
        rows = broken.any(-1).flatten(1).sum(1)
        at = int(rows.argmax())
        raise ValueError(
            f"layer {view.sites.label or view.sites.layer}: wanted scores that are finite "
            f"numbers{when}; got NaN or inf in {int(rows[at])} rows of prompt {prompts[at]}"
        )


def frozen_rows(
    view: LayerView, clean: CleanRows, sparse: float, prompts: Sequence[int], when: str
) -> dict[str, Bool[Tensor, "batch head query"]]:
    """Sparse rows that attend elsewhere once the layer's norm is frozen; a tie moves nothing.

    ``loose``: all of them; ``strict``: sparse again; ``to_first``: on the first token now.
    """
    refuse_broken(view, prompts, when)
    scores = _scores(view)
    top, star = scores.max(-1)
    loose = clean.sparse & (top > scores.gather(-1, clean.star[..., None]).squeeze(-1))
    return {
        "loose": loose,
        "strict": loose & (view.pattern.amax(-1) >= sparse),
        "to_first": loose & clean.on_first(star),
    }


def _scores(view: LayerView) -> Float[Tensor, "batch head query key"]:
    return view.scores.masked_fill(~view.visible, -torch.inf)


# -- what independent noise would do ---------------------------------------------------------


def row_sigma(
    view: LayerView, factor: Float[Tensor, "batch key"]
) -> Float[Tensor, "batch head query"]:
    """Relative spread of the factors that a row sees: their deviation over their mean.

    sigma_q = sqrt(mean_t (f_t - mean f)^2) / mean f, t over the row's visible keys.
    """
    seen = view.visible
    count = seen.sum(-1).clamp_min(1)
    f = factor.double()[:, None, None, :]
    mean = (f * seen).sum(-1) / count
    variance = ((f - mean[..., None]).square() * seen).sum(-1) / count
    sigma: Tensor = variance.sqrt() / mean
    return sigma


def uniform_has(sigma: Tensor) -> Bool[Tensor, "*shape"]:
    """True where the uniform law can have this sigma; beyond, the lognormal law is used."""
    return sigma < LAWS["uniform"].limit * (1 - 1e-12)


def predicted(
    parts: ScoreParts, clean: CleanRows, sigma: Float[Tensor, "batch head query"]
) -> Float[Tensor, "batch head query"]:
    """Probability that independent noise of each row's sigma on the keys moves its arg max."""
    out = torch.zeros(sigma.shape, dtype=torch.float64)
    where = (clean.sparse & (sigma > 0)).nonzero()
    for at in where.split(_ROWS):
        b, h, q = at.unbind(1)
        s = parts.s[b, h, q].double().cpu()
        star = clean.star[b, h, q].cpu()[:, None]
        valid = parts.mask[b, h, q].cpu().scatter(1, star, False)
        beta = None
        if parts.bias is not None:
            bias = parts.bias[b, h, q].double().cpu()
            beta = bias.gather(1, star) - bias
        s_star, each = s.gather(1, star).squeeze(1), sigma[b, h, q].double().cpu()
        found = torch.zeros_like(s_star)
        uniform = uniform_has(each)
        for name, rows in (("uniform", uniform), ("lognormal", ~uniform)):
            if bool(rows.any()):
                found[rows] = collapse_probability(
                    s_star[rows],
                    s[rows],
                    each[rows],
                    LAWS[name],
                    valid=valid[rows],
                    beta=None if beta is None else beta[rows],
                    noise_on_q=False,
                )
        out[tuple(at.cpu().unbind(1))] = found
    return out


def with_factors(
    parts: ScoreParts, clean: CleanRows, factor: Float[Tensor, "batch key"]
) -> Bool[Tensor, "batch head query"]:
    """Sparse rows whose arg max moves where each key is multiplied by its factor."""
    wide = factor.to(parts.s)[:, None, None, :]
    w = parts.s * wide
    if parts.bias is not None:
        w = w + parts.bias
    w = w.masked_fill(~parts.mask, -torch.inf)  # a cap keeps every arg max
    own = w.gather(-1, clean.star[..., None]).squeeze(-1)
    return clean.sparse & (w.amax(-1) > own)


def shuffles(
    seed: int, layer: int, prompts: Sequence[int], spared: Bool[Tensor, "batch pos"], draw: int
) -> Int[Tensor, "batch pos"]:
    """A permutation of each prompt's tokens: a function of seed, layer, prompt and draw alone.

    ``spared``: tokens that keep their places.
    """
    n_pos = spared.shape[1]
    out = np.tile(np.arange(n_pos), (len(prompts), 1))
    for row, prompt, stays in zip(out, prompts, spared.cpu().numpy(), strict=True):
        rng = np.random.default_rng((seed, layer, prompt, draw))
        moving = np.flatnonzero(~stays)
        row[moving] = moving[rng.permutation(len(moving))]
    return torch.from_numpy(out)


# -- lengths and directions --------------------------------------------------------------------


def variances(view: LayerView, clean: CleanRows) -> Float[np.ndarray, "head batch 3 keys 3"]:
    """Variance of s_t = |k_t| (q . k_t / |k_t|) over a row's visible keys, summed over rows.

    Axes: head; prompt; all, sparse content, sparse sink rows; all visible keys, all but the first
        token; the scores as they are, with lengths only (each direction's score replaced by their
        mean), with directions only (each length replaced by the mean).
    """
    lengths = view.vectors["k"].double().norm(dim=-1)[:, :, list(view.sites.kv_head_of)]
    length = lengths.transpose(1, 2)[:, :, None, :]  # [batch, head, 1, key]
    s = view.parts.s.double()
    along = s / length.clamp_min(1e-300)
    later = view.visible.clone()
    later &= ~clean.first[:, None, None, :]
    sink = clean.on_first(clean.star)
    kinds = (torch.ones_like(sink), clean.sparse & ~sink, clean.sparse & sink)
    out = np.zeros((s.shape[1], s.shape[0], 3, 2, 3))
    for i, seen in enumerate((view.visible, later)):
        count = seen.sum(-1, keepdim=True).clamp_min(1)

        def mean(x: Tensor, seen: Tensor = seen, count: Tensor = count) -> Tensor:
            total: Tensor = (x * seen).sum(-1, keepdim=True) / count
            return total

        each = (s, length * mean(along), mean(length.expand_as(s)) * along)
        for part, x in enumerate(each):
            variance = mean((x - mean(x)).square()).squeeze(-1)
            for kind, rows in enumerate(kinds):
                chosen = variance * (rows & (seen.sum(-1) > 1))
                out[:, :, kind, i, part] = chosen.sum(-1).transpose(0, 1).cpu().numpy()
    return out


def scale_spread(
    s: Float[Tensor, "batch pos"], first: Bool[Tensor, "batch pos"]
) -> Float[np.ndarray, "batch 2"]:
    """Deviation over mean of a prompt's scales: of all tokens, and without the first ones."""
    rows = [(row, row[~mine.to(row.device)]) for row, mine in zip(s, first, strict=True)]
    both = [[float(x.std(correction=0) / x.mean()) for x in pair] for pair in rows]
    return np.asarray(both)
