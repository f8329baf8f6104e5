"""One layer's scores and pattern to counts: sparse rows, their competitors, their probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks._prompts import Prompts
from hooks.laws import Law, get_law
from hooks.noise import NormNoise
from hooks.probability import collapse_probability, critical_half_width
from hooks.results import CONTENT, SINK, CollapseReport, ProbeSettings, RowTable
from hooks.scores import softmax_with_sink, split, visible
from hooks.sites import LayerSites

_CHUNK = 1 << 18  # score elements worked on at once
_TIE = 2.0  # scores closer than this many eps of their size differ by rounding alone


class Tally:
    """Sums of a whole probe, filled layer by layer and batch by batch."""

    def __init__(
        self,
        settings: ProbeSettings,
        layers: tuple[LayerSites, ...],
        n_prompts: int,
        competitors: int,
        first_prompt: int = 0,
    ) -> None:
        self.settings = settings
        self.competitors = competitors
        self.first_prompt = first_prompt
        self.biased = any(s.has_bias for s in layers)
        n_s, n_d, n_l = len(settings.sigmas), settings.draws, len(layers)
        n_h = max(s.n_heads for s in layers)
        sampled = n_d if settings.method == "sample" else 0
        per_row = (n_l, n_h, n_prompts)
        self.counts = {
            name: np.zeros(per_row, dtype=np.int64) for name in ("examined", "single_key", "ties")
        }
        self.rows = np.zeros((*per_row, 2), dtype=np.int64)
        self.level = np.zeros((*per_row, 2))
        self.sums = {n: np.zeros((n_s, *per_row, 2)) for n in ("loose", "strict", "centred")}
        self.draws = {
            "loose": np.zeros((n_s, sampled, n_l, n_h, 2)),
            "strict": np.zeros((n_s, n_d, n_l, n_h, 2)),
            "centred": np.zeros((n_s, sampled, n_l, n_h, 2)),
        }
        self.table: list[dict[str, np.ndarray]] = []

    def report(self, *, model: Mapping[str, Any], prompts: Prompts) -> CollapseReport:
        """The frozen result."""
        return CollapseReport(
            settings=self.settings,
            model=model,
            first_prompt=self.first_prompt,
            tokens=prompts.strings,
            decoder_tokens=prompts.decoder_strings,
            padding=np.asarray(prompts.padding, dtype=np.int64),
            rows=self.rows,
            level=self.level,
            **self.counts,
            **self.sums,
            **{f"{name}_draws": values for name, values in self.draws.items()},
            table=self._row_table(),
        )

    def _row_table(self) -> RowTable:
        def joined(name: str, dtype: Any) -> np.ndarray:
            parts = [part[name] for part in self.table]
            return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)

        rows = {name: joined(name, dtype) for name, dtype in _COLUMNS.items()}
        count = joined("count", np.int64)
        # Batches end in any order: the table's order is that of the model and the prompts.
        order = np.lexsort([rows[n] for n in ("query", "prompt", "head", "layer")])
        start = np.concatenate([[0], np.cumsum(count[order])])
        return RowTable(
            **{name: values[order] for name, values in rows.items()},
            start=start,
            s=self._entries("s", start, order),
            beta=self._entries("beta", start, order) if self.biased else np.zeros(0, np.float32),
        )

    def _entries(self, name: str, start: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Every row's competitors at the row's place; a part is let go once it is copied."""
        out = np.empty(start[-1], dtype=np.float32)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = start[:-1]
        done = 0
        for part in self.table:
            count = part["count"]
            mine = place[done : done + len(count)]
            inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            out[np.repeat(mine, count) + inside] = part.pop(name)
            done += len(count)
        return out


_COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("layer", "head", "prompt", "query", "key", "rival", "rest"), np.int32),
    **dict.fromkeys(("half_width", "s_star"), np.float32),
}


@dataclass(frozen=True)
class _Rows:
    """Sparse rows of one layer, a chunk at a time; float64."""

    head: Int[Tensor, "row"]
    prompt: Int[Tensor, "row"]
    local: Int[Tensor, "row"]  # index in the batch
    query: Int[Tensor, "row"]
    star: Int[Tensor, "row"]
    s: Float[Tensor, "row key"]
    bias: Float[Tensor, "row key"] | None
    mask: Bool[Tensor, "row key"]

    def __getitem__(self, index: Tensor) -> _Rows:
        picked = {n: v[index] for n, v in vars(self).items() if v is not None}
        return replace(self, **picked)

    def at(self, values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[:, None]).squeeze(1)

    @property
    def s_star(self) -> Float[Tensor, "row"]:
        return self.at(self.s, self.star)

    @property
    def beta(self) -> Float[Tensor, "row key"] | None:
        """b_* - b_t."""
        return None if self.bias is None else self.at(self.bias, self.star)[:, None] - self.bias

    def centred(self) -> _Rows:
        """The same rows with each row's mean visible q.k part taken away (the bias stays)."""
        mean = self.s.masked_fill(~self.mask, 0).sum(1) / self.mask.sum(1)
        return replace(self, s=(self.s - mean[:, None]).masked_fill(~self.mask, 0))


