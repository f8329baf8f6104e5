"""How sparse attention is: histograms of row maxima (Menary et al. 2024, Fig. 25-27)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    COLOURS,
    PLACEMENT_NAMES,
    STUDY,
    Amount,
    Claim,
    Experiment,
    Part,
    Reading,
    Size,
    Subject,
    by_group,
    group_mean,
    is_language,
    label,
    markdown,
    placement_of,
    reading,
    study_difference,
)

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

    from hooks.sites import LayerView

AMOUNT: Final[dict[Size, Amount]] = {
    "smoke": Amount(sums=64, windows=1, length=64),
    "quick": Amount(sums=1_000, windows=4),
    "full": Amount(sums=10_000, windows=8),
}
BINS: Final = 100
KINDS: Final = ("content", "sink")
MAP_HEADS: Final = 2
MAP_TOKENS: Final = 32
SHARP: Final = 3.0
TOP, BESIDE = 0.98, 0.80  # a peak: maxima from 0.98 on, against those from 0.80 to 0.98
_LEAST = 0.01  # percent: the histograms' lower end


def measure(subject: Subject, amount: Amount, maps: int) -> pd.DataFrame:
    """Row maxima of every head, the first row of each prompt left out, and a few heads' maps."""
    import hooks
    from hooks.model import encode
    from hooks.sites import observe

    model, read = subject.load(), reading(subject, amount)
    sites = hooks.attention_sites(model).layers
    counted = _Maxima([s.n_heads for s in sites])
    observe(model, sites, encode(model, read.ids), counted.add, batch_size=64)
    heads = pd.DataFrame(
        [
            {"what": "head", "layer": s.layer, "head": h, "label": f"{s.label}H{h}", **row}
            for i, s in enumerate(sites)
            for h in range(s.n_heads)
            for row in counted.of_head(i, h)
        ]
    )
    chosen = _most_sparse(heads, maps)
    frames = [counted.histogram(), heads, _maps(model, sites, read, chosen)]
    rows = pd.concat([f for f in frames if len(f)], ignore_index=True).assign(**subject.columns)
    first = [*subject.columns, "what", "kind"]
    return rows[[*first, *(c for c in rows.columns if c not in first)]]


class _Maxima:
    """Histogram of row maxima by kind of row, and counts by head."""

    def __init__(self, heads: list[int]) -> None:
        self.bins = np.zeros((len(KINDS), BINS), dtype=np.int64)
        # rows, sparse, non-sparse: [kind, head, 3]
        self.counts = [np.zeros((len(KINDS), n, 3), dtype=np.int64) for n in heads]

    def add(self, view: LayerView) -> None:
        """One layer of one batch; a row with one visible key has no choice and is left out."""
        from hooks import NON_SPARSE, SPARSE

        best, at = view.pattern.max(-1)
        rows = view.visible.sum(-1) >= 2
        for kind, chosen in enumerate((rows & (at != 0), rows & (at == 0))):
            self.bins[kind] += _binned(best[chosen])
            for i, mask in enumerate((chosen, best >= SPARSE, best < NON_SPARSE)):
                self.counts[view.index][kind, :, i] += (chosen & mask).sum((0, 2)).cpu().numpy()

    def histogram(self) -> pd.DataFrame:
        """One row per kind and bin."""
        return pd.DataFrame(
            [
                {"what": "histogram", "kind": kind, "low": b / BINS, "rows": int(self.bins[k, b])}
                for k, kind in enumerate(KINDS)
                for b in range(BINS)
            ]
        )

    def of_head(self, index: int, head: int) -> list[dict[str, Any]]:
        """One row per kind."""
        names = ("rows", "sparse", "non_sparse")
        return [
            {"kind": kind, **dict(zip(names, self.counts[index][k, head].tolist(), strict=True))}
            for k, kind in enumerate(KINDS)
        ]


def _binned(values: torch.Tensor) -> np.ndarray:
    """Counts in equal bins over [0, 1], a maximum of 1 in the last."""
    at = (values.double() * BINS).floor().clamp(0, BINS - 1).long().cpu().numpy()
    return np.bincount(at, minlength=BINS)


