"""CollapseReport: what a collapse probe found, as data.

Frozen, on the CPU, without a reference to the model; tidy frames; safetensors with JSON on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from hooks.arguments import (
    brief,
    check_booleans,
    check_choice,
    check_index,
    check_integers,
    check_number,
    check_text,
    read_array,
)
from hooks.collapse.kept import KeptRows, no_rows
from hooks.collapse.pooled import PooledReport
from hooks.collapse.settings import CONTENT, SINK, By, ProbeSettings
from hooks.collapse.solve import Groups, first_crossing, rate_of_rows, solve_sigma_at
from hooks.collapse.table import RowTable
from hooks.collapse.words import summarise
from hooks.noise import NormNoise, check_sigma, get_law
from hooks.reports import Curves, first_tokens, percent, se_draws


@dataclass(frozen=True, eq=False, repr=False)
class CollapseReport(PooledReport):
    """The collapse of sparse attention under norm noise: rates, errors and the most fragile rows.

    Counts and sums have the axes sigma, draw, layer, head, prompt, and last the kind of row: 0 for
    rows that attend to content, 1 for rows that attend to a first token (attention sinks): the
    prompt's, or in a prompt of packed documents any of theirs. In a pooled report
    (``settings.pooled``) the axis of prompts has one entry, their sum.

    Attributes:
        settings: how the probe was run.
        model: facts of the model and what noise means there (``sites``), versions.
        first_prompt: index of the first prompt, where this is part of a corpus.
        tokens: each prompt's tokens as strings; none for images and sound.
        starts: positions of each prompt's first tokens: 0, and where a packed document begins;
            empty in reports of earlier versions, meaning only 0.
        decoder_tokens: tokens of an encoder-decoder's decoder as strings; empty for other models.
        examined: rows examined (two or more visible keys), sparse or not.
        single_key, ties: rows left out: with one visible key; sparse, with a maximum that two keys
            share.
        padding: padding positions of each prompt, left out.
        rows: sparse rows.
        able: competitors able to win at all (by factors between 0 and 2), over these rows.
        level: sum over sparse rows of the attended score's q.k part.
        loose, strict, centred: sums over rows of the probability that the arg max moves; that it
            moves to a new maximum that is sparse again; that it moves when each row's mean visible
            q.k part is subtracted first (the centred gauge, a control).
        strict_low, strict_high: bounds of ``strict``, where it was computed (``settings.strict``).
        loose_draws, strict_draws, centred_draws: these sums per draw, where they were sampled.
        moments: where prompts are pooled, of each head, then each layer, then the model: prompts
            with sparse rows, and over prompts with c sparse rows and loose sums x, the sums of c^2,
            of xc and of x^2 by sigma.
        read: where prompts are pooled, how many tokens they have.
        table: the rows that collapse first.
        kept: the very first of them, with their attention before and after noise.
    """

    settings: ProbeSettings
    model: Mapping[str, Any]
    first_prompt: int
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    decoder_tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    examined: Int[np.ndarray, "layer head prompt"] = field(repr=False)
    single_key: Int[np.ndarray, "layer head prompt"] = field(repr=False)
    ties: Int[np.ndarray, "layer head prompt"] = field(repr=False)
    padding: Int[np.ndarray, "prompt"] = field(repr=False)
    rows: Int[np.ndarray, "layer head prompt kind"] = field(repr=False)
    able: Int[np.ndarray, "layer head prompt kind"] = field(repr=False)
    level: Float[np.ndarray, "layer head prompt kind"] = field(repr=False)
    loose: Float[np.ndarray, "sigma layer head prompt kind"] = field(repr=False)
    strict: Float[np.ndarray, "sigma layer head prompt kind"] = field(repr=False)
    centred: Float[np.ndarray, "sigma layer head prompt kind"] = field(repr=False)
    loose_draws: Float[np.ndarray, "sigma loose_draw layer head kind"] = field(repr=False)
    strict_draws: Float[np.ndarray, "sigma draw layer head kind"] = field(repr=False)
    centred_draws: Float[np.ndarray, "sigma loose_draw layer head kind"] = field(repr=False)
    table: RowTable = field(repr=False)
    kept: KeptRows = field(repr=False, default_factory=no_rows)
    # Not written where the strict rate was sampled.
    strict_low: Float[np.ndarray, "bound layer head kind"] = field(
        repr=False, default_factory=lambda: np.zeros((0, 0, 0, 2))
    )
    strict_high: Float[np.ndarray, "bound layer head kind"] = field(
        repr=False, default_factory=lambda: np.zeros((0, 0, 0, 2))
    )
    starts: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    # Of pooled reports alone.
    moments: Float[np.ndarray, "moment group"] = field(
        repr=False, default_factory=lambda: np.zeros((0, 0))
    )
    read: Int[np.ndarray, "total"] = field(
        repr=False, default_factory=lambda: np.zeros(0, np.int64)
    )

    @property
    def document_starts(self) -> tuple[tuple[int, ...], ...]:
        """``starts``, also where an earlier version wrote none."""
        return self.starts or ((0,),) * len(self.tokens)

    def is_first(
        self, prompt: Int[np.ndarray, "n"], position: Int[np.ndarray, "n"]
    ) -> Bool[np.ndarray, "n"]:
        """Whether these keys are first tokens: rows that attend to them are sinks."""
        return first_tokens(self.starts, prompt, position)

    # -- rates ------------------------------------------------------------------------------

    def to_frame(self, by: By = "head") -> pd.DataFrame:
        """One row per sigma, layer and head (or sigma and layer, or sigma): rates pool rows.

        Columns:
            layer, head, label: block index; head; ``L5H1`` (``L5`` by layer).
            rows, sinks: sparse rows; those that attend to the first token.
            loose, strict: share of the sparse rows that collapse (strict: NaN where it was neither
                computed nor sampled).
            strict_low, strict_high: bounds between which the computed strict share lies, up to
                0.002 of error of its grids; NaN where it was sampled.
            strict_drawn: the strict share of the draws, to check the computed one; NaN without.
            loose_content: the loose share with the sinks left out.
            loose_centred: the loose share in the centred gauge.
            score_level: mean q.k part of the attended score.
            se, se_strict: standard error over draws of ``loose`` (0: exact) and ``strict_drawn``.
            se_prompts: standard error of ``loose`` over prompts (NaN for one prompt).

        Rates are NaN where there are no rows.
        """
        axes = {"head": (), "layer": (2,), "model": (1, 2)}
        drop = axes[check_choice("by", by, axes)]

        def pool(x: np.ndarray, first: int) -> np.ndarray:
            """Sum over the heads (and layers) that ``by`` leaves out."""
            return x.sum(axis=tuple(first + a - 1 for a in drop)) if drop else x

        rows = pool(self.rows, 0)  # [..., prompt, kind]
        total, sinks = np.asarray(rows.sum((-1, -2))), np.asarray(rows[..., SINK].sum(-1))
        content = rows[..., CONTENT].sum(-1)
        sums = {n: pool(getattr(self, n), 1) for n in ("loose", "strict", "centred")}
        with np.errstate(invalid="ignore", divide="ignore"):
            columns = {
                "loose": sums["loose"].sum((-1, -2)) / total,
                "strict": sums["strict"].sum((-1, -2)) / total,
                **self._strict_beside(pool, total),
                "loose_content": sums["loose"][..., CONTENT].sum(-1) / content,
                "loose_centred": sums["centred"].sum((-1, -2)) / total,
                "se": se_draws(pool(self.loose_draws, 2).sum(-1) / total),
                "se_prompts": self.error_over_prompts(by),
            }
            level = pool(self.level, 0).sum((-1, -2)) / total
        if self.settings.method == "exact":
            columns["se"] = np.where(total > 0, 0.0, np.nan) * np.ones_like(columns["loose"])
        if self.settings.draws == 0 and self.settings.strict == "sampled":
            columns["strict"] = np.full_like(columns["loose"], np.nan)
        shape = columns["loose"].shape
        grids = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
        frame = pd.DataFrame({"sigma": np.asarray(self.settings.sigmas)[grids[0].ravel()]})
        if by != "model":
            frame["layer"] = np.asarray(self.settings.layers, dtype=int)[grids[1].ravel()]
            label = np.asarray(self.model["labels"])[grids[1].ravel()]
        if by == "head":
            frame["head"] = grids[2].ravel()
        if by != "model":
            heads = [f"H{head}" for head in grids[2].ravel()] if by == "head" else ""
            frame["label"] = np.char.add(label, heads)
        for name, values in (("rows", total), ("sinks", sinks)):
            frame[name] = np.broadcast_to(values, shape).ravel()
        for name in ("loose", "strict", "loose_content", "loose_centred"):
            frame[name] = columns[name].ravel()
        frame["score_level"] = np.broadcast_to(level, shape).ravel()
        for name in ("se", "se_strict", "se_prompts", "strict_low", "strict_high", "strict_drawn"):
            frame[name] = columns[name].ravel()
        if by == "head":  # layers may have different numbers of heads
            heads = self.model["heads"]
            known = dict(zip(self.settings.layers, heads, strict=True))
            frame = frame[frame["head"] < frame["layer"].map(known)].reset_index(drop=True)
        return frame

    def _strict_beside(
        self, pool: Callable[[np.ndarray, int], np.ndarray], total: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Columns that say how well the strict rate is known."""
        none = np.full((len(self.settings.sigmas), *total.shape), np.nan)
        drawn = pool(self.strict_draws, 2).sum(-1) / total
        columns = {
            "se_strict": se_draws(drawn) if self.settings.draws else none,
            "strict_drawn": drawn.mean(1) if self.settings.draws else none,
        }
        for name in ("strict_low", "strict_high"):
            bound = getattr(self, name)
            columns[name] = pool(bound, 1).sum(-1) / total if len(bound) else none
        return columns

    @property
    def n_sparse(self) -> int:
        """Sparse rows found, over all layers, heads and prompts."""
        return int(self.rows.sum())

    def read_by(self, label: str, prompt: int) -> tuple[str, ...]:
        """Tokens at the query positions of a layer, by its label: a decoder's own in ``D``, ``X``.

        Empty for images and sound.

        Raises:
            TypeError, ValueError: no such label or prompt.
        """
        layer = check_text("label", label).rpartition("H")[0] or label  # L5H1: a head's
        check_choice("label", layer, self.model["labels"])
        prompt = check_index("prompt", prompt, len(self.tokens), "prompts")
        decoded = bool(self.decoder_tokens) and label[0] in "DX"
        return (self.decoder_tokens if decoded else self.tokens)[prompt]

    def key_token(self, label: str, prompt: int, position: int) -> str:
        """The token of a layer's key, by the layer's label; a number for images and sound.

        A decoder's queries attend to its own tokens, those of cross-attention to the encoder's.
        Where one attention has both, the encoder's come second; keys after the last token are none
        (compressed keys).
        """
        decoder = self.decoder_tokens[prompt] if label[0] == "D" and self.decoder_tokens else ()
        known = decoder + self.tokens[prompt]
        beside = position - len(known)
        return f"(no token: {beside})" if known and beside >= 0 else _token(known, position)

    # -- thresholds -------------------------------------------------------------------------

    def sigma_at(
        self, rate: float = 0.01, *, by: By = "model", content: bool = False, strict: bool = False
    ) -> float | pd.Series | pd.DataFrame:
        """The sigma at which a share ``rate`` of the sparse rows collapses.

        The loose rate is solved on the exact curve of the table's rows, not on the grid of sigmas.
        Of competitors that did not fit into the table, the root of what they add is a line between
        the grid's sigmas (off by some 1%, beyond the last by up to 5%), as the strict rate's is.

        Args:
            rate: share of the rows, in (0, 1).
            by: ``"model"`` for one number, ``"layer"`` for a Series, ``"head"`` for a frame of
                layers by heads.
            content: leave attention sinks out.
            strict: of rows that collapse onto another sparse maximum.

        Returns:
            inf where the law never reaches the rate (by the line, where the table is too small;
            strict: where no sigma of the grid does), NaN where there are no rows.

        Raises:
            ValueError: a rate outside (0, 1), one for which the table is too small and the sigmas
                too far apart (bounds differ by more than half), or a strict rate that is not there.
        """
        rate = check_number("rate", rate, "a share between 0 and 1", lambda x: 0 < x < 1)
        content, strict = check_booleans(content=content, strict=strict)
        check_choice("by", by, get_args(By))
        if strict and self.settings.strict == "sampled" and not self.settings.draws:
            raise ValueError(
                "strict: wanted a report with strict rates; got one that neither computed nor "
                "sampled them (probe again with draws=)"
            )
        n_layers, n_heads = self.rows.shape[:2]
        groups = {
            "head": (self.table.layer * n_heads + self.table.head, n_layers * n_heads),
            "layer": (self.table.layer, n_layers),
            "model": (np.zeros(len(self.table), dtype=int), 1),
        }
        of_row, n_groups = groups[by]
        kinds = (CONTENT,) if content else (CONTENT, SINK)

        def pooled(x: np.ndarray) -> np.ndarray:
            """Sums per group of rows."""
            total: np.ndarray = x[..., kinds].sum((-1, -2)).reshape(n_groups, -1).sum(1)
            return total

        of_kind = np.where(self.is_first(self.table.prompt, self.table.key), SINK, CONTENT)
        keep = np.isin(of_kind, kinds)
        listed = np.zeros(n_groups, dtype=np.int64)
        np.add.at(listed, of_row[keep], np.diff(self.table.start)[keep])
        counts = pooled(self.rows)
        sums = np.stack([pooled(x) for x in (self.strict if strict else self.loose)])
        if strict:
            sigma = first_crossing(self.settings.sigmas, sums, rate, counts)
        else:
            rows = Groups(of_row, keep, counts, pooled(self.able) - listed, sums)
            sigma = solve_sigma_at(self.table, self.settings, rate, rows)
        if by == "model":
            return float(sigma[0])
        layers = pd.Index(self.settings.layers, name="layer")
        if by == "layer":
            return pd.Series(sigma, index=layers, name="sigma")
        heads = pd.RangeIndex(n_heads, name="head")
        return pd.DataFrame(sigma.reshape(n_layers, n_heads), index=layers, columns=heads)

    def heads(
        self, rate: float = 0.01, *, content: bool = False, min_rows: int = 20
    ) -> pd.DataFrame:
        """Heads, most fragile first: the sigma at which a share ``rate`` of their rows collapses.

        Args:
            rate: share of the rows, in (0, 1).
            content: rank by ``sigma_at_content``.
            min_rows: sparse rows (content: sinks left out) below which a head is left out, as a
                single row would decide; 0: all heads.

        Columns:
            layer, head, label: block index; head; ``L5H1``.
            rows, sinks: sparse rows; those that attend to the first token.
            score_level: mean q.k part of the attended score.
            sigma_at, sigma_at_content: as :meth:`sigma_at` gives them, with and without sinks.

        Raises:
            TypeError, ValueError: a wrong argument, or a table too small for ``sigma_at``.
        """
        (content,) = check_booleans(content=content)
        (min_rows,) = check_integers(min_rows=(min_rows, 0))
        columns = ["layer", "head", "label", "rows", "sinks", "score_level"]
        frame = self.to_frame().groupby(["layer", "head"], as_index=False).first()[columns]
        for name, without in (("sigma_at", False), ("sigma_at_content", True)):
            by_head = self.sigma_at(rate, by="head", content=without)
            assert isinstance(by_head, pd.DataFrame)
            layer = by_head.index.get_indexer(pd.Index(frame["layer"]))
            frame[name] = by_head.to_numpy()[layer, frame["head"]]
        counted = frame["rows"] - frame["sinks"] if content else frame["rows"]
        by = "sigma_at_content" if content else "sigma_at"
        ranked = frame[counted >= min_rows].sort_values(by, kind="stable")
        return ranked.reset_index(drop=True)

    def glance(self) -> tuple[pd.DataFrame, Curves]:
        """The most fragile heads, and the curves."""
        curve = self.to_frame("model")
        curves = {n: (curve["sigma"].to_numpy(), curve[n].to_numpy()) for n in ("loose", "strict")}
        try:
            heads = self.heads()
        except ValueError:  # the table had too little room: the summary says so
            return pd.DataFrame(), curves
        table = {
            "head": heads["label"],
            "1% at sigma": heads["sigma_at"].map(percent),
            "sinks left out": heads["sigma_at_content"].map(percent),
            "sparse rows": heads["rows"],
            "sinks": (heads["sinks"] / heads["rows"]).map(percent),
            "score level": heads["score_level"],
        }
        return pd.DataFrame(table), curves

    def fragile(self, n: int = 10, *, content: bool = False) -> pd.DataFrame:
        """The n rows that collapse first, with the token they attend to and the one they jump to.

        ``half_width`` is the smallest a such that factors in [1 - a, 1 + a] can move the row, from
        clean scores alone; ``sigma`` = a / sqrt(3) is the RMS of uniform noise of that half-width.

        Args:
            n: number of rows.
            content: leave attention sinks out.
        """
        (n,) = check_integers(n=(n, 0))
        (content,) = check_booleans(content=content)
        t = self.table
        order = np.argsort(t.half_width, kind="stable")
        if content:
            order = order[~self.is_first(t.prompt[order], t.key[order])]
        return self._row_frame(t, order[:n])

    def kept_rows(self) -> pd.DataFrame:
        """The rows of ``kept``: the columns of :meth:`fragile`, and what the noise shown does.

        ``shown_sigma`` and ``draw`` name the noise (:meth:`kept_noise`), ``lands_pos`` and
        ``lands_token`` where the arg max is under it (-1, "" and NaN where none moves the row);
        ``before`` and ``after`` are the attended token's weights, ``gained`` the new maximum's.
        """
        kept = self.kept
        frame = self._row_frame(kept, np.arange(len(kept)))
        lands, pairs = kept.lands, [kept.weights(i) for i in range(len(kept))]
        moved = [i for i in range(len(kept)) if lands[i] >= 0]
        frame["shown_sigma"], frame["draw"], frame["lands_pos"] = kept.sigma, kept.draw, lands
        # A query's own token sequence differs from its keys' in cross-attention.
        frame["lands_token"] = [
            self.key_token(label, int(prompt), int(at)) if at >= 0 else ""
            for label, prompt, at in zip(frame["label"], kept.prompt, lands, strict=True)
        ]
        before = [float(clean[key]) for (clean, _), key in zip(pairs, kept.key, strict=True)]
        after = [float(noisy[key]) for (_, noisy), key in zip(pairs, kept.key, strict=True)]
        gained = np.full(len(kept), np.nan)
        gained[moved] = [pairs[i][1][lands[i]] for i in moved]
        frame["before"], frame["after"], frame["gained"] = before, after, gained
        return frame

    def kept_noise(self, row: int) -> NormNoise:
        """The noise under which ``kept`` shows a row, in that row's layer alone.

        A forward pass of the same prompts under ``noise.applied(model,
        first_prompt=report.first_prompt)`` reproduces that row of attention. Of a corpus, whose
        windows are numbered by documents, take the row's prompt alone, and ``first_prompt =
        report.model["numbers"][str(prompt)]``.

        Raises:
            IndexError (a ValueError, too): no such row.
            TypeError: no index.
            ValueError: no noise is shown there.
        """
        kept, settings = self.kept, self.settings
        row = check_index("row", row, len(kept), "kept rows")
        if kept.draw[row] < 0:
            raise ValueError(f"row: wanted one that some noise moves; got {row}, which none does")
        return NormNoise(
            sigma=float(kept.sigma[row]),
            on=settings.on,
            law=settings.law,
            shared=settings.shared,  # type: ignore[arg-type]
            layers=(settings.layers[kept.layer[row]],),
            seed=settings.seed,
            draw=int(kept.draw[row]),
        )

    def _row_frame(self, t: RowTable | KeptRows, order: Int[np.ndarray, "n"]) -> pd.DataFrame:
        """The columns of :meth:`fragile` for these rows."""
        prompts = t.prompt[order]
        labels = [self.model["labels"][layer] for layer in t.layer[order]]

        def token(at: np.ndarray, of: Callable[[str, int, int], str]) -> list[str]:
            """Tokens at these positions."""
            places = zip(labels, prompts, at[order], strict=True)
            return [of(label, int(p), int(i)) for label, p, i in places]

        def query(label: str, prompt: int, position: int) -> str:
            return _token(self.read_by(label, prompt), position)

        key = self.key_token
        return pd.DataFrame(
            {
                "layer": np.asarray(self.settings.layers, dtype=int)[t.layer[order]],
                "head": t.head[order],
                "label": [
                    f"{label}H{head}" for label, head in zip(labels, t.head[order], strict=True)
                ],
                "prompt": prompts,
                "query_pos": t.query[order],
                "query_token": token(t.query, query),
                "key_pos": t.key[order],
                "key_token": token(t.key, key),
                "jump_pos": t.rival[order],
                "jump_token": token(t.rival, key),
                "half_width": t.half_width[order].astype(float),
                "sigma": t.half_width[order].astype(float) / math.sqrt(3),
                "sink": self.is_first(prompts, t.key[order]),
            }
        )

    # -- words ------------------------------------------------------------------------------

    def summary(self) -> str:
        """A few sentences: at what noise rows collapse, which rows, and what that leaves open."""
        return summarise(self)

    def exact_rate(
        self, sigma: float | Float[np.ndarray, "row"], rows: Int[np.ndarray, "row"]
    ) -> Float[np.ndarray, "row"]:
        """Collapse probability of rows of the table, from the competitors that it lists.

        ``sigma`` is one number or one for each row. Exact under uniform noise whose half-width
        sqrt(3) sigma is at most the table's ``cutoff``; else a lower bound.

        Raises:
            TypeError, ValueError: rows that the table does not have, or a sigma that the law can't
                have.
        """
        at, each = self._check_rate(sigma, rows)
        return rate_of_rows(self.table, self.settings, each, at)

    def _check_rate(self, sigma: Any, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows and the sigma of each, for :meth:`exact_rate`."""
        n = len(self.table)
        at = read_array("rows", rows, "iu", "a list of indices of the table's rows")
        if at.ndim != 1 or (at.size and not 0 <= at.min() <= at.max() < n):
            raise ValueError(f"rows: wanted a list of indices from 0 to {n - 1}; got {brief(rows)}")
        wanted = "a number, or one for each row"
        each = read_array("sigma", sigma, "iuf", wanted).astype(float)
        if each.shape not in ((), at.shape):
            raise ValueError(f"sigma: wanted {wanted}; got shape {list(each.shape)}")
        for end in (each.min(), each.max()) if each.size else ():
            law = get_law(self.settings.law)
            # What a rounding error above the limit has, a geometric grid's end may have.
            check_sigma(end / (1 + 1e-9) if end > 0 else end, law)
        return at, np.broadcast_to(each, at.shape)


def _token(tokens: tuple[str, ...], position: int) -> str:
    """A token as a string; its position where the input is not text."""
    return tokens[position] if position < len(tokens) else str(position)
