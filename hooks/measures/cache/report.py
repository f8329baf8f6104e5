"""CacheRisk: what each cache format costs, by layer and key/value head, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hooks.arguments import Settings, check_choice, check_integers
from hooks.measures.cache.errors import CONTENT, SINK
from hooks.measures.cache.formats import (
    ROLES,
    CacheFormat,
    CacheRole,
    read_format,
    read_formats,
    text_of,
)
from hooks.measures.cache.recipe import CacheRecipe, best_recipe
from hooks.reports import (
    CorpusReport,
    Curves,
    Form,
    Unsound,
    check_counts,
    check_numbers,
    per_layer,
    percent,
    se_prompts,
    share,
    told,
)

CacheBy = Literal["head", "layer", "model"]


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Settings):
    """How cache risk was measured; two reports of equal settings can be merged."""

    formats: tuple[str, ...]
    samples: int
    sparse: float
    layers: tuple[int, ...]
    seed: int


@dataclass(frozen=True, eq=False, repr=False)
class CacheRisk(CorpusReport):
    """Errors of keys, values and scores under each format, rows that move, and the risk in nats.

    Numbers are sums, prompt by prompt. The axis ``unit`` has every layer's key/value heads in turn,
    the axis ``kind`` rows that attend to content, then those that attend to the first token.

    Attributes:
        settings: how it was measured.
        model: facts of the model, versions; ``d_key``, ``d_value``: channels of each layer's heads;
            ``left_out``: default formats that refuse these heads, and why.
        first_prompt: index of the first prompt, where this is part of a corpus.
        tokens, decoder_tokens: each prompt's tokens as strings; empty where there are none.
        vectors: keys (and values) of a head of the first layer; errors of layers with more or fewer
            (cross-attention) are scaled to as many.
        positions: at which the output was compared; 0 without samples.
        examined: rows (of the query heads that read this head) with two or more visible keys.
        rows: sparse ones among them, ties left out.
        norm_k, norm_v: squares of |x'|/|x| - 1.
        direction_k, direction_v: 1 - cos of the angle between x and x'.
        score: over rows, the variance of the scores' errors under the row's own attention.
        able, moved: sparse rows whose margin is below the range of their scores' errors; whose arg
            max moves.
        risk_k, risk_v: nats, 1/2 sum_t E[(g_t . dx_t)^2]; zero without samples.
    """

    settings: CacheSettings
    model: Mapping[str, Any]
    first_prompt: int
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    decoder_tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    vectors: Int[np.ndarray, "prompt"] = field(repr=False)
    positions: Int[np.ndarray, "prompt"] = field(repr=False)
    examined: Int[np.ndarray, "unit prompt"] = field(repr=False)
    rows: Int[np.ndarray, "unit prompt kind"] = field(repr=False)
    norm_k: Float[np.ndarray, "format unit prompt"] = field(repr=False)
    norm_v: Float[np.ndarray, "format unit prompt"] = field(repr=False)
    direction_k: Float[np.ndarray, "format unit prompt"] = field(repr=False)
    direction_v: Float[np.ndarray, "format unit prompt"] = field(repr=False)
    score: Float[np.ndarray, "format unit prompt"] = field(repr=False)
    able: Int[np.ndarray, "format unit prompt kind"] = field(repr=False)
    moved: Int[np.ndarray, "format unit prompt kind"] = field(repr=False)
    risk_k: Float[np.ndarray, "format unit prompt"] = field(repr=False)
    risk_v: Float[np.ndarray, "format unit prompt"] = field(repr=False)

    # -- numbers ----------------------------------------------------------------------------

    def to_frame(self, by: CacheBy = "head") -> pd.DataFrame:
        """One row per format, layer and key/value head (or layer, or model).

        Columns:
            format, layer, head, label: name of the format; block index; key/value head; ``L5KV1``
                (``L5`` by layer).
            bits_k, bits_v: per stored number, scales included.
            norm_k, norm_v: RMS over tokens (and heads) of the relative error of the norms.
            direction_k, direction_v: mean of 1 - cos.
            score: RMS over rows of the scores' error, its mean under the row's attention left out.
            rows, sinks: sparse rows of the query heads that read this head; those that attend to
                the first token.
            able, moved: share of the sparse rows whose arg max some order of their own score errors
                could move; of those whose arg max moves.
            able_content, moved_content: of the sparse rows that do not attend to the first token.
            risk_k, risk_v, risk: nats per position of the output that the keys, the values, and
                both cost where this layer (or head, or all layers) alone is stored so.
            se: standard error of ``risk`` over prompts (NaN for one).

        Shares are NaN where there are no rows, risks without samples.

        Raises:
            ValueError: an unknown ``by``.
        """
        check_choice("by", by, ("head", "layer", "model"))
        frames = [self._one(by, i) for i in range(len(self.settings.formats))]
        return pd.concat(frames, ignore_index=True)

    def _one(self, by: CacheBy, at: int) -> pd.DataFrame:
        groups, names = self._groups(by)

        def pool(x: np.ndarray) -> np.ndarray:
            """``[unit, prompt, ...]``, summed over each group's units."""
            return np.stack([x[units].sum(0) for units in groups])

        form, size = self._formats[at], np.array([g.stop - g.start for g in groups])
        vectors, rows = size * self.vectors.sum(), pool(self.rows)
        positions = self.positions if self.settings.samples else self.positions * np.nan
        risk = {role: pool(getattr(self, f"risk_{role}")[at]) for role in ROLES}
        out: dict[str, Any] = {"format": self.settings.formats[at], **names}
        out |= {f"bits_{role}": self._bits(form, role, by) for role in ROLES}
        with np.errstate(invalid="ignore", divide="ignore"):
            for role in ROLES:
                squares = pool(getattr(self, f"norm_{role}")[at]).sum(-1)
                out[f"norm_{role}"] = np.sqrt(squares / vectors)
            for role in ROLES:
                turned = pool(getattr(self, f"direction_{role}")[at]).sum(-1)
                out[f"direction_{role}"] = turned / vectors
            examined = pool(self.examined).sum(-1)
            out["score"] = np.sqrt(pool(self.score[at]).sum(-1) / examined)
            out |= {"rows": rows.sum((-1, -2)), "sinks": rows[..., SINK].sum(-1)}
            for name in ("able", "moved"):
                of = pool(getattr(self, name)[at])
                out[name] = of.sum((-1, -2)) / rows.sum((-1, -2))
                out[f"{name}_content"] = of[..., CONTENT].sum(-1) / rows[..., CONTENT].sum(-1)
            for role in ROLES:
                out[f"risk_{role}"] = risk[role].sum(-1) / positions.sum()
            both = risk["k"] + risk["v"]
            out["risk"] = both.sum(-1) / positions.sum()
            out["se"] = se_prompts(both, positions)
        return pd.DataFrame(out)

    def _groups(self, by: CacheBy) -> tuple[list[slice], dict[str, Any]]:
        """Units of each row of a frame, and its names."""
        heads: Sequence[int] = self.model["kv_heads"]
        ends = np.cumsum([0, *heads])
        if by == "model":
            return [slice(0, int(ends[-1]))], {}
        layers, labels = self.settings.layers, self.model["labels"]
        if by == "layer":
            groups = [slice(int(a), int(b)) for a, b in pairwise(ends)]
            return groups, {"layer": list(layers), "label": list(labels)}
        each = [(i, h) for i, n in enumerate(heads) for h in range(n)]
        return [slice(i, i + 1) for i in range(int(ends[-1]))], {
            "layer": [layers[i] for i, _ in each],
            "head": [h for _, h in each],
            "label": [f"{labels[i]}KV{h}" for i, h in each],
        }

    @property
    def _formats(self) -> tuple[CacheFormat, ...]:
        return tuple(map(read_format, self.settings.formats))

    def _bits(self, form: CacheFormat, role: CacheRole, by: CacheBy) -> Any:
        widths = self.model["d_key" if role == "k" else "d_value"]
        each = [form.bits(role, d) for d in widths]
        if by == "layer":
            return each
        heads = self.model["kv_heads"]
        if by == "head":
            return [b for b, n in zip(each, heads, strict=True) for _ in range(n)]
        weights = np.multiply(widths, heads)
        return float(np.average(each, weights=weights))

    def heads(self, format: str | CacheFormat | None = None) -> pd.DataFrame:
        """Key/value heads by what they cost in one format (default: the first), worst first.

        Raises:
            ValueError: a format that was not measured.
        """
        frame = self.to_frame("head")
        chosen = self._measured([self.settings.formats[0] if format is None else format])[0]
        mine = frame[frame["format"] == chosen].drop(columns="format")
        order = "risk" if self.settings.samples else "score"
        return mine.sort_values(order, ascending=False, kind="stable").reset_index(drop=True)

    def _measured(self, formats: Any) -> tuple[str, ...]:
        names = tuple(map(text_of, read_formats(formats)))
        for name in names:
            check_choice("formats", name, (*self.settings.formats, "full"))
        return names

    # -- a decision -------------------------------------------------------------------------

    def recipe(
        self,
        bits: float = 4.5,
        *,
        formats: Sequence[str | CacheFormat] | None = None,
        together: bool = False,
    ) -> CacheRecipe:
        """The formats with the least sum of risks whose bits per number are ``bits`` or fewer.

        Keys and values of each layer are chosen apart. The choice is exact (every combination is
        weighed); the sum stands for the KL of the whole as far as layers' errors are independent.

        Args:
            bits: most bits per stored number, scales included, on average over all layers.
            formats: choose from these; ``"full"`` may be among them. Default: all measured ones and
                ``"full"``.
            together: keys and values of a layer in one format, as vLLM needs it.

        Raises:
            ValueError: a report without samples, a format that was not measured, or fewer bits than
                any choice has.
        """
        if not self.settings.samples:
            raise ValueError("recipe: wanted a report with samples, which say what is lost; got 0")
        names = (*self.settings.formats, "full") if formats is None else self._measured(formats)
        return best_recipe(self, tuple(dict.fromkeys(names)), bits, together)

    # -- words ------------------------------------------------------------------------------

    def glance(self) -> tuple[pd.DataFrame, Curves]:
        """Each format over the whole model."""
        frame = self.to_frame("model")
        bits = (frame["bits_k"] + frame["bits_v"]) / 2
        table = {"format": frame["format"], "bits": bits, "nats": frame["risk"]}
        table |= {"of keys": frame["risk_k"], "of values": frame["risk_v"]}
        return pd.DataFrame({**table, "rows moved": frame["moved"].map(share)}), {}

    def summary(self) -> str:
        """A few sentences: what formats cost, which layers bear them least, which rows move."""
        s, n = self.settings, len(self.tokens)
        whole = self.to_frame("model")
        parts = [
            f"{self.model['name']}: {n} prompt{'s' * (n != 1)}, {len(s.layers)} attention "
            f"layer{'s' * (len(s.layers) != 1)}; a key/value cache in {len(s.formats)} "
            f"format{'s' * (len(s.formats) != 1)}."
        ]
        if s.samples:
            each = whole.sort_values("risk", kind="stable")
            said = ", ".join(
                f"{f} {r:.2g}" for f, r in zip(each["format"], each["risk"], strict=True)
            )
            parts.append(
                f"In nats per token, as predicted from gradients, all layers together: {said}."
            )
            parts.append(self._worst(each.iloc[-1]["format"]))
        rows = int(whole["rows"].iloc[0])
        if not rows:
            parts.append(f"No row has a maximum >= {s.sparse:g}: no arg max to watch.")
        else:
            most = whole.iloc[int(whole["moved"].to_numpy().argmax())]
            said = f"Of {rows} sparse rows {most['format']} moves the most, {share(most['moved'])}"
            if not most["moved"] > 0:
                said = f"No format moves any of the {rows} sparse rows"
            parts.append(f"{said} ({percent(most['able'])} could move).")
        if self.model["left_out"]:
            parts.append(f"Formats that refuse these heads: {', '.join(self.model['left_out'])}.")
        return " ".join([*parts, told(self.model)])

    def _worst(self, name: str) -> str:
        layers = self.to_frame("layer")
        mine = layers[layers["format"] == name]
        worst, total = mine.iloc[int(mine["risk"].to_numpy().argmax())], mine["risk"].sum()
        if not np.isfinite(total):
            return f"{worst['label']} overflows in {name}."
        if not total > 0:
            return "No format costs anything."
        return (
            f"{worst['label']} alone bears {worst['risk'] / total:.0%} of what {name} costs "
            f"(keys {worst['risk_k']:.2g}, values {worst['risk_v']:.2g})."
        )