def _most_sparse(heads: pd.DataFrame, n: int) -> list[tuple[int, int]]:
    """(layer, head) of those with the largest share of sparse rows that attend to content."""
    total = heads.groupby(["layer", "head"])["rows"].sum()
    content = heads[heads["kind"] == "content"].set_index(["layer", "head"])["sparse"]
    order = (content / total).sort_values(ascending=False, kind="stable")
    return [(int(layer), int(head)) for layer, head in order.index[:n]]


def _maps(
    model: TransformerBridge, sites: Any, read: Reading, chosen: list[tuple[int, int]]
) -> pd.DataFrame:
    """Attention of the chosen heads in the first prompt, its first tokens."""
    from hooks.model import encode
    from hooks.sites import observe

    prompts = encode(model, [read.ids[0][:MAP_TOKENS]])
    tokens = [repr(token) for token in prompts.strings[0]]  # quoted: a CSV knows them as text
    rows: list[dict[str, Any]] = []

    def show(view: LayerView) -> None:
        for rank, (layer, head) in enumerate(chosen):
            if layer != view.sites.layer:
                continue
            pattern, seen = view.pattern[0, head].cpu(), view.visible[0, head].cpu()
            rows.extend(
                {
                    "what": "map",
                    "kind": "",
                    "layer": layer,
                    "head": head,
                    "label": f"{view.sites.label}H{head}",
                    "rank": rank,
                    "query": query,
                    "key": key,
                    "query_token": tokens[query],
                    "key_token": tokens[key],
                    "weight": round(float(pattern[query, key]), 4),
                }
                for query, key in seen.nonzero().tolist()
            )

    watched = [s for s in sites if any(s.layer == layer for layer, _ in chosen)]
    if watched:
        observe(model, watched, prompts, show)
    return pd.DataFrame(rows)


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model; the first of each group shows attention maps."""
    amount, out, seen = AMOUNT[size], [], set()
    for s in subjects:
        maps = 0 if s.group in seen else MAP_HEADS
        seen.add(s.group)
        settings = {**amount.settings(s), "maps": maps}
        out.append(Part(s.name, partial(measure, s, amount, maps), s, settings))
    return out


# -- numbers of a model -----------------------------------------------------------------------


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """One row per model: shares of its rows, and how high the peak at 1 is.

    Columns ``sparse``, ``non_sparse``: of all rows; ``sinks``: rows whose maximum is the first
    token; ``sinks_of_sparse``: of the sparse ones; ``sparse_content``: sparse rows among those
    whose maximum is another token; ``peak``: density of maxima from 0.98 on over that from 0.80 to
    0.98, all rows; ``peak_content``: the same without sinks.
    """
    heads, bins = (table[table["what"] == what] for what in ("head", "histogram"))
    out = []
    for name, mine in heads.groupby("model", sort=False):
        count = mine.groupby("kind")[["rows", "sparse", "non_sparse"]].sum()
        rows, sparse = count["rows"], count["sparse"]
        own = bins[bins["model"] == name]
        out.append(
            {
                **{c: mine[c].iloc[0] for c in ("model", "group", "placement", "seed")},
                "rows": int(rows.sum()),
                "sparse": sparse.sum() / rows.sum(),
                "non_sparse": count["non_sparse"].sum() / rows.sum(),
                "sinks": rows["sink"] / rows.sum(),
                "sinks_of_sparse": sparse["sink"] / sparse.sum() if sparse.sum() else np.nan,
                "sparse_content": sparse["content"] / rows["content"]
                if rows["content"]
                else np.nan,
                "peak": _peak(own),
                "peak_content": _peak(own[own["kind"] == "content"]),
            }
        )
    return pd.DataFrame(out)


def _peak(bins: pd.DataFrame) -> float:
    low = (bins["low"] + 0.5 / BINS).to_numpy()
    rows = bins["rows"].to_numpy(dtype=float)
    top = float(rows[low > TOP].sum()) / (1 - TOP)
    beside = float(rows[(low > BESIDE) & (low < TOP)].sum()) / (TOP - BESIDE)
    if not beside:
        return np.inf if top else np.nan
    return top / beside


# -- figure -----------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """Above: histograms of row maxima; below: attention of the head with most sparse rows."""
    from qkvnorm_lens.plots.charts import new_figure

    bins = table[table["what"] == "histogram"]
    kinds = _kinds_of_models(bins)
    named = by_group(table[table["what"] == "map"])
    rows = -(-len(named) // 4)
    columns = -(-len(named) // rows) if rows else 0
    fig = new_figure((3.1 * max(columns, 3), 3.0 + 3.0 * rows))
    heights = [1, rows] if rows else [1]
    above, *below = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).ravel()
    axes = list(above.subplots(1, len(kinds), squeeze=False).ravel())
    for ax, (title, chosen) in zip(axes, kinds.items(), strict=True):
        _draw_histograms(ax, chosen)
        ax.set_title(title, fontsize=9)
    axes[0].set_ylabel("rows in 0.02 of the maximum (%)")
    for part in below:
        cells = list(part.subplots(rows, columns, squeeze=False).ravel())
        for ax, (group, mine) in zip(cells, named, strict=False):
            _draw_map(ax, mine[mine["rank"] == 0], group)
        for ax in cells[len(named) :]:
            ax.set_axis_off()
    return fig


def _kinds_of_models(bins: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Study models, other addition models, language models: those that are there."""
    study = bins["group"].str.startswith(STUDY)
    language = bins["placement"].fillna("") == ""
    found = {
        "study models": bins[study],
        "other addition models" if study.any() else "addition models": bins[~study & ~language],
        "language models": bins[language],
    }
    return {title: rows for title, rows in found.items() if len(rows)}


