"""SpreadReport: attention-weighted L2 norms over each head's median, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from hooks.arguments import Settings, check_choice, check_number
from hooks.reports import (
    Curves,
    Form,
    SavedReport,
    Unsound,
    check_numbers,
    first_tokens,
    one_model,
    per_layer,
    percent,
)

Of = Literal["stream", "q", "k", "v"]
SpreadBy = Literal["token", "head", "layer", "model"]
_WHAT = {
    "stream": "the embeddings at the input of",
    "q": "the queries of",
    "k": "the keys (as they enter the dot product) of",
    "v": "the values of",
}
_STEP = 2.0**-11  # of the logarithm of a norm, where tokens are pooled
_ZERO = -(1 << 40)  # in place of the logarithm of zero
_TIE = 1e-12  # of the total weight: what rounding of a running sum may add or lack


@dataclass(frozen=True, kw_only=True)
class SpreadSettings(Settings):
    """How a spread was measured."""

    of: Of
    without_first: bool
    layers: tuple[int, ...]
    pooled: bool = False  # tokens of like norm together


@dataclass(frozen=True, eq=False, repr=False)
class SpreadReport(SavedReport):
    """L2 norms of what attention reads, with the attention that each receives.

    One array per layer and field; the tokens of all prompts are concatenated.

    Attributes:
        settings: how it was measured.
        model: facts of the model, versions.
        tokens, decoder_tokens: each prompt's tokens as strings; empty where there are none.
        norms: L2 norms ``[vector, token]``: one vector for all heads (stream), or one for each
            key/value head (k, v) or head (q).
        weights: attention that each token receives ``[head, token]``, summed over the queries; over
            a prompt they sum to its number of queries (less what a learned attention sink takes).
        prompt, position: where each token is.
        starts: positions of each prompt's first tokens, where documents are packed into one; empty
            where no prompt holds several.
        totals: where prompts are pooled, in place of ``weights``: those of all tokens of one norm,
            ``[head, norm]``; ``norms`` are then a grid, first tokens apart (``position`` 0, of
            the others 1).
        counts: how many tokens these are, of those with a weight.
    """

    settings: SpreadSettings
    model: Mapping[str, Any]
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    decoder_tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    norms: tuple[Float[np.ndarray, "_ _"], ...] = field(repr=False)
    weights: tuple[Float[np.ndarray, "_ _"], ...] = field(repr=False)
    prompt: tuple[Int[np.ndarray, "_"], ...] = field(repr=False)
    position: tuple[Int[np.ndarray, "_"], ...] = field(repr=False)
    starts: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    # Of pooled reports alone.
    totals: tuple[Float[np.ndarray, "_ _"], ...] = field(repr=False, default_factory=tuple)
    counts: tuple[Int[np.ndarray, "_ _"], ...] = field(repr=False, default_factory=tuple)

    def pooled(self) -> SpreadReport:
        """This report with tokens of like norm together: its size does not grow with the corpus.

        Norms are rounded to a grid in their logarithm, by 0.025% at most; medians move by no more,
        bands and quantiles by 0.0005. Weights stay. Tokens are left out.
        """
        if self.settings.pooled:
            return self
        firsts = [
            first_tokens(self.starts, prompt, position)
            for prompt, position in zip(self.prompt, self.position, strict=True)
        ]
        parts = zip(self.norms, self.weights, firsts, strict=True)
        grids = [_grid(norms, w.astype(float), w > 0, first) for norms, w, first in parts]
        return replace(
            self,
            settings=replace(self.settings, pooled=True),
            tokens=((),) * len(self.tokens),
            decoder_tokens=(),
            starts=(),
            weights=(),
            **_fields(grids),
        )

    def placed(self, places: Int[np.ndarray, "prompt"], n: int) -> SpreadReport:
        """This shard's report, as that of ``n`` prompts, some of which are its own."""
        return replace(self, tokens=((),) * n)

    def alongside(self, later: SpreadReport) -> SpreadReport:
        """The tokens of two parts, pooled, of as many prompts as this one has.

        Raises:
            ValueError: other settings, or another model.
        """
        one_model(self, later)
        grids = []
        for i in range(len(self.norms)):
            arrays = (
                [getattr(part, name)[i] for part in (self, later)]
                for name in ("norms", "totals", "counts", "position")
            )
            norms, totals, counts, position = (np.concatenate(x, -1) for x in arrays)
            grids.append(_grid(norms, totals, counts, position == 0))
        return replace(self, **_fields(grids))

    def to_frame(self, by: SpreadBy = "head", *, share: float = 0.9) -> pd.DataFrame:
        """One row per layer and head (or layer, or one for the model; or per head and token).

        By layer and by model the heads' tokens are pooled, each over its own head's median.

        Args:
            by: ``"token"``, ``"head"``, ``"layer"`` or ``"model"``.
            share: of the weight that the band holds.

        Columns:
            layer, head, label: block index; head; ``L5H1`` (``L5`` by layer).
            tokens: tokens with a weight above 0 (by layer and model: over all heads).
            weight: the attention that they receive.
            median: weighted median of their norms.
            band: the smallest b such that ``share`` of the weight lies in |r - 1| <= b, where r is
                a norm over the median.
            low, high: weighted quantiles of r at (1 - share)/2 and (1 + share)/2.
            first_share: share of all attention that first tokens receive.
            first_norm: weighted median of the first tokens' r.

            By token: layer, head, label, prompt, position, norm, weight, relative (r).

        First tokens are left out of ``tokens`` to ``high`` unless the report was made with
        ``without_first=False``. NaN where a head attends to no other token.

        Raises:
            ValueError: an unknown ``by``, or ``"token"`` of a pooled report; a share outside
                (0, 1].
        """
        known = get_args(SpreadBy)
        check_choice("by", by, [k for k in known if k != "token" or not self.settings.pooled])
        share = check_number("share", share, "a share in (0, 1]", lambda x: 0 < x <= 1)
        weights = self.totals or self.weights
        heads = [self._head(i, h) for i, w in enumerate(weights) for h in range(len(w))]
        if by == "token":
            return pd.concat([head.frame(self) for head in heads], ignore_index=True)
        pooled: dict[tuple[int, ...], list[_Head]] = {}
        for head in heads:
            group = {"head": (head.index, head.head), "layer": (head.index,)}.get(by, ())
            pooled.setdefault(group, []).append(head)
        return pd.DataFrame(
            [{**self._names(by, group[0]), **_measures(group, share)} for group in pooled.values()]
        )

    def _head(self, index: int, head: int) -> _Head:
        """One head's tokens over its median."""
        norms, every = self.norms[index], (self.totals or self.weights)[index]
        weights = every[head].astype(float)
        norm = norms[head * len(norms) // len(every)].astype(float)
        first = first_tokens(self.starts, self.prompt[index], self.position[index])
        counted = ~first if self.settings.without_first else np.ones_like(first)
        median = weighted_quantile(norm[counted], weights[counted], 0.5)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = norm / median
        many = self.counts[index][head] if self.counts else (weights > 0).astype(int)
        return _Head(index, head, norm, weights, relative, first, counted, many)

    def _names(self, by: str, head: _Head) -> dict[str, Any]:
        layer, label = self.settings.layers[head.index], self.model["labels"][head.index]
        if by == "model":
            return {}
        if by == "layer":
            return {"layer": layer, "label": label}
        return {"layer": layer, "head": head.head, "label": f"{label}H{head.head}"}

    # -- words ------------------------------------------------------------------------------

    def glance(self) -> tuple[pd.DataFrame, Curves]:
        """The layers whose norms are spread most."""
        frame = self.to_frame("layer").sort_values("band", ascending=False)
        table = {"layer": frame["label"], "tokens": frame["tokens"], "band": frame["band"]}
        table |= {"low": frame["low"], "high": frame["high"]}
        return pd.DataFrame({**table, "to first tokens": frame["first_share"].map(percent)}), {}

    def summary(self) -> str:
        """A few sentences: how wide the band is, in which heads, and where the first token is."""
        s, whole = self.settings, self.to_frame("model").iloc[0]
        n = len(self.tokens)
        how = "each query once" if s.of == "q" else "weighted by the attention that they receive"
        parts = [
            f"{self.model['name']}: {n} prompt{'s' * (n != 1)}; L2 norms of {_WHAT[s.of]} "
            f"{len(s.layers)} attention layer{'s' * (len(s.layers) != 1)}, {how}, over each head's "
            f"median{', the first token left out' if s.without_first else ''}."
        ]
        heads = self.to_frame().dropna(subset="band")
        if not len(heads):
            return f"{parts[0]} No head attends to any other token: there is no spread to measure."
        least, most = (heads.loc[heads["band"].agg(f)] for f in ("idxmin", "idxmax"))
        parts.append(
            f"90% of the weight lies within ±{_percent(whole['band'])} of the median (heads "
            f"pooled; from {whole['low']:.3g} to {whole['high']:.3g} of it); by head from "
            f"±{_percent(least['band'])} ({least['label']}) to ±{_percent(most['band'])} "
            f"({most['label']})."
        )
        if s.of != "q":
            parts.append(
                f"The first token receives {_percent(whole['first_share'])} of the attention; its "
                f"norm is {whole['first_norm']:.3g} of the median."
            )
        return " ".join(parts)


def _sizes(s: SpreadSettings, model: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    per_layer(s, model, "labels", "heads", "kv_heads")
    heads: list[int] = model["heads"]
    own = {"stream": [1] * len(heads), "q": heads}.get(s.of, model["kv_heads"])
    return {
        "norms": [(n, "token") for n in own],
        "weights": [(n, "token") for n in ([] if s.pooled else heads)],
        "totals": [(n, "token") for n in (heads if s.pooled else [])],
        "counts": [(n, "token") for n in (heads if s.pooled else [])],
        "prompt": [("token",) for _ in heads],
        "position": [("token",) for _ in heads],
    }


def _check_numbers(report: SpreadReport) -> None:
    if report.settings.pooled:
        for name in ("norms", "totals", "counts"):
            for i, values in enumerate(getattr(report, name)):
                check_numbers(f"{name}.{i}", values, 0)
        return
    for i, (prompt, position) in enumerate(zip(report.prompt, report.position, strict=True)):
        last = len(report.tokens) - 1
        check_numbers(f"prompt.{i}", prompt, 0, last)
        # Prompt by prompt, each from its first token on.
        begins = np.concatenate([[True], np.diff(prompt) != 0])[: len(prompt)]
        counted = np.arange(len(prompt)) - np.maximum.accumulate(
            np.where(begins, np.arange(len(prompt)), 0)
        )
        whole = np.array_equal(prompt[begins], np.arange(last + 1))
        if not whole or not np.array_equal(position, counted):
            raise Unsound(f"position.{i}", wanted="0, 1, .. of each prompt in turn", got="others")
        check_numbers(f"norms.{i}", report.norms[i], 0)
        check_numbers(f"weights.{i}", report.weights[i], 0)


_FORM = Form(
    SpreadReport,
    "spread report",
    2,
    lambda settings: None,  # nothing to check beyond the types
    _sizes,
    _check_numbers,
    {"labels": tuple[str, ...], "heads": tuple[int, ...], "kv_heads": tuple[int, ...]},
    {"norms": "F32", "weights": "F32", "prompt": "I32", "position": "I32"},
)


_Grid = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _grid(
    norms: Float[np.ndarray, "vector token"],
    weights: Float[np.ndarray, "head token"],
    counts: Shaped[np.ndarray, "head token"],
    first: Bool[np.ndarray, "token"],
) -> _Grid:
    """Norms, weights, counts and positions of tokens, those of one norm together."""
    with np.errstate(divide="ignore"):
        at = np.rint(np.log(norms.astype(float)) / _STEP)
    keys = 2 * np.where(norms > 0, at, _ZERO).astype(np.int64) + first
    every, place = np.unique(keys, return_inverse=True)
    place, n = place.reshape(keys.shape), len(every)
    of = np.arange(len(weights)) * len(norms) // len(weights)
    sums = [
        np.stack([np.bincount(place[v], x, n) for v, x in zip(of, values, strict=True)])
        for values in (weights, counts)
    ]
    steps = every // 2
    grid = np.where(steps == _ZERO, 0.0, np.exp(steps * _STEP)).astype(np.float32)
    whole = np.repeat(grid[None], len(norms), 0)
    return whole, sums[0], sums[1].astype(np.int64), (1 - every % 2).astype(np.int32)


def _fields(grids: list[_Grid]) -> dict[str, Any]:
    names = ("norms", "totals", "counts", "position")
    fields = {name: tuple(grid[i] for grid in grids) for i, name in enumerate(names)}
    return {**fields, "prompt": tuple(np.zeros_like(grid[3]) for grid in grids)}


@dataclass(frozen=True, eq=False)
class _Head:
    """A head's tokens: norms, weights, norms over the median; which are first, which count."""

    index: int
    head: int
    norm: np.ndarray
    weight: np.ndarray
    relative: np.ndarray
    first: np.ndarray
    counted: np.ndarray
    many: np.ndarray  # tokens

    def frame(self, report: SpreadReport) -> pd.DataFrame:
        """One row per token."""
        names = report._names("head", self)
        return pd.DataFrame(
            {
                **{name: [value] * len(self.norm) for name, value in names.items()},
                "prompt": report.prompt[self.index],
                "position": report.position[self.index],
                "norm": self.norm,
                "weight": self.weight,
                "relative": self.relative,
            }
        )


def _measures(heads: list[_Head], share: float) -> dict[str, Any]:
    """Measures of one head, or of several pooled."""

    def pool(name: str, which: str) -> np.ndarray:
        return np.concatenate([getattr(h, name)[getattr(h, which)] for h in heads])

    weight, relative = pool("weight", "counted"), pool("relative", "counted")
    first, total = pool("weight", "first"), sum(float(h.weight.sum()) for h in heads)
    return {
        "tokens": int(pool("many", "counted").sum()),
        "weight": float(weight.sum()),
        "median": weighted_quantile(pool("norm", "counted"), weight, 0.5),
        "band": weighted_quantile(np.abs(relative - 1), weight, share),
        "low": weighted_quantile(relative, weight, (1 - share) / 2),
        "high": weighted_quantile(relative, weight, (1 + share) / 2),
        "first_share": float(first.sum()) / total if total > 0 else np.nan,
        "first_norm": weighted_quantile(pool("relative", "first"), first, 0.5),
    }


def weighted_quantile(
    x: Float[np.ndarray, "token"], weight: Float[np.ndarray, "token"], p: float
) -> float:
    """The least x such that the values up to x hold the share p of the total weight.

    With integer weights this is the inverse distribution function of ``np.repeat(x, weight)``.
    NaN where there is no weight, or where an x with weight is NaN.
    """
    some = weight > 0
    x, weight = x[some], weight[some]
    if not len(x) or np.isnan(x).any():
        return float("nan")
    order = np.argsort(x, kind="stable")
    running = np.cumsum(weight[order], dtype=float)
    at = int(np.searchsorted(running, (p - _TIE) * running[-1]))
    return float(x[order[min(at, len(x) - 1)]])


def _percent(x: float) -> str:
    return f"{100 * x:.2g}%" if x < 0.0995 else f"{100 * x:.3g}%"