def _check_settings(s: CacheSettings) -> None:
    read_formats(s.formats)
    check_integers(samples=(s.samples, 0), seed=(s.seed, 0))
    if not 0 < s.sparse <= 1:
        raise Unsound("settings.sparse", wanted="a maximum in (0, 1]", got=f"{s.sparse}")


def _sizes(s: CacheSettings, model: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    per_layer(s, model, "labels", "kv_heads", "d_key", "d_value")
    return {
        "format": len(s.formats),
        "unit": sum(model["kv_heads"]),
        "prompt": prompts,
        "kind": 2,
    }


def _check_numbers(report: CacheRisk) -> None:
    check_counts(report, "vectors", "positions", "examined", "rows")
    check_numbers("rows", report.rows.sum(-1), 0, report.examined)
    check_counts(report, "able", most=report.rows)
    check_counts(report, "moved", most=report.able)
    for role in ROLES:
        turned, vectors = getattr(report, f"direction_{role}"), report.vectors
        check_numbers(f"direction_{role}", turned, 0, 2 * vectors * (1 + 1e-6), infinite=True)
        for name in (f"norm_{role}", f"risk_{role}"):
            check_numbers(name, getattr(report, name), 0, infinite=True)
    check_numbers("score", report.score, 0, infinite=True)


_FORM = Form(
    CacheRisk,
    "cache report",
    2,
    _check_settings,
    _sizes,
    _check_numbers,
    {
        "labels": tuple[str, ...],
        "kv_heads": tuple[int, ...],
        "d_key": tuple[int, ...],
        "d_value": tuple[int, ...],
        "left_out": Mapping[str, str],
        "sites": str,
    },
    what="report of cache risk",
)
