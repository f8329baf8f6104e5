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
    broken = ~(view.scores.amax(-1) < torch.inf)  # NaN is the largest
    if bool(broken.any()):
        rows = broken.flatten(1).sum(1)
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
    f = factor.double()
    middle = f.mean(-1, keepdim=True)
    off = f - middle  # equal factors then have no spread at all
    each = torch.stack([torch.ones_like(off), off, off.square()], -1)[:, None]
    count, first, second = (view.visible.double() @ each).unbind(-1)
    mean, variance = _moments(count, first, second)
    sigma: Tensor = variance.sqrt() / (middle[:, None] + mean)
    return sigma


def _moments(count: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, from how many were summed, their sum and that of their squares."""
    count = count.clamp_min(1)
    mean = first / count
    return mean, (second / count - mean.square()).clamp_min(0)


def uniform_has(sigma: Tensor) -> Bool[Tensor, "*shape"]:
    """True where the uniform law can have this sigma; beyond, the lognormal law is used."""
    return sigma < LAWS["uniform"].limit * (1 - 1e-12)


class SparseRows:
    """A layer's sparse rows, gathered: what factors on their keys do to their arg max."""

    def __init__(self, parts: ScoreParts, clean: CleanRows) -> None:
        self._all, self._at = clean.sparse, clean.sparse.nonzero(as_tuple=True)
        self.s, self.seen = parts.s[self._at], parts.mask[self._at]
        self.bias = None if parts.bias is None else parts.bias[self._at]
        self.star = clean.star[self._at][:, None]

    def _of_all(self, found: Tensor) -> Tensor:
        """In their places among all rows ``[batch, head, query]``; 0 for the others."""
        out = torch.zeros(self._all.shape, dtype=found.dtype, device=self._all.device)
        out[self._at] = found.to(out.device)
        return out

    def predicted(
        self, sigma: Float[Tensor, "batch head query"]
    ) -> Float[Tensor, "batch head query"]:
        """Probability that independent noise of each row's sigma on the keys moves its arg max."""
        each = sigma[self._at].double().cpu()
        found, uniform = torch.zeros_like(each), uniform_has(each)
        for name, some in (("uniform", uniform), ("lognormal", ~uniform)):
            for rows in (some & (each > 0)).nonzero().squeeze(1).split(_ROWS):
                at = rows.to(self.s.device)
                s, star = self.s[at].double().cpu(), self.star[at].cpu()
                beta = None
                if self.bias is not None:
                    bias = self.bias[at].double().cpu()
                    beta = bias.gather(1, star) - bias
                found[rows] = collapse_probability(
                    s.gather(1, star).squeeze(1),
                    s,
                    each[rows],
                    LAWS[name],
                    valid=self.seen[at].cpu().scatter(1, star, False),
                    beta=beta,
                    noise_on_q=False,
                )
        return self._of_all(found)

    def moved(self, factor: Float[Tensor, "batch key"]) -> Bool[Tensor, "batch head query"]:
        """Those whose arg max moves where each key is multiplied by its factor."""
        w = self.s * factor.to(self.s)[self._at[0]]
        if self.bias is not None:
            w = w + self.bias
        w = w.masked_fill(~self.seen, -torch.inf)  # a cap keeps every arg max
        return self._of_all(w.amax(-1) > w.gather(-1, self.star).squeeze(-1))


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
    length = lengths.transpose(1, 2)[..., None].clamp_min(1e-150)  # [batch, head, key, 1]
    middle = length.mean(2, keepdim=True)
    off = length - middle
    sets = torch.stack([torch.ones_like(clean.first), ~clean.first], -1)[:, None].double()
    sets = sets.expand(*length.shape[:3], 2)
    s, seen = view.parts.s.double(), view.visible.double()
    # Sums over each set's visible keys: of s, of s_t / |k_t| and of |k_t|; and of their squares.
    count, long, long_2 = (seen @ torch.cat([sets, sets * off, sets * off**2], -1)).split(2, -1)
    own, along = (s @ torch.cat([sets, sets / length], -1)).split(2, -1)
    own_2, along_2 = (s.square_() @ torch.cat([sets, sets / length**2], -1)).split(2, -1)
    _, of_own = _moments(count, own, own_2)
    along, of_along = _moments(count, along, along_2)
    long, of_long = _moments(count, long, long_2)
    parts = [of_own, along.square() * of_long, (middle + long).square() * of_along]
    sink = clean.on_first(clean.star)
    kinds = torch.stack([torch.ones_like(sink), clean.sparse & ~sink, clean.sparse & sink], -1)
    chosen = torch.stack(parts, -1) * (count > 1)[..., None]
    return torch.einsum("bhqn,bhqcp->hbncp", kinds.double(), chosen).cpu().numpy()


def scale_spread(
    s: Float[Tensor, "batch pos"], first: Bool[Tensor, "batch pos"]
) -> Float[np.ndarray, "batch 2"]:
    """Deviation over mean of a prompt's scales: of all tokens, and without the first ones."""
    rows = [(row, row[~mine.to(row.device)]) for row, mine in zip(s, first, strict=True)]
    both = [[float(x.std(correction=0) / x.mean()) for x in pair] for pair in rows]
    return np.asarray(both)
