"""Spread of the lengths of attended embeddings (Menary et al. 2024, Fig. 1 and 9-12)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    COLOURS,
    PLACEMENT_NAMES,
    Amount,
    Claim,
    Experiment,
    Part,
    Size,
    Subject,
    by_group,
    group_mean,
    label,
    markdown,
    panels,
    placement_of,
    reading,
    study_difference,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AMOUNT: Final[dict[Size, Amount]] = {
    "smoke": Amount(sums=64, windows=1, length=64),
    "quick": Amount(sums=500, windows=4),
    "full": Amount(sums=2_000, windows=8),
}
Vectors = Literal["stream", "k", "v"]
VECTORS: Final[tuple[Vectors, ...]] = get_args(Vectors)
MEANING: Final = {"stream": "embeddings", "k": "keys", "v": "values"}
MARKERS: Final = {"stream": "o", "k": "s", "v": "^"}
PUBLISHED: Final = 0.20  # Baseline Pre-Norm; 0.30 for Alternate and Large


def measure(subject: Subject, amount: Amount) -> pd.DataFrame:
    """`hooks.spread` of the stream, the keys and the values, by head, layer and model."""
    import hooks

    model, read = subject.load(), reading(subject, amount)
    frames = []
    for of in VECTORS:
        report = hooks.spread(model, read.ids, of=of, batch_size=64, progress=False)
        for by in ("head", "layer", "model"):
            frame = report.to_frame(by)
            frames.append(frame.assign(of=of, by=by))
    rows = pd.concat(frames, ignore_index=True)
    rows["label"] = rows["label"].fillna("all")
    rows[["layer", "head"]] = rows[["layer", "head"]].fillna(-1).astype(int)
    names = [*subject.columns, "of", "by", "layer", "head", "label"]
    rows = rows.assign(**subject.columns)
    return rows[[*names, *(c for c in rows.columns if c not in names)]]


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    amount = AMOUNT[size]
    return [Part(s.name, partial(measure, s, amount), s, amount.settings(s)) for s in subjects]


def _of(table: pd.DataFrame, of: str, by: str) -> pd.DataFrame:
    return table[(table["of"] == of) & (table["by"] == by)]


# -- figure -----------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """A panel per group: 5% to 95% of the weight, by layer and head; one of all bands."""
    named = by_group(table)
    n = len(named) + 1
    rows = -(-n // 4)
    columns = -(-n // rows)
    fig, axes = panels(rows, columns, width=3.1, height=2.9)
    for ax, (group, mine) in zip(axes, named, strict=False):
        _draw_group(ax, mine)
        ax.set_title(label(group, placement_of(mine)), fontsize=9)
    for i, ax in enumerate(axes[: len(named)]):
        if i % columns == 0:
            ax.set_ylabel("norm over the head's median")
    _draw_bands(axes[len(named)], named)
    for ax in axes[len(named) + 1 :]:
        ax.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    across = 4 if columns > 2 else 2
    fig.legend(handles, names, loc="outside lower center", ncols=across, fontsize=8, frameon=False)
    return fig


def _draw_group(ax: Axes, mine: pd.DataFrame) -> None:
    """Layers as broad bars, heads as thin ones beside each other, the first token as a cross."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    from qkvnorm_lens.plots.charts import grid, plain

    colour = COLOURS[placement_of(mine)]
    layers, heads = _of(mine, "stream", "layer"), _of(mine, "stream", "head")
    depth = layers.groupby("layer")[["low", "high", "first_norm"]].mean()
    ax.bar(
        depth.index,
        depth["high"] - depth["low"],
        bottom=depth["low"],
        width=0.9,
        color=colour,
        alpha=0.25,
        label="90% of a layer's weight",
    )
    n_heads = int(heads["head"].max()) + 1
    at = heads["layer"] + 0.8 * ((heads["head"] + 0.5) / n_heads - 0.5)
    thin = 0.8 if len(heads) < 60 else 0.4
    ax.vlines(
        at, heads["low"], heads["high"], color=colour, linewidth=thin, label="90% of a head's"
    )
    ax.plot(depth.index, depth["first_norm"], "kx", markersize=5, label="first token")
    for i, edge in enumerate((1 - PUBLISHED, 1 + PUBLISHED)):
        name = "±20%, published (Baseline Pre-Norm)" if not i else None
        ax.axhline(edge, color="#777777", linewidth=0.8, linestyle=":", zorder=0, label=name)
    ax.set_yscale("log")
    shown = np.r_[0.7, 1.4, depth["first_norm"], heads["low"], heads["high"]]
    low, high = np.nanmin(shown) / 1.1, np.nanmax(shown) * 1.1
    ax.set_ylim(low, high)
    ticks = [0.01, 0.1, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 10, 100, 1000]
    if high / low > 30:
        ticks = [0.001, 0.01, 0.1, 0.3, 1, 3, 10, 100, 1000]
    ax.set_yticks([t for t in ticks if low <= t <= high])
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    grid(ax)


