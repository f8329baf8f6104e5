"""InterferenceReport: which sparse rows attend elsewhere under a frozen norm, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hooks.arguments import Settings, check_choice, check_integers
from hooks.collapse import CONTENT, SINK, By
from hooks.measures.interference.count import ALL_ROWS, CONTENT_ROWS, DIRECTION, LENGTH, TOTAL
from hooks.reports import (
    Curves,
    Form,
    PoolingReport,
    Unsound,
    check_counts,
    check_numbers,
    check_sums,
    moments,
    per_layer,
    percent,
    se_moments,
    se_prompts,
    told,
)

PARTS: Final = {
    "scale": "",
    "outliers": "what the {} outlier dimensions add to ",
    "rest": "what all but the {} outlier dimensions add to ",
}
"""What of a scale is frozen, in words."""
_DROP: dict[str, tuple[int, ...]] = {"head": (), "layer": (1,), "model": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class InterferenceSettings(Settings):
    """How interference was measured; two reports of equal settings can be merged."""

    on: tuple[str, ...]
    constants: tuple[float, ...]
    sparse: float
    spare_first: bool
    draws: int
    layers: tuple[int, ...]
    seed: int
    part: str = "scale"
    outliers: int = 3
    pooled: bool = False  # sums over all prompts, with moments, in place of sums for each


@dataclass(frozen=True, eq=False, repr=False)
class InterferenceReport(PoolingReport):
    """Sparse rows that attend to another token once their layer's norm has one scale for all.

    The last axis of most arrays is the kind of row: 0 for rows that attend to content, 1 for rows
    that attend to the first token (attention sinks).

    Attributes:
        settings: how it was measured.
        model: facts of the model, versions.
        first_prompt: index of the first prompt, where this is part of a corpus.
        tokens, decoder_tokens: each prompt's tokens as strings; empty where there are none.
        examined: rows with two or more visible keys, sparse or not.
        ties: sparse rows left out, as two keys share their maximum.
        rows: sparse rows.
        constant: the default constant, the median scale of each prompt; where only a part of it is
            frozen, the median of that part's root mean square.
        scale_spread: deviation over mean of each prompt's scales: of all tokens, and without the
            first.
        loose, strict, to_first: rows whose arg max moves in the model with the frozen norm; that
            are then sparse again; whose new arg max is the first token.
        factored: rows whose arg max moves where the factors s_t/c multiply the clean keys.
        permuted: rows that move so with the factors shuffled among the prompt's tokens, draw by
            draw.
        predicted: sum over rows of the probability that independent noise on the keys, of the same
            relative spread as the factors that the row sees, moves the arg max.
        sigma_squared: sum over sparse rows of that spread squared.
        lognormal: rows whose spread no uniform law can have, predicted with the lognormal law.
        variance: sums over rows of the scores' variance over visible keys. Axes after the prompt:
            all, sparse content, sparse sink rows; all keys, all but the first; as it is, by lengths
            only, by directions only.
        positions, targets: scored positions of each prompt, and those with a target.
        kl, agree, loss: sums over them with the norm of one layer frozen, for q, k, v and whatever
            else reads it: KL(clean || frozen), nats; the clean top token; -log p(target). Without
            constants where the output was not requested.
        clean_loss: -log p(target) of the model as it is.
        squares: where prompts are pooled, the sums of ``scale_spread`` squared.
        moments: where prompts are pooled, of all rows, then of content rows; of each head, then
            each layer, then the model: prompts with sparse rows, and over prompts with c sparse
            rows, x of them moved, the sums of c^2, and of xc and x^2 by frozen vectors and
            constant.
    """

    settings: InterferenceSettings
    model: Mapping[str, Any]
    first_prompt: int
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    decoder_tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    examined: Int[np.ndarray, "layer head prompt"] = field(repr=False)
    ties: Int[np.ndarray, "layer head prompt"] = field(repr=False)
    rows: Int[np.ndarray, "layer head prompt kind"] = field(repr=False)
    constant: Float[np.ndarray, "layer prompt"] = field(repr=False)
    scale_spread: Float[np.ndarray, "layer prompt 2"] = field(repr=False)
    loose: Int[np.ndarray, "on constant layer head prompt kind"] = field(repr=False)
    strict: Int[np.ndarray, "on constant layer head prompt kind"] = field(repr=False)
    to_first: Int[np.ndarray, "on constant layer head prompt kind"] = field(repr=False)
    factored: Int[np.ndarray, "layer head prompt kind"] = field(repr=False)
    permuted: Int[np.ndarray, "draw layer head prompt kind"] = field(repr=False)
    predicted: Float[np.ndarray, "layer head prompt kind"] = field(repr=False)
    sigma_squared: Float[np.ndarray, "layer head prompt kind"] = field(repr=False)
    lognormal: Int[np.ndarray, "layer head prompt kind"] = field(repr=False)
    variance: Float[np.ndarray, "layer head prompt 3 2 3"] = field(repr=False)
    positions: Int[np.ndarray, "prompt"] = field(repr=False)
    targets: Int[np.ndarray, "prompt"] = field(repr=False)
    kl: Float[np.ndarray, "output layer prompt"] = field(repr=False)
    agree: Float[np.ndarray, "output layer prompt"] = field(repr=False)
    loss: Float[np.ndarray, "output layer prompt"] = field(repr=False)
    clean_loss: Float[np.ndarray, "prompt"] = field(repr=False)
    # Of pooled reports alone.
    squares: Float[np.ndarray, "pooled_layer 2"] = field(
        repr=False, default_factory=lambda: np.zeros((0, 2))
    )
    moments: Float[np.ndarray, "moment 2 group"] = field(
        repr=False, default_factory=lambda: np.zeros((0, 2, 0))
    )

    # -- rates ------------------------------------------------------------------------------

    def to_frame(self, by: By = "head") -> pd.DataFrame:
        """One row per frozen vectors, constant, layer and head (or layer, or model).

        Columns:
            on, constant: the vectors that the frozen norm reached (``"k"``: q is the clean one);
                the constant, in each prompt's median scale.
            layer, head, label: block index; head; ``L5H1`` (``L5`` by layer).
            rows, sinks: sparse rows; those that attend to the first token.
            moved, strict: share of the sparse rows that attend to another token in the model with
                the frozen norm; that do so and are sparse again.
            moved_content, moved_sinks: the loose share of either kind.
            to_first: share of the sparse content rows whose new token is the first.
            factored, permuted, predicted (and ``_content``): shares that move where the factors
                s_t/c multiply the clean keys; where they do so shuffled among the tokens; under
                independent noise of the same spread. They do not depend on ``on`` and the constant
                (but for layers that add a bias to the scores: there they are of the constant 1).
            sigma: RMS over the sparse rows of the relative spread of the factors that a row sees.
            lognormal: share of the sparse rows whose spread no uniform law can have.
            scale_spread, scale_spread_rest: deviation over mean of a prompt's scales, RMS over
                prompts (and layers): all tokens, without the first.
            length_share, direction_share: what remains of the scores' variance with lengths only,
                and with directions only; all rows, all keys. They need not add up to one: lengths
                and directions correlate.
            length_share_sparse, direction_share_sparse: of sparse content rows.
            length_share_rest, direction_share_rest: of all rows, without the first key.
            se, se_content: standard error over prompts of ``moved``, ``moved_content`` (NaN for one
                prompt).
            kl, agree, loss_change: with everything that reads the norm frozen, per scored position
                (by layer only; NaN where it was not requested, and for ``on="k"``).

        Shares are NaN where there are no rows.

        Raises:
            ValueError: an unknown ``by``.
        """
        check_choice("by", by, _DROP)
        frames = [
            self._one(by, i, j)
            for i in range(len(self.settings.on))
            for j in range(len(self.settings.constants))
        ]
        frame = pd.concat(frames, ignore_index=True)
        if by == "head":  # layers may have different numbers of heads
            known = dict(zip(self.settings.layers, self.model["heads"], strict=True))
            frame = frame[frame["head"] < frame["layer"].map(known)].reset_index(drop=True)
        return frame

    def _one(self, by: By, on: int, constant: int) -> pd.DataFrame:
        """The rows of one kind of freezing."""
        drop = _DROP[by]

        def pool(x: np.ndarray) -> np.ndarray:
            """``[layer, head, prompt, ...]``, summed over what ``by`` leaves out."""
            return x.sum(axis=drop) if drop else x

        rows = pool(self.rows)  # [group..., prompt, kind]
        names = self._names(by, rows.shape[:-2])
        columns: dict[str, Any] = {
            "on": self.settings.on[on],
            "constant": self.settings.constants[constant],
            **names,
            "rows": rows.sum((-1, -2)),
            "sinks": rows[..., SINK].sum(-1),
        }
        at = (on, constant)
        with np.errstate(invalid="ignore", divide="ignore"):
            columns |= _shares("moved", pool(self.loose[at]), rows, sinks=True)
            columns["strict"] = _share(pool(self.strict[at]), rows)
            first = pool(self.to_first[at])[..., CONTENT].sum(-1)
            columns["to_first"] = first / rows[..., CONTENT].sum(-1)
            columns |= _shares("factored", pool(self.factored), rows)
            permuted = self.permuted.mean(0) if self.settings.draws else self.predicted * np.nan
            columns |= _shares("permuted", pool(permuted), rows)
            columns |= _shares("predicted", pool(self.predicted), rows)
            columns["sigma"] = np.sqrt(_share(pool(self.sigma_squared), rows))
            columns["lognormal"] = _share(pool(self.lognormal), rows)
            columns |= self._scales(by, rows.shape[:-2])
            columns |= _variance_shares(pool(self.variance).sum(len(rows.shape) - 2))
            moved = pool(self.loose[at]).astype(float)
            for which, name in enumerate(("se", "se_content")):
                columns[name] = self._error(by, at, which, _of(which, moved), _of(which, rows))
            if by == "layer":
                columns |= self._output(on, constant)
        shape = rows.shape[:-2]
        return pd.DataFrame(
            {name: np.broadcast_to(values, shape).ravel() for name, values in columns.items()}
        )

    def _error(
        self, by: By, at: tuple[int, int], which: int, moved: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Standard error over prompts of the share that moves, ``[group...]``."""
        if not self.settings.pooled:
            return se_prompts(moved, rows)
        n_layers, n_heads = self.examined.shape[:2]
        ends = np.cumsum([0, n_layers * n_heads, n_layers, 1])
        group = ("head", "layer", "model").index(by)
        mine = self.moments[:, which, ends[group] : ends[group + 1]]
        sums, counts = np.asarray(moved.sum(-1)), np.asarray(rows.sum(-1))
        index = at[0] * len(self.settings.constants) + at[1]
        n_x = (len(mine) - 2) // 2
        some = mine[[0, 1, 2 + index, 2 + n_x + index]].reshape(4, *counts.shape)
        return np.asarray(se_moments(some, sums[None], counts)[0])

    def _over_prompts(self) -> dict[str, np.ndarray]:
        loose = self.loose.reshape(-1, *self.loose.shape[2:]).astype(float)
        both = [
            moments(_groups(_of(which, loose)), _groups(_of(which, self.rows))) for which in (0, 1)
        ]
        return {"squares": (self.scale_spread**2).sum(1), "moments": np.stack(both, 1)}

    def _names(self, by: By, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        if by == "model":
            return {}
        layer = np.asarray(self.settings.layers, dtype=int)
        label = np.asarray(self.model["labels"])
        if by == "layer":
            return {"layer": layer, "label": label}
        head = np.arange(shape[1])
        both = np.char.add(label[:, None], np.asarray([f"H{h}" for h in head])[None])
        return {"layer": layer[:, None], "head": head[None], "label": both}

    def _scales(self, by: By, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        squares = (self.scale_spread**2).sum(1)
        spread = np.sqrt((self.squares if self.settings.pooled else squares) / len(self.tokens))
        if by == "model":
            spread = np.sqrt((spread**2).mean(0))
        if by == "head":
            spread = spread[:, None, :]
        return {
            n: np.asarray(spread[..., i])
            for i, n in enumerate(("scale_spread", "scale_spread_rest"))
        }

    def _output(self, on: int, constant: int) -> dict[str, Any]:
        if not len(self.kl) or self.settings.on[on] == "k":
            return dict.fromkeys(("kl", "agree", "loss_change"), math.nan)
        scored, known = self.positions.sum(), self.targets.sum()
        change = self.loss[constant].sum(-1) - self.clean_loss.sum()
        return {
            "kl": self.kl[constant].sum(-1) / scored,
            "agree": self.agree[constant].sum(-1) / scored,
            "loss_change": change / known if known else np.full_like(change, math.nan),
        }

    # -- words ------------------------------------------------------------------------------

    def glance(self) -> tuple[pd.DataFrame, Curves]:
        """The layers whose rows move most, with the first frozen vectors and constant."""
        frame, settings = self.to_frame("layer"), self.settings
        first = (frame["on"] == settings.on[0]) & (frame["constant"] == settings.constants[0])
        frame = frame[first].sort_values("moved", ascending=False)
        shares = {"moved": "moved", "sinks left out": "moved_content", "shuffled": "permuted"}
        table = {"layer": frame["label"], "sparse rows": frame["rows"]}
        table |= {name: frame[column].map(percent) for name, column in shares.items()}
        return pd.DataFrame({**table, "independent noise": frame["predicted"].map(percent)}), {}

    def summary(self) -> str:
        """A few sentences: what moved, what noise of that size would have moved, and lengths."""
        s, n = self.settings, len(self.tokens)
        whole = self.to_frame("model")
        # The constant nearest to the default, and k alone where it was measured.
        near = whole.iloc[(np.log(whole["constant"])).abs().argsort(kind="stable")].iloc[0]
        first = ", but the first token keeps its own" if s.spare_first else ""
        parts = [
            f"{self.model['name']}: {n} prompt{'s' * (n != 1)}; {PARTS[s.part].format(s.outliers)}"
            "the scale of the norm before "
            f"{len(s.layers)} attention layer{'s' * (len(s.layers) != 1)} frozen at "
            f"{_times(near['constant'])}each prompt's median, one layer at a time{first}, for "
            f"{' and '.join(near['on'])}."
        ]
        if not near["rows"]:
            parts.append(f"No row has a maximum >= {s.sparse:g}: nothing to move.")
        else:
            parts += self._moved(near)
        parts.append(
            f"The scales vary by {near['scale_spread']:.1%} of their mean "
            f"({near['scale_spread_rest']:.1%} without the first token). Of the scores' variance "
            f"over a row's keys, {near['length_share']:.1%} remains with the keys' lengths alone "
            f"and {near['direction_share']:.1%} with their directions alone."
        )
        if len(self.kl):
            layers = self.to_frame("layer").dropna(subset="kl")
            layers = layers[layers["constant"] == near["constant"]]
            worst = layers.loc[layers["kl"].idxmax()]
            parts.append(
                f"With everything that reads the norm frozen, KL(clean || frozen) is at most "
                f"{worst['kl']:.3g} nats per position ({worst['label']})."
            )
        return " ".join([*parts, told(self.model)])

    def _moved(self, near: pd.Series) -> list[str]:
        content = int(near["rows"] - near["sinks"])
        error = "" if math.isnan(near["se"]) else f" (standard error {near['se']:.2%})"
        parts = [
            f"Of {int(near['rows'])} sparse rows, {int(near['sinks'])} of them on the first token, "
            f"{near['moved']:.2%}{error} attend to another token then."
        ]
        if near["sinks"] and content:
            parts.append(
                f"Without the sinks: {near['moved_content']:.2%} ({near['to_first']:.2%} to the "
                "first token)."
            )
        kind = "_content" if content else ""
        where = " of the content rows" if near["sinks"] and content else ""
        shuffled = f"; the same factors, shuffled, move {near['permuted' + kind]:.2%}"
        parts.append(
            f"Independent noise on k of the spread that the rows see (sigma = {near['sigma']:.3g}) "
            f"would move {near['predicted' + kind]:.2%}{where}"
            f"{shuffled * bool(self.settings.draws)}."
        )
        return parts


def _check_settings(s: InterferenceSettings) -> None:
    if not s.on or len({*s.on}) < len(s.on) or {*s.on} - {"k", "qk"}:
        raise Unsound("settings.on", wanted="some of ['k', 'qk'], each once", got=f"{s.on}")
    if not s.constants or len({*s.constants}) < len(s.constants) or min(s.constants) <= 0:
        got = f"{s.constants}"
        raise Unsound("settings.constants", wanted="positive numbers, each once", got=got)
    if not 0 < s.sparse <= 1:
        raise Unsound("settings.sparse", wanted="a maximum in (0, 1]", got=f"{s.sparse}")
    if s.part not in PARTS:
        raise Unsound("settings.part", wanted=f"one of {[*PARTS]}", got=f"{s.part!r}")
    check_integers(draws=(s.draws, 0), seed=(s.seed, 0), outliers=(s.outliers, 1))


def _sizes(s: InterferenceSettings, model: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    per_layer(s, model, "labels", "heads")
    return {
        "on": len(s.on),
        "constant": len(s.constants),
        "draw": s.draws,
        "layer": len(s.layers),
        "head": max(model["heads"]),
        "prompt": 1 if s.pooled else prompts,
        "kind": 2,
        "pooled_layer": len(s.layers) if s.pooled else 0,
        "moment": 2 + 2 * len(s.on) * len(s.constants) if s.pooled else 0,
        "group": len(s.layers) * (max(model["heads"]) + 1) + 1 if s.pooled else 0,
    }


def _check_numbers(report: InterferenceReport) -> None:
    check_counts(report, "examined", "positions")
    check_counts(report, "ties", most=report.examined)
    check_numbers("rows", report.rows.sum(-1), 0, report.examined)
    of_rows = ("loose", "factored", "permuted", "lognormal")
    check_counts(report, "rows", *of_rows, most=report.examined.max(initial=0))
    check_counts(report, *of_rows, most=report.rows)
    check_counts(report, "strict", "to_first", most=report.loose)
    check_sums(report, "predicted", most=report.rows)
    for name in ("constant", "scale_spread", "sigma_squared", "variance"):
        check_numbers(name, getattr(report, name), 0)
    check_counts(report, "targets", most=report.positions)
    outputs = {len(getattr(report, name)) for name in ("kl", "agree", "loss")}
    if outputs not in ({0}, {len(report.settings.constants)}):
        wanted = f"none of them, or one for each of {len(report.settings.constants)} constants"
        raise Unsound("kl, agree, loss", wanted=wanted, got=f"{sorted(outputs)}")
    check_numbers("agree", report.agree, 0, report.positions)
    for name in ("kl", "loss", "clean_loss"):
        check_numbers(name, getattr(report, name), -1.0 - report.positions, 1e60)


_FORM = Form(
    InterferenceReport,
    "interference report",
    2,
    _check_settings,
    _sizes,
    _check_numbers,
    {"labels": tuple[str, ...], "heads": tuple[int, ...], "sites": str},
    what="report of interference",
)


def _of(which: int, values: np.ndarray) -> np.ndarray:
    """All rows (0) or content rows (1): ``[..., prompt]``."""
    return np.asarray(values[..., CONTENT] if which else values.sum(-1))


def _groups(x: np.ndarray) -> np.ndarray:
    """Of every head, then every layer, then the model: ``[..., group, prompt]``."""
    by_layer = x.sum(-2)
    heads = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    return np.concatenate([heads, by_layer, by_layer.sum(-2, keepdims=True)], axis=-2)


def _share(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Share of all rows, prompts and kinds together."""
    return np.asarray(values.sum((-1, -2)) / rows.sum((-1, -2)))


def _shares(
    name: str, values: np.ndarray, rows: np.ndarray, *, sinks: bool = False
) -> dict[str, np.ndarray]:
    out = {name: _share(values, rows)}
    kinds = {"content": CONTENT} | ({"sinks": SINK} if sinks else {})
    for kind, index in kinds.items():
        out[f"{name}_{kind}"] = np.asarray(values[..., index].sum(-1) / rows[..., index].sum(-1))
    return out


def _variance_shares(variance: np.ndarray) -> dict[str, np.ndarray]:
    """Variance shares from ``[group..., rows, keys, part]``."""
    out = {}
    for name, where in (
        ("", (ALL_ROWS, 0)),
        ("_sparse", (CONTENT_ROWS, 0)),
        ("_rest", (ALL_ROWS, 1)),
    ):
        part = variance[(..., *where, slice(None))]
        out[f"length_share{name}"] = np.asarray(part[..., LENGTH] / part[..., TOTAL])
        out[f"direction_share{name}"] = np.asarray(part[..., DIRECTION] / part[..., TOTAL])
    return out


def _times(constant: float) -> str:
    return "" if constant == 1 else f"{constant:g} times "
