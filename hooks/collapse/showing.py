"""Picks the most fragile rows while a probe runs, and noises them at its end.

No more than the wanted rows are held at any time, each with one row of scores.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from hooks.collapse.kept import KeptRows, from_parts
from hooks.collapse.settings import ProbeSettings
from hooks.kernels import MASKED
from hooks.model import ROLES, Role
from hooks.noise import Law, NormNoise, get_law, numbers, stream_keys
from hooks.sites import LayerSites, ScoreParts, uncapped

if TYPE_CHECKING:
    from hooks.kernels import Layer, Table

DRAWS = 16
MARGINS = (1.1, 1.01, 1.001)
"""Beyond the least sigma that moves a row: seen, and not undone by rounding."""
_LADDER, _BISECTIONS = 64, 40
_UNBOUNDED = 1.0  # up to which sigma a law without a limit is searched
_AT_ONCE = 1 << 20

_Key = tuple[float, int, int, int, int]


@dataclass(frozen=True)
class Held:
    """One row: where it is, and its clean scores over the keys up to the last visible one."""

    order: _Key  # half-width, layer, head, prompt, query: the order of ``fragile``
    key: int
    rival: int
    scores: Float[np.ndarray, "key"]
    qk: Float[np.ndarray, "key"] | None
    eps: float
    number: int | None = None  # of its prompt, for the noise, where it is not its place


class Showing:
    """The ``keep`` most fragile rows seen so far; callable from several threads."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._held: list[Held] = []
        self._lock = threading.Lock()

    def take(
        self,
        piece: Table,
        layer: Layer,
        *,
        index: int,
        n_heads: int,
        prompts: np.ndarray,
        first: tuple[int, int],
        eps: float,
    ) -> None:
        """Look through a filled piece of the table for rows worth keeping.

        Args:
            piece: the rows, as the scan left them.
            layer: the scores they were read from.
            index, n_heads: of the layer.
            prompts: index of each prompt of the batch.
            first: index of these scores' first matrix and query in the whole layer.
            eps: rounding of the dtype that the scores were made in.
        """
        n_rows = int(piece.used[0])
        if not self.keep or not n_rows:
            return
        matrix, query, key, rival, count = piece.row[:n_rows].T
        a = piece.a[np.cumsum(count) - count]  # competitors come nearest first
        near = np.flatnonzero(a < min(1.0, np.nextafter(self._worst(), 2)))
        head, prompt = matrix % n_heads, prompts[matrix // n_heads]
        order = np.lexsort([query[near], prompt[near], head[near], a[near]])
        found = []
        for i in near[order[: self.keep]]:
            at = (int(matrix[i]) - first[0], int(query[i]) - first[1])
            row = layer.scores[at]
            seen = int(np.flatnonzero(row > MASKED)[-1]) + 1
            found.append(
                Held(
                    order=(float(a[i]), index, int(head[i]), int(prompt[i]), int(query[i])),
                    key=int(key[i]),
                    rival=int(rival[i]),
                    scores=row[:seen].astype(np.float64),
                    qk=layer.qk[at][:seen].astype(np.float64) if layer.qk.size else None,
                    eps=eps,
                )
            )
        self.hold(found)

    def hold(self, found: Sequence[Held]) -> None:
        """Keep those of these rows that are fragile enough."""
        with self._lock:
            both = sorted([*self._held, *found], key=lambda held: held.order)
            self._held = both[: self.keep]

    def absorb(self, other: Showing, before: int, number: int) -> None:
        """Take over what another one holds, of prompts that ``before`` others precede.

        The noise of its first prompt is drawn under ``number``.
        """
        moved = []
        for held in other._held:
            a, layer, head, prompt, query = held.order
            order = (a, layer, head, before + prompt, query)
            moved.append(replace(held, order=order, number=number + prompt))
        with self._lock:
            self._held = sorted([*self._held, *moved], key=lambda held: held.order)[: self.keep]

    def numbers(self) -> dict[str, int]:
        """Under which number the noise of each held row's prompt is drawn."""
        return {str(held.order[3]): n for held in self._held if (n := held.number) is not None}

    def _worst(self) -> float:
        """Half-width beyond which no further row is kept."""
        with self._lock:
            return self._held[-1].order[0] if len(self._held) == self.keep else 1.0

    def rows(
        self,
        settings: ProbeSettings,
        layers: Sequence[LayerSites],
        first_prompt: int,
        cutoff: float,
    ) -> KeptRows:
        """The finished rows: those nearer than the table's ``cutoff``, noised."""
        parts: list[dict[str, Any]] = []
        near = [held for held in self._held if held.order[0] < cutoff]
        noise, roles = _noise(settings, 0.0, 0), [r for r in ROLES if r != "v"]
        keys = stream_keys(
            noise,
            roles=roles,
            layers=np.asarray([layers[held.order[1]].layer for held in near])[None, :, None],
            prompts=np.asarray([_number(held, first_prompt) for held in near])[None, :, None],
            draws=np.arange(DRAWS)[None, None, :],
        )
        for at, held in enumerate(near):
            a, layer, head, prompt, query = held.order
            streams: dict[str, np.ndarray] = {role: keys[i, at] for i, role in enumerate(roles)}
            noising = _Noising(held, layers[layer], settings, first_prompt, streams)
            sigma, draw, noisy = noising.just_strong_enough()
            parts.append(
                {
                    "layer": layer,
                    "head": head,
                    "prompt": prompt,
                    "query": query,
                    "key": held.key,
                    "rival": held.rival,
                    "half_width": a,
                    "sigma": sigma,
                    "draw": draw,
                    "clean": noising.weights(None),
                    "noisy": noisy,
                }
            )
        return from_parts(parts)


def _number(held: Held, first_prompt: int) -> int:
    """The number under which the noise of a row's prompt is drawn."""
    return first_prompt + held.order[3] if held.number is None else held.number


class _Noising:
    """One row under the draws of NormNoise."""

    def __init__(
        self,
        held: Held,
        sites: LayerSites,
        settings: ProbeSettings,
        first_prompt: int,
        streams: Mapping[str, np.ndarray],
    ) -> None:
        _, _, self.head, _, self.query = held.order
        self.held, self.sites, self.settings = held, sites, settings
        self.prompt = _number(held, first_prompt)
        self.law = get_law(settings.law)
        self.streams = streams
        self.mask = held.scores > MASKED
        w = np.where(self.mask, held.scores, 0.0)
        if sites.soft_cap > 0:
            w = uncapped(torch.from_numpy(w), sites.soft_cap, held.eps).numpy()
        self.s = w if held.qk is None else np.where(self.mask, held.qk, 0.0)
        self.bias = w - self.s

    def just_strong_enough(self) -> tuple[float, int, np.ndarray]:
        """(sigma, draw, attention) as :class:`KeptRows` says; NaN, -1 and NaNs where none moves."""
        q, k = self._base()
        least = self._searched(q, k) if self.law.name == "lognormal" else self._solved(q, k)
        for draw in np.argsort(least, kind="stable"):
            for margin in MARGINS:
                sigma = float(margin * least[draw])
                if not self._allowed(sigma):
                    continue
                weights = self.weights(_noise(self.settings, sigma, int(draw)))
                if int(np.argmax(weights)) != self.held.key:
                    return sigma, int(draw), weights
        return math.nan, -1, np.full(len(self.s), np.nan)

    def weights(self, noise: NormNoise | None) -> np.ndarray:
        """Attention under noise, or clean."""
        factor = None if noise is None else torch.from_numpy(self._factor(noise))[None, None, None]
        s, bias, mask = (
            torch.from_numpy(x)[None, None, None] for x in (self.s, self.bias, self.mask)
        )
        parts = ScoreParts(
            s=s,
            bias=bias,
            mask=mask,
            soft_cap=self.sites.soft_cap,
            sink=None if not self.sites.sink else torch.tensor([self.sites.sink[self.head]]),
        )
        return np.asarray(parts.pattern(factor)[0, 0, 0])

    def _allowed(self, sigma: float) -> bool:
        return sigma < self.law.limit or (self.law.limit_included and sigma == self.law.limit)

    def _factor(self, noise: NormNoise) -> Float[np.ndarray, "key"]:
        """(1 + kq)(1 + k_t), the float32 factors that NormNoise writes."""
        given: dict[str, Any] = {"layer": self.sites.layer, "prompts": [self.prompt]}
        factor = np.ones(len(self.s))
        if "q" in noise.on:
            heads = self.sites.n_heads
            q = noise.factors(role="q", n_heads=heads, n_pos=1, start=self.query, **given)
            factor *= float(q[0, 0, self.head])
        if "k" in noise.on:
            heads, mine = self.sites.n_kv_heads, self.sites.kv_head_of[self.head]
            k = noise.factors(role="k", n_heads=heads, n_pos=len(self.s), **given)
            factor *= k[0, :, mine].double().numpy()
        return factor

    def _base(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers that give the draws' factors: of the query ``[draw]``, of the keys."""
        n, sites, on = len(self.s), self.sites, self.settings.on
        q, k = np.full((2, DRAWS), 0.5), np.full((DRAWS, n), 0.5)
        if "q" in on:
            q[0] = self._drawn("q", sites.n_heads, self.head, self.query, 1)[:, 0]
        if "k" in on:
            k = self._drawn("k", sites.n_kv_heads, sites.kv_head_of[self.head], 0, n)
        own, keys = (self.law.base(torch.from_numpy(u)).numpy() for u in (q[0], k))
        return own, keys

    def _drawn(
        self, role: Role, n_heads: int, head: int, start: int, n: int
    ) -> Float[np.ndarray, "draw pos"]:
        """Uniform numbers of a head in all draws; as many draws at once as a few MB hold."""
        noise, keys = _noise(self.settings, 0.0, 0), self.streams[role]
        step = max(1, _AT_ONCE // (n * n_heads))
        parts = []
        for first in range(0, DRAWS, step):
            some = keys[first : first + step]
            u = numbers(noise, some, n_pos=n, n_heads=n_heads, start=start)
            parts.append(u[:, :, head % u.shape[-1]])
        return np.concatenate(parts)

    def _solved(self, q: np.ndarray, k: np.ndarray) -> Float[np.ndarray, "draw"]:
        """Least sigma that moves the row, by draw, where factors are linear in sigma; else inf.

        Competitor t wins where (1 + sigma z_q)((1 + sigma z_t) s_t - (1 + sigma z_*) s_*) exceeds
        b_* - b_t: the least positive root of a quadratic that is negative at zero.
        """
        scale = math.sqrt(3) if self.law.name == "uniform" else 1.0
        star, s = self.held.key, self.s
        z, z_q = scale * k, scale * q[:, None]
        pull = z * s - z[:, [star]] * s[star]
        gap = s - s[star]
        square, slope = z_q * pull, z_q * gap + pull
        level = gap - (self.bias[star] - self.bias)
        with np.errstate(invalid="ignore", divide="ignore"):
            reach = slope + np.sqrt(slope**2 - 4 * square * level)
            roots = np.where(reach > 0, -2 * level / reach, math.inf)
        roots[:, ~self.mask] = math.inf
        roots[:, star] = math.inf
        least: np.ndarray = np.where(np.isnan(roots), math.inf, roots).min(1)
        return least

    def _searched(self, q: np.ndarray, k: np.ndarray) -> Float[np.ndarray, "draw"]:
        """Least sigma that moves the row, by draw, for any law: a ladder, then bisection."""
        end = self.law.limit if math.isfinite(self.law.limit) else _UNBOUNDED
        ladder = np.geomspace(self.held.order[0] / 20, end, _LADDER)
        first = np.full(len(q), _LADDER)
        for step in range(_LADDER)[::-1]:
            first[self._moved(np.full(len(q), ladder[step]), q, k)] = step
        high = ladder[np.minimum(first, _LADDER - 1)]
        low = np.where(first > 0, ladder[np.clip(first - 1, 0, _LADDER - 1)], 0.0)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            moved = self._moved(middle, q, k)
            low, high = np.where(moved, low, middle), np.where(moved, middle, high)
        return np.where(first < _LADDER, high, math.inf)

    def _moved(self, sigma: np.ndarray, q: np.ndarray, k: np.ndarray) -> Bool[np.ndarray, "draw"]:
        factor = np.ones_like(k)
        for role, base in (("q", q[:, None]), ("k", k)):
            if role in self.settings.on:
                factor = factor * _factor_of(self.law, base, sigma)
        w = np.where(self.mask, factor * self.s + self.bias, -math.inf)
        moved: np.ndarray = w.argmax(1) != self.held.key
        return moved


def _noise(settings: ProbeSettings, sigma: float, draw: int) -> NormNoise:
    return NormNoise(
        sigma=sigma,
        on=settings.on,
        law=settings.law,
        shared=settings.shared,  # type: ignore[arg-type]
        seed=settings.seed,
        draw=draw,
    )


def _factor_of(law: Law, base: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Log-normal factors of each draw's own sigma (see :class:`hooks.LogNormal`)."""
    assert law.name == "lognormal"
    s = np.sqrt(np.log1p(sigma * sigma))[:, None]
    return np.asarray(np.exp(s * base - s * s / 2))