def _draw_histograms(ax: Axes, bins: pd.DataFrame) -> None:
    """Share of rows by maximum; a group's models added up, sinks of language models apart."""
    from qkvnorm_lens.plots.charts import BLUE, ORANGE, grid, plain

    for group, mine in by_group(bins):
        apart = is_language(mine)
        lines = [(k, mine[mine["kind"] == k]) for k in KINDS] if apart else [("", mine)]
        for kind, chosen in lines:
            count = chosen.groupby(np.floor(chosen["low"] * 50 + 1e-6))["rows"].sum().to_numpy()
            colour = {"": COLOURS[placement_of(mine)], "content": BLUE, "sink": ORANGE}[kind]
            name = {"content": f"{group}: other tokens", "sink": f"{group}: first token (sinks)"}
            ax.stairs(
                100 * count / mine["rows"].sum(),
                np.linspace(0, 1, len(count) + 1),
                color=colour,
                linewidth=1.3,
                label=name.get(kind, label(group, placement_of(mine))),
            )
    for edge in (0.70, 0.95):
        ax.axvline(edge, color="#777777", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylim(_LEAST, 100)
    ax.yaxis.set_major_formatter(plain)
    ax.set_xlim(0, 1)
    ax.set_xlabel("largest attention of a row")
    ax.legend(fontsize=7, frameon=False, loc="upper left")
    grid(ax)


def _draw_map(ax: Axes, cells: pd.DataFrame, group: str) -> None:
    """One head's attention, queries down, keys across."""
    query, key = cells["query"].astype(int), cells["key"].astype(int)
    size = int(max(query.max(), key.max())) + 1
    picture = np.full((size, size), np.nan)
    picture[query, key] = cells["weight"]
    ax.imshow(picture, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    names = dict(zip(query, cells["query_token"], strict=True))
    tokens = [str(names[i])[1:-1] for i in range(size)]
    font = 7 if size <= 22 else 4.5
    ax.set_xticks(
        range(size), tokens, fontsize=font, rotation=0 if max(map(len, tokens)) < 2 else 90
    )
    ax.set_yticks(range(size), tokens, fontsize=font)
    ax.tick_params(length=0)
    ax.set_xlabel("key", fontsize=8)
    ax.set_ylabel("query", fontsize=8)
    ax.set_title(f"{group} {cells['label'].iloc[0]}", fontsize=9)


# -- words ------------------------------------------------------------------------------------


def text(table: pd.DataFrame) -> str:
    """Shares of sparse and non-sparse rows by group, sinks apart, and the peak at 1."""
    models = shares(table)
    head = [
        "models",
        "seeds",
        "max ≥ 0.95",
        "max < 0.70",
        "on the first token",
        "of the sparse",
        "max ≥ 0.95, first token apart",
        "peak",
        "peak, first token apart",
    ]
    percents = ("sparse", "non_sparse", "sinks", "sinks_of_sparse", "sparse_content")
    rows = []
    for group, mine in by_group(models):
        cells = [group_mean(mine, column).percent() for column in percents]
        peaks = [_number(mine, column) for column in ("peak", "peak_content")]
        rows.append([group, str(len(mine)), *cells, *peaks])
    lines = [
        markdown(head, rows),
        "",
        "Shares of attention rows in percent, rows with one visible key left out, with 95% "
        "intervals over seeds. On the first token: rows whose maximum is the first token (`[` in "
        "addition, the attention sink in language models); then the same among the sparse rows; "
        f"then sparse rows among all others. Peak: density of maxima from {TOP} on over that from "
        f"{BESIDE} to {TOP}.",
        "",
    ]
    for column, what in (("sparse", "sparse rows"), ("sparse_content", "the same, sinks apart")):
        gap = study_difference(models, column)
        if gap is not None:
            lines.append(
                f"Pre-Norm minus QKV-Norm (study models), {what}: {gap.percent()} points "
                f"({gap.n} seeds each)."
            )
    lines.append(
        "Published: Pre-Norm has a sharp peak at 1, QKV-Norm none; there the scores of both are "
        "scaled to a standard deviation of 0.1 at the start, here by 1/sqrt(d_head) (see the "
        "experiment `confound`)."
    )
    shown = table[(table["what"] == "map") & (table["rank"] == 0)]
    named = [f"{group} {mine['label'].iloc[0]}" for group, mine in by_group(shown)]
    lines.append(f"Shown as maps, the heads with most sparse rows: {', '.join(named)}.")
    return "\n".join(lines)


def _number(mine: pd.DataFrame, column: str) -> str:
    found = group_mean(mine, column)
    if np.isnan(found.value):
        return "none"
    return f"{found.value:.1f}" + ("" if np.isnan(found.half) else f" ± {found.half:.1f}")


def claims(table: pd.DataFrame) -> list[Claim]:
    """Is there a peak at 1, under Pre-Norm and under QKV-Norm?"""
    models = shares(table)
    out = []
    for group, mine in by_group(models):
        placement = placement_of(mine)
        if placement not in ("pre", "qkv"):
            continue
        peak, sparse = group_mean(mine, "peak"), group_mean(mine, "sparse")
        half = np.nan_to_num(peak.half, nan=np.inf)  # one seed decides nothing
        decided = peak.value - half > SHARP or peak.value + half < SHARP
        sharp = peak.value > SHARP
        same: Any = "yes" if sharp == (placement == "pre") else "no"
        out.append(
            Claim(
                f"row maxima, {PLACEMENT_NAMES[placement]} ({group})",
                {"pre": "a sharp peak at 1", "qkv": "no peak at 1"}[placement] + " (Fig. 25-27)",
                f"{'a sharp' if sharp else 'no sharp'} peak: maxima from {TOP} on are "
                f"{_number(mine, 'peak')} times as dense as those from {BESIDE} to {TOP}; "
                f"{sparse.percent()}% of the rows are sparse ({peak.n} "
                f"seed{'s' * (peak.n != 1)})",
                same if decided else "not decided",
                "scores scaled by 1/sqrt(d_head); the paper's start at a standard deviation of "
                "0.1, from which a QKV-Norm head can hardly reach a maximum of 0.95; sharp: more "
                f"than {SHARP:g} times",
            )
        )
    return out


EXPERIMENT: Final = Experiment(
    name="sparsity",
    title="How sparse attention is: largest attention of each row",
    source="Menary et al. 2024, Fig. 25-27",
    models="any",
    minutes={"smoke": 0.1, "quick": 0.2, "full": 1.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