def _draw_bands(ax: Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """Half-width of the band of each group, for embeddings, keys and values."""
    from qkvnorm_lens.plots.charts import grid

    for row, (_, mine) in enumerate(named):
        for i, of in enumerate(VECTORS):
            band = group_mean(_of(mine, of, "model"), "band")
            ax.errorbar(
                100 * band.value,
                row + 0.22 * (i - 1),
                xerr=100 * np.nan_to_num(band.half),
                color=COLOURS[placement_of(mine)],
                marker=MARKERS[of],
                markersize=4,
                capsize=2,
                linestyle="none",
            )
    for of in VECTORS:
        ax.plot([], [], MARKERS[of], color="#777777", markersize=4, label=MEANING[of])
    ax.axvline(100 * PUBLISHED, color="#777777", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_yticks(range(len(named)), [group for group, _ in named], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("90% within ± (%)")
    ax.legend(fontsize=7, frameon=False, loc="best")
    grid(ax)


# -- words ------------------------------------------------------------------------------------


def text(table: pd.DataFrame) -> str:
    """Bands by group, what they are by layer, and where the first token lies."""
    head = ["models", "seeds", "embeddings", "by layer", "keys", "values", "first: share", "norm"]
    rows = []
    for group, mine in by_group(table):
        bands = {of: group_mean(_of(mine, of, "model"), "band") for of in VECTORS}
        layers = _of(mine, "stream", "layer").groupby("layer")["band"].mean()
        stream = _of(mine, "stream", "model")
        rows.append(
            [
                group,
                str(bands["stream"].n),
                f"±{bands['stream'].percent()}",
                f"{100 * layers.min():.0f} to {100 * layers.max():.0f}",
                f"±{bands['k'].percent()}",
                f"±{bands['v'].percent()}",
                f"{group_mean(stream, 'first_share').percent(0)}",
                f"{group_mean(stream, 'first_norm').value:.3g}",
            ]
        )
    lines = [
        markdown(head, rows),
        "",
        "Half-width of the band around each head's median that holds 90% of the attention's "
        "weight, in percent (heads pooled; mean over seeds with 95% intervals). Embeddings: at the "
        "input of the layer's block; keys and values: as they enter the dot product and the "
        "average. The first token is left out; beside: its share of all attention, in percent, and "
        "its embedding's norm over the median.",
        "",
        *_findings(table),
    ]
    return "\n".join(lines)


def _findings(table: pd.DataFrame) -> list[str]:
    models = _of(table, "stream", "model")
    lines = []
    for group, mine in by_group(models):
        layers = _of(table[table["group"] == group], "stream", "layer")
        widest = layers.nlargest(1, "band").iloc[0]
        published = ""
        if placement_of(mine) == "pre":
            published = " (published for Pre-Norm: ±20% Baseline, ±30% Alternate and Large)"
        lines.append(
            f"{group}: ±{100 * mine['band'].mean():.0f}%{published}; the widest layer, "
            f"{widest['label']}, reaches from {widest['low']:.2g} to {widest['high']:.2g} of the "
            "median."
        )
    gap = study_difference(models, "band")
    if gap is not None:
        verdict = (
            "QKV-Norm is wider"
            if gap.excludes_zero and gap.value < 0
            else "QKV-Norm is narrower"
            if gap.excludes_zero
            else "which of the two is wider is not decided"
        )
        lines.append(
            f"Pre-Norm minus QKV-Norm (study models): {gap.percent()} points, {gap.n} seeds each: "
            f"{verdict}; published: QKV-Norm is wider."
        )
    return lines


def claims(table: pd.DataFrame) -> list[Claim]:
    """The width of the band under Pre-Norm, and whether QKV-Norm's is wider."""
    models = _of(table, "stream", "model")
    out = []
    for group, mine in by_group(models):
        if placement_of(mine) != "pre":
            continue
        band = group_mean(mine, "band")
        half = np.nan_to_num(band.half, nan=np.inf)  # one seed decides nothing
        inside: Any = "yes" if band.value + half <= 0.30 else "no"
        if band.value - half <= 0.30 < band.value + half:
            inside = "not decided"
        out.append(
            Claim(
                f"90% of the attended norms, {PLACEMENT_NAMES['pre']} ({group})",
                "within ±20% of the median (Baseline), ±30% (Alternate, Large); Fig. 1, 9-12",
                f"within ±{band.percent()}% ({band.n} seed{'s' * (band.n != 1)})",
                inside,
                "held against the wider published band; a smaller model of another width and "
                "recipe, and nothing in Pre-Norm fixes the lengths: training does",
            )
        )
    gap = study_difference(models, "band")
    if gap is not None:
        wider: Any = "not decided"
        if gap.excludes_zero:
            wider = "yes" if gap.value < 0 else "no"
        out.append(
            Claim(
                "band of QKV-Norm against Pre-Norm",
                "QKV-Norm's is wider (Fig. 9-12)",
                f"Pre-Norm minus QKV-Norm {gap.percent()} points ({gap.n} seeds each)",
                wider,
                "under QKV-Norm no score reads the length of an embedding, so nothing holds it",
            )
        )
    return out


EXPERIMENT: Final = Experiment(
    name="spread",
    title="Spread of the lengths of attended embeddings",
    source="Menary et al. 2024, Fig. 1 and 9-12",
    models="any",
    minutes={"smoke": 0.1, "quick": 0.3, "full": 1.5},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