@dataclass(frozen=True)
class _Field:
    """Rows with those competitors that are able to win, nearest first."""

    rows: _Rows
    s_star: Float[Tensor, "row"]
    index: Int[Tensor, "row competitor"]
    s: Float[Tensor, "row competitor"]
    beta: Float[Tensor, "row competitor"] | None
    half_width: Float[Tensor, "row competitor"]
    valid: Bool[Tensor, "row competitor"]

    def __getitem__(self, index: Tensor) -> _Field:
        return _Field(
            self.rows[index],
            self.s_star[index],
            self.index[index],
            self.s[index],
            None if self.beta is None else self.beta[index],
            self.half_width[index],
            self.valid[index],
        )


class LayerReducer:
    """Adds one layer of one batch to a :class:`Tally`."""

    def __init__(
        self,
        tally: Tally,
        index: int,
        sites: LayerSites,
        noise: NormNoise,
        prompts: Sequence[int],
    ) -> None:
        self.tally = tally
        self.settings = tally.settings
        self.index = index
        self.sites = sites
        self.noise = noise
        self.prompts = np.asarray(prompts)
        self.law: Law = get_law(tally.settings.law)
        self.on_q, self.on_k = ("q" in noise.roles), ("k" in noise.roles)
        top = max(tally.settings.sigmas)
        # Beyond this half-width no factor of the largest sigma can move a row.
        self.reach = math.sqrt(3) * top if self.law.name == "uniform" else math.inf
        self.n_pos = {"q": 0, "k": 0}
        self.device = torch.device("cpu")
        self.eps = 0.0
        self._drawn: dict[tuple[int, str], Tensor] = {}

    def add(
        self,
        scores: Float[Tensor, "batch head query key"],
        pattern: Float[Tensor, "batch head query key"],
        s: Float[Tensor, "batch head query key"] | None,
    ) -> None:
        """Count this layer's rows.

        Args:
            scores: pre-softmax scores, masked ones -inf or the dtype's least number.
            pattern: the model's own softmax of them.
            s: the q.k part, where the layer adds a bias; None where it is the scores.
        """
        self.n_pos = {"q": scores.shape[-2], "k": scores.shape[-1]}
        self.device, self.eps = scores.device, torch.finfo(scores.dtype).eps
        n_visible = visible(scores).sum(-1)
        top = pattern.amax(-1)
        eligible = n_visible >= 2
        found = (eligible & (top.double() >= self.settings.sparse)).nonzero()
        self._count("examined", eligible.sum(-1))
        self._count("single_key", (n_visible == 1).sum(-1))
        n_key = scores.shape[-1]
        for at in found.split(max(1, _CHUNK // n_key)):
            b, h, q = at.unbind(1)
            rows = self._gather(scores[b, h, q], None if s is None else s[b, h, q], b, h, q)
            self._add_rows(rows)

    def _count(self, name: str, per_prompt_head: Tensor) -> None:
        n_heads = self.sites.n_heads
        self.tally.counts[name][self.index, :n_heads, self.prompts] += (
            per_prompt_head.cpu().numpy().astype(np.int64)
        )

    def _gather(self, w: Tensor, s: Tensor | None, b: Tensor, h: Tensor, q: Tensor) -> _Rows:
        plain = replace(self.sites, has_bias=False, sink=())
        parts = split(plain, w[:, None, None, :], dtype=torch.float64)
        total, mask = parts.s[:, 0, 0], parts.mask[:, 0, 0]
        qk = total if s is None else s.double().masked_fill(~mask, 0)
        prompts = torch.as_tensor(self.prompts, device=b.device)
        star = total.masked_fill(~mask, -math.inf).argmax(1)
        bias = None if s is None else (total - qk).masked_fill(~mask, 0)
        return _Rows(h, prompts[b], b, q, star, qk, bias, mask)

    def _add_rows(self, rows: _Rows) -> None:
        total = rows.s if rows.bias is None else rows.s + rows.bias
        shown = total.masked_fill(~rows.mask, -math.inf)
        top = shown.amax(1, keepdim=True)
        # Rounding of the model's dtype can't tell these apart: neither can a collapse.
        tied = (shown >= top - _TIE * self.eps * top.abs()).sum(1) > 1
        self._accumulate_count("ties", rows[tied])
        rows = rows[~tied]
        kind = torch.where(rows.star == 0, SINK, CONTENT)
        self._scatter(self.tally.rows[self.index], rows, kind, torch.ones_like(rows.s_star))
        self._scatter(self.tally.level[self.index], rows, kind, rows.s_star)
        clean = self._field(rows)
        self._keep(clean)
        centred = self._field(rows.centred())
        if self.settings.method == "exact":
            self._exact("loose", clean)
            self._exact("centred", centred)
        self._sample(clean, centred)

    def _accumulate_count(self, name: str, rows: _Rows) -> None:
        heads, prompts = rows.head.cpu().numpy(), rows.prompt.cpu().numpy()
        np.add.at(self.tally.counts[name][self.index], (heads, prompts), 1)

    def _scatter(self, out: np.ndarray, rows: _Rows, kind: Tensor, values: Tensor) -> None:
        """out[head, prompt, kind] += values, rows that share a cell added up."""
        cells = (rows.head * out.shape[1] + rows.prompt) * 2 + kind
        sums = torch.zeros(out.size, dtype=torch.float64, device=values.device)
        sums.index_add_(0, cells, values.double())
        out += sums.reshape(out.shape).cpu().numpy().astype(out.dtype)

    def _field(self, rows: _Rows) -> _Field:
        s_star, beta = rows.s_star, rows.beta
        a = critical_half_width(
            s_star, rows.s, beta, noise_on_q=self.on_q, noise_on_k=self.on_k
        ).masked_fill(~rows.mask, math.inf)
        a.scatter_(1, rows.star[:, None], math.inf)
        able = a < math.inf
        if beta is not None and self.law.name != "uniform":
            # A half-width never exceeds 1, but these laws' factors may exceed 2.
            able = rows.mask.scatter(1, rows.star[:, None], False)
        most = int(able.sum(1).max()) if len(a) else 0
        half_width, index = a.masked_fill(~able, math.nan).sort(1)
        half_width, index = half_width[:, :most], index[:, :most]
        return _Field(
            rows,
            s_star,
            index,
            rows.s.gather(1, index),
            None if beta is None else beta.gather(1, index),
            half_width,
            able.gather(1, index),
        )

    def _keep(self, field: _Field) -> None:
        """Rows that can collapse at all go into the table."""
        if field.index.shape[1] == 0:
            return
        field = field[field.valid[:, 0]]
        if not len(field.s_star):
            return
        n = self.tally.competitors
        listed = field.valid[:, :n]
        rows = field.rows
        columns: dict[str, Any] = {
            "layer": np.full(len(field.s_star), self.index),
            "head": rows.head,
            "prompt": rows.prompt,
            "query": rows.query,
            "key": rows.star,
            "rival": field.index[:, 0],
            "half_width": field.half_width[:, 0],
            "s_star": field.s_star,
            "rest": (field.valid.sum(1) - n).clamp(min=0),
        }
        part = {
            name: (v.cpu().numpy() if isinstance(v, Tensor) else v).astype(_COLUMNS[name])
            for name, v in columns.items()
        }
        part["count"] = listed.sum(1).cpu().numpy()
        part["s"] = field.s[:, :n][listed].cpu().numpy().astype(np.float32)
        # All or none of a report's rows have a bias column: zero where this layer adds none.
        beta = torch.zeros_like(field.s) if field.beta is None else field.beta
        part["beta"] = (
            beta[:, :n][listed].cpu().numpy().astype(np.float32)
            if self.tally.biased
            else np.zeros(0, dtype=np.float32)
        )
        self.tally.table.append(part)

    # -- rates ------------------------------------------------------------------------------

    def _exact(self, name: str, field: _Field) -> None:
        kind = torch.where(field.rows.star == 0, SINK, CONTENT)
        for i, sigma in enumerate(self.settings.sigmas):
            p = collapse_probability(
                field.s_star,
                field.s,
                torch.full_like(field.s_star, sigma),
                self.law,
                valid=field.valid,
                beta=field.beta,
                noise_on_q=self.on_q,
                noise_on_k=self.on_k,
                quick=True,
            )
            self._scatter(self.tally.sums[name][i, self.index], field.rows, kind, p)

    def _sample(self, clean: _Field, centred: _Field) -> None:
        """Draw the noise of :class:`NormNoise` and count; the strict rate under both methods."""
        sampled = self.settings.method == "sample"
        for draw in range(self.settings.draws):
            for name, field in (("loose", clean), ("centred", centred)):
                if name == "centred" and not sampled:
                    continue
                near = field[self._within_reach(field)]
                if len(near.s_star):
                    self._sample_draw(name, near, draw, sampled)

    def _within_reach(self, field: _Field) -> Tensor:
        if field.index.shape[1] == 0:
            return torch.zeros(len(field.s_star), dtype=torch.bool, device=field.s_star.device)
        return field.valid[:, 0] & (field.half_width[:, 0] <= self.reach)

    def _sample_draw(self, name: str, field: _Field, draw: int, count_loose: bool) -> None:
        rows = field.rows
        kind = torch.where(rows.star == 0, SINK, CONTENT)
        drawn_q, drawn_k = (self._uniforms(draw, role) for role in ("q", "k"))
        kv_head = torch.as_tensor(self.sites.kv_head_of, device=self.device)[rows.head]
        u_q = drawn_q[rows.local, rows.query, rows.head]
        u_star = drawn_k[rows.local, rows.star, kv_head]
        u_t = drawn_k[rows.local[:, None], field.index, kv_head[:, None]]
        for i, sigma in enumerate(self.settings.sigmas):
            f_q = self._factor(u_q, sigma, self.on_q)
            own = self._factor(u_star, sigma, self.on_k) * field.s_star
            theirs = self._factor(u_t, sigma, self.on_k) * field.s
            margin = f_q[:, None] * (theirs - own[:, None])
            bar = 0 if field.beta is None else field.beta
            moved = ((margin > bar) & field.valid).any(1)
            if not moved.any():
                continue
            if count_loose:
                self._add_draw(name, i, draw, rows, kind, moved.double())
            if name == "loose":
                again = torch.zeros_like(field.s_star)
                u_row = drawn_k[rows.local[moved], :, kv_head[moved]]
                f_k = self._factor(u_row, sigma, self.on_k)
                again[moved] = self._sparse_again(rows[moved], f_k, f_q[moved])
                self._add_draw("strict", i, draw, rows, kind, again)

    def _factor(self, u: Tensor, sigma: float, noised: bool) -> Tensor:
        return self.law.factor(u, sigma) if noised else torch.ones_like(u)

    def _add_draw(
        self, name: str, i: int, draw: int, rows: _Rows, kind: Tensor, values: Tensor
    ) -> None:
        sums = self.tally.sums[name][i, self.index]
        before = sums.sum(1)
        self._scatter(sums, rows, kind, values / self.settings.draws)
        self.tally.draws[name][i, draw, self.index] += (sums.sum(1) - before) * self.settings.draws

    def _sparse_again(self, rows: _Rows, f_k: Tensor, f_q: Tensor) -> Tensor:
        """1 where the noised row's maximum is again at least the threshold."""
        w = f_q[:, None] * f_k * rows.s
        if rows.bias is not None:
            w = w + rows.bias
        if self.sites.soft_cap > 0:
            w = self.sites.soft_cap * torch.tanh(w / self.sites.soft_cap)
        sink = w.new_tensor(self.sites.sink)[rows.head] if self.sites.sink else None
        top = softmax_with_sink(w.masked_fill(~rows.mask, -math.inf), sink).amax(1)
        return (top >= self.settings.sparse).double()

    def _uniforms(self, draw: int, role: str) -> Float[Tensor, "batch pos head"]:
        """Uniform numbers behind this draw's factors: those of NormNoise with the same seed."""
        key = (draw, role)
        if key not in self._drawn:
            n_heads = self.sites.n_heads if role == "q" else self.sites.n_kv_heads
            noise = replace(self.noise, draw=draw)
            self._drawn = {k: v for k, v in self._drawn.items() if k[0] == draw}
            drawn = [
                noise.uniforms(
                    layer=self.sites.layer,
                    role="q" if role == "q" else "k",
                    prompt=self.tally.first_prompt + int(p),
                    start=0,
                    n_pos=self.n_pos[role],
                    n_heads=n_heads,
                )
                for p in self.prompts
            ]
            self._drawn[key] = torch.tensor(np.stack(drawn), device=self.device)
        return self._drawn[key]
