"""SpreadReport: attention-weighted L2 norms over each head's median, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hooks.arguments import Settings, check_choice, check_number
from hooks.reports import (
    Curves,
    Form,
    SavedReport,
    Unsound,
    check_numbers,
    first_tokens,
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
_TIE = 1e-12  # of the total weight: what rounding of a running sum may add or lack


@dataclass(frozen=True, kw_only=True)
class SpreadSettings(Settings):
    """How a spread was measured."""

    of: Of
    without_first: bool
    layers: tuple[int, ...]


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
            ValueError: an unknown ``by``, or a share outside (0, 1].
        """
        check_choice("by", by, get_args(SpreadBy))
        share = check_number("share", share, "a share in (0, 1]", lambda x: 0 < x <= 1)
        heads = [self._head(i, h) for i, w in enumerate(self.weights) for h in range(len(w))]
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
        norms, weights = self.norms[index], self.weights[index][head].astype(float)
        norm = norms[head * len(norms) // len(self.weights[index])].astype(float)
        first = first_tokens(self.starts, self.prompt[index], self.position[index])
        counted = ~first if self.settings.without_first else np.ones_like(first)
        median = weighted_quantile(norm[counted], weights[counted], 0.5)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = norm / median
        return _Head(index, head, norm, weights, relative, first, counted)

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
        "weights": [(n, "token") for n in heads],
        "prompt": [("token",) for _ in heads],
        "position": [("token",) for _ in heads],
    }


def _check_numbers(report: SpreadReport) -> None:
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
        "tokens": int((weight > 0).sum()),
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
