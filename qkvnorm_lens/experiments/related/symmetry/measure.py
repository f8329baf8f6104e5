"""What the order of the earlier tokens does to a prediction, and where it comes from.

Zuo & Guerzhoy 2024 (arXiv 2402.05969): without positions and without a causal mask nothing in a
transformer knows the order; the mask breaks this symmetry. Measured on trained models, with
positions, mask and both taken out, and on random models without positions of 1, 2 and 4 layers,
with and without mask and skip connections.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    Amount,
    Claim,
    Experiment,
    Part,
    Size,
    Subject,
    by_group,
    group_mean,
    markdown,
    panels,
    reading,
)
from qkvnorm_lens.plots.charts import BLUE, GREEN, GREY, ORANGE, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VARIANTS: Final = ("as is", "positions removed", "mask removed", "both removed")
COLOURS: Final = dict(zip(VARIANTS, ("#000000", BLUE, ORANGE, GREEN), strict=True))
MARKERS: Final = dict(zip(VARIANTS, "osD^", strict=True))
LAYERS: Final = (1, 2, 4)
PLACEMENTS: Final = ("none", "pre", "qkv")
SKIPS: Final = {"both": "skip connections", "none": "no skip connections"}
LENGTH: Final = 24  # tokens that random models read
CONSTRUCTED: Final = "random"
LEAST: Final = 1e-8  # of the figure's logarithmic axes


@dataclass(frozen=True)
class Scale:
    """How much: what is read, permutations of each prompt, seeds and prompts of random models."""

    amount: Amount
    permutations: int
    seeds: tuple[int, ...]
    prompts: int


SCALES: Final[dict[Size, Scale]] = {
    "smoke": Scale(Amount(sums=8, windows=1, length=24), 3, (1,), 2),
    "quick": Scale(Amount(sums=48, windows=1, length=64), 4, (1, 2), 4),
    "full": Scale(Amount(sums=256, windows=4, length=128), 8, (1, 2, 3, 4), 8),
}


# -- measuring --------------------------------------------------------------------------------


def measure(subject: Subject, scale: Scale) -> pd.DataFrame:
    """`hooks.symmetry_gap` of a model: sums up to ``=``, or windows; the first token is kept."""
    import hooks

    model = subject.load()
    report = hooks.symmetry_gap(
        model,
        prompts_of(subject, scale.amount),
        permutations=scale.permutations,
        keep_first=True,
        batch_size=64 if subject.kind == "addition" else 8,
        progress=False,
    )
    return frames(report, {**subject.columns, "layers": int(model.cfg.n_layers), "skip": "-"})


def prompts_of(subject: Subject, amount: Amount) -> list[list[int]]:
    """Texts as they are read elsewhere; of sums the question: what follows ``=`` is to be said."""
    from qkvnorm_lens.training import EQUALS

    ids = reading(subject, amount).ids
    if subject.kind == "language":
        return ids
    return [row[: row.index(EQUALS) + 1] for row in ids]


def construct(n_layers: int, scale: Scale) -> pd.DataFrame:
    """Random models without positions: every placement, with and without skip connections."""
    import torch

    import hooks
    from qkvnorm_lens.models import QKVNormConfig, QKVNormTransformer, to_bridge

    sizes: dict[str, Any] = {
        "d_model": 64,
        "d_head": 16,
        "n_heads": 4,
        "d_mlp": 128,
        "d_vocab": 200,
        "n_ctx": 32,
    }
    out = []
    for placement in PLACEMENTS:
        for skip in SKIPS:
            for seed in scale.seeds:
                config = QKVNormConfig(
                    placement=placement,
                    skip=skip,
                    n_layers=n_layers,
                    seed=seed,
                    positional_embedding_type="none",
                    initializer_range=0.15,
                    **sizes,
                )
                rng = torch.Generator().manual_seed(seed)
                ids = torch.randint(200, (scale.prompts, LENGTH), generator=rng)
                model = to_bridge(QKVNormTransformer(config).eval())
                report = hooks.symmetry_gap(
                    model, ids, permutations=scale.permutations, batch_size=64, progress=False
                )
                names = {
                    "model": f"{CONSTRUCTED}-{n_layers}-{placement}-{skip}-{seed}",
                    "group": f"{CONSTRUCTED}-{n_layers}-{placement}-{skip}",
                    "placement": placement,
                    "seed": seed,
                }
                out.append(frames(report, {**names, "layers": n_layers, "skip": skip}))
    return pd.concat(out, ignore_index=True)


def frames(report: Any, names: dict[str, Any]) -> pd.DataFrame:
    """Rows by variant (layer -2) and by layer (-1: the embedding)."""
    whole, layers = report.to_frame("variant"), report.to_frame("layer")
    said = whole["verdict"].map({"none": 1.0, "gap": 0.0})  # NaN: undecided
    whole = whole.drop(columns="verdict").assign(layer=-2, label="all", vanishes=said)
    rows = pd.concat([whole.assign(by="variant"), layers.assign(by="layer")], ignore_index=True)
    rows = rows.assign(
        **names,
        **{name: report.model[name]["status"] for name in ("positions", "mask")},
        **{f"why_{name}": report.model[name]["why"] or "-" for name in ("positions", "mask")},
    )
    first = [*names, "positions", "mask", "why_positions", "why_mask", "by", "variant", "layer"]
    out: pd.DataFrame = rows[[*first, *(c for c in rows.columns if c not in first)]]
    return out


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each number of layers of random models, and one for each model."""
    scale = SCALES[size]
    made = {"seeds": list(scale.seeds), "prompts": scale.prompts, "length": LENGTH}
    shared = {"permutations": scale.permutations}
    out = [
        Part(f"{CONSTRUCTED}-{n}", partial(construct, n, scale), None, {**shared, **made})
        for n in LAYERS
    ]
    return out + [
        Part(s.name, partial(measure, s, scale), s, {**shared, **scale.amount.settings(s)})
        for s in subjects
    ]


# -- reading the table --------------------------------------------------------------------------


def trained(table: pd.DataFrame) -> pd.DataFrame:
    """Rows about models that were given."""
    return table[~table["group"].str.startswith(f"{CONSTRUCTED}-")]


def constructed(table: pd.DataFrame, **cell: Any) -> pd.DataFrame:
    """Rows by variant about random models, of one cell."""
    rows = table[table["group"].str.startswith(f"{CONSTRUCTED}-") & (table["by"] == "variant")]
    for name, value in cell.items():
        rows = rows[rows[name] == value]
    return rows


def zero(rows: pd.DataFrame) -> int:
    """Models without a gap; what rounding leaves undecided (NaN) is none of them."""
    return int((rows["vanishes"] == 1).sum())


def seen(rows: pd.DataFrame) -> int:
    """Models with a gap that is clearly above rounding."""
    return int((rows["vanishes"] == 0).sum())


def deepest(table: pd.DataFrame) -> str:
    """The group of the model with most layers."""
    rows = trained(table)
    return str(rows.nlargest(1, "layers")["group"].iloc[0]) if len(rows) else ""


# -- figure -----------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """Total variation by model, of random models by depth; one by layer; neighbours of all."""
    fig, axes = panels(2, 2, width=4.6, height=3.5)
    _draw_models(axes[0], trained(table))
    _draw_constructed(axes[1], table)
    group = deepest(table)
    layers = table[(table["group"] == group) & (table["by"] == "layer")]
    _draw_depth(axes[2], layers, group)
    _draw_neighbours(axes[3], table)
    _legend(fig, table)
    return fig


def _legend(fig: Figure, table: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[v], marker=MARKERS[v], markersize=4, linewidth=1.2, label=v)
        for v in VARIANTS
        if (table["variant"] == v).any()
    ]
    handles.append(
        Line2D([], [], color=GREY, marker="_", markersize=10, linestyle="none", label="rounding")
    )
    fig.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def _draw_models(ax: Axes, table: pd.DataFrame) -> None:
    named = by_group(table[table["by"] == "variant"])
    for row, (_, mine) in enumerate(named):
        for i, variant in enumerate(VARIANTS):
            of = mine[mine["variant"] == variant]
            if not len(of):
                continue
            y = row + 0.18 * (i - 1.5)
            colour = COLOURS[variant]
            ax.plot(of["floor_tv"].clip(lower=LEAST), [y] * len(of), "|", color=GREY, markersize=6)
            ax.plot(of["tv"].clip(lower=LEAST), [y] * len(of), MARKERS[variant], color=colour,
                    markersize=3.5)  # fmt: skip
    ax.set_yticks(range(len(named)), [group for group, _ in named], fontsize=8)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlim(LEAST / 2, 2)
    ax.set_xlabel("total variation of the next token (0 to 1)")
    ax.set_title("models, earlier tokens permuted", fontsize=10)
    grid(ax)


def _draw_constructed(ax: Axes, table: pd.DataFrame) -> None:
    """Squares: mask, diamonds: none; filled: with skip connections, open: without."""
    rows = constructed(table)
    for variant in ("as is", "mask removed"):
        for i, skip in enumerate(SKIPS):
            mine = rows[(rows["variant"] == variant) & (rows["skip"] == skip)]
            for j, placement in enumerate(PLACEMENTS):
                of = mine[mine["placement"] == placement]
                at = np.array([LAYERS.index(n) for n in of["layers"]])
                x = at + 0.12 * (j - 1) + 0.04 * (2 * i - 1)
                ax.plot(x, of["floor_tv"].clip(lower=LEAST), "_", color=GREY, markersize=5)
                ax.plot(
                    x,
                    of["tv"].clip(lower=LEAST),
                    MARKERS[variant],
                    color=COLOURS[variant],
                    markerfacecolor=COLOURS[variant] if skip == "both" else "white",
                    markersize=4,
                )
    ax.set_yscale("log")
    ax.set_ylim(LEAST / 2, 2)
    ax.set_xticks(range(len(LAYERS)), [str(n) for n in LAYERS])
    ax.set_xlabel("layers (from left: No-, Pre-, QKV-Norm)")
    ax.set_ylabel("total variation of the next token")
    ax.set_title("random, without positions (open: no skips)", fontsize=10)
    grid(ax)


def _draw_depth(ax: Axes, layers: pd.DataFrame, group: str) -> None:
    """Change of one group's stream, by blocks passed."""
    from matplotlib.ticker import MaxNLocator

    for variant in VARIANTS:
        mine = layers[layers["variant"] == variant]
        if not len(mine):
            continue
        depth = mine.groupby("layer")[["stream", "floor_stream"]].mean()
        x = depth.index.to_numpy() + 1
        ax.plot(x, depth["floor_stream"].clip(lower=LEAST), color=GREY, linewidth=0.7)
        ax.plot(
            x,
            depth["stream"].clip(lower=LEAST),
            color=COLOURS[variant],
            marker=MARKERS[variant],
            markersize=3,
            linewidth=1.1,
        )
    ax.set_yscale("log")
    ax.set_ylim(LEAST / 2, 3)
    ax.set_xlabel("blocks passed (0: embedding)")
    ax.set_ylabel("change of the stream, |y − y′| / |y|")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(f"{group}: the last position's stream", fontsize=10)
    grid(ax)


def _draw_neighbours(ax: Axes, table: pd.DataFrame) -> None:
    """A point for each model, behind its last block; a row for each group, random ones by kind."""
    rows = [(name, mine) for name, mine in by_group(trained(table))]
    rows += [(f"random, {words}", mine) for words, mine in _random_kinds(table)]
    for row, (_, mine) in enumerate(rows):
        for i, variant in enumerate(VARIANTS):
            x = _nearer(mine, variant).dropna().to_numpy()
            y = np.full(len(x), row + 0.18 * (i - 1.5))
            ax.plot(100 * x, y, MARKERS[variant], color=COLOURS[variant], markersize=3.5)
    ax.axvline(50, color=GREY, linewidth=0.9, linestyle="--")
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 102)
    ax.set_xlabel("pairs, the nearer position more alike (%)\n50: distance says nothing")
    ax.set_title("are neighbours alike? behind the last block", fontsize=10)
    grid(ax)


# -- words ------------------------------------------------------------------------------------


def text(table: pd.DataFrame) -> str:
    """Gaps by group and variant, the random models, neighbours, and what could not be removed."""
    head = [
        "models",
        "seeds",
        *(f"TV, {v}" for v in VARIANTS),
        "arg max moves, as is (%)",
        "positions removed (%)",
    ]
    rows = []
    for group, mine in by_group(trained(table)):
        cells = []
        for variant in VARIANTS:
            of = mine[(mine["by"] == "variant") & (mine["variant"] == variant)]
            cells.append(_gap(of))
        moves = [
            group_mean(mine[(mine["by"] == "variant") & (mine["variant"] == v)], "moved").percent(0)
            if (mine["variant"] == v).any()
            else "-"
            for v in VARIANTS[:2]
        ]
        rows.append([group, str(mine["model"].nunique()), *cells, *moves])
    lines = [
        markdown(head, rows),
        "",
        "Total variation between the next token's distributions (0 to 1; mean over prompts and "
        "permutations, with 95% intervals over seeds) when the tokens between the first and the "
        "last are permuted; how often the arg max moves, as it is and without "
        "positions. `0`: of no prompt a logit moves by ten times what rounding moves it, and "
        "rounding is small; `?`: undecided, rounding too large. Of sums, the question up to `=` is "
        "read: a permuted question has another answer, so that a model that adds must have a gap.",
        "",
        *_constructed_words(table),
        *_neighbour_words(table),
        *_left_words(table),
    ]
    return "\n".join(lines)


def _gap(of: pd.DataFrame) -> str:
    if not len(of):
        return "-"
    if zero(of) == len(of):
        return f"0 (≤ {of['tv'].max():.0e})"
    found = group_mean(of, "tv")
    doubt = "" if zero(of) + seen(of) == len(of) else " ?"
    half = "" if np.isnan(found.half) else f" ± {found.half:.3f}"
    return f"{found.value:.3f}{half}{doubt}"


def _constructed_words(table: pd.DataFrame) -> list[str]:
    lines = [f"Random models without positions ({LENGTH} tokens, all but the last permuted):"]
    for n in LAYERS:
        causal = constructed(table, layers=n, variant="as is")
        free = constructed(table, layers=n, variant="mask removed")
        said = []
        for rows, name in ((causal, "with the causal mask"), (free, "without")):
            low, high = rows["tv"].min(), rows["tv"].max()
            said.append(
                f"{name} the gap is zero in {zero(rows)} of {len(rows)} models "
                f"(total variation {low:.1e} to {high:.1e})"
            )
        lines.append(f"- {n} layer{'s' * (n > 1)}: {', '.join(said)}.")
    deep = constructed(table, variant="as is")
    deep = deep[deep["layers"] > 1]
    means = {s: group_mean(deep[deep["skip"] == s], "tv").value for s in SKIPS}
    lines.append(
        f"Skip connections are not what breaks the symmetry: with two or more causal layers the "
        f"mean total variation is {means['both']:.3f} with them and {means['none']:.3f} without."
        if seen(deep) == len(deep)
        else "With two or more causal layers the gap is zero in "
        f"{zero(deep)} of {len(deep)} models."
    )
    return [*lines, ""]


def _nearer(table: pd.DataFrame, variant: str) -> pd.Series[float]:
    """Behind the last block of each model."""
    rows = table[(table["by"] == "layer") & (table["variant"] == variant)]
    return rows.sort_values("layer").groupby("model")["nearer"].last()


def _random_kinds(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Random models with and without skip connections: they differ in this."""
    random = table[table["group"].str.startswith(f"{CONSTRUCTED}-")]
    kinds = [(words, random[random["skip"] == skip]) for skip, words in SKIPS.items()]
    return [(words, mine) for words, mine in kinds if len(mine)]


def _percents(shares: pd.Series[float]) -> str:
    """Of each model, by seed."""
    said = "/".join(f"{100 * x:.0f}" for x in shares)
    return f"{said}%" if said else "-"


def _neighbour_words(table: pd.DataFrame) -> list[str]:
    lines = [
        "Neighbours: of two earlier positions, how often is the nearer one more alike (cosine "
        "behind the last block, distances up to 16, the first token left out; 50%: distance says "
        "nothing)? Random models without positions:"
    ]
    for words, mine in _random_kinds(table):
        masked, free = (_nearer(mine, v) for v in ("as is", "mask removed"))
        lines.append(
            f"- {words}: {100 * masked.mean():.0f}% of pairs with the causal mask "
            f"({100 * masked.min():.0f}% to {100 * masked.max():.0f}% by model), "
            f"{100 * free.mean():.0f}% without it."
        )
    groups = by_group(trained(table))
    if groups:
        rows = [[group, *(_percents(_nearer(mine, v)) for v in VARIANTS)] for group, mine in groups]
        lines += ["", "Models, a number for each seed:", ""]
        lines.append(markdown(["models", *VARIANTS], rows))
        shares = _nearer(trained(table), "positions removed")
        if len(shares):
            lines += [
                "",
                f"Where the mask alone is left (positions removed) it is more than half in "
                f"{int((shares > 0.5).sum())} of {len(shares)} models "
                f"({100 * shares.min():.0f}% to {100 * shares.max():.0f}%).",
            ]
    return [*lines, ""]


def _left_words(table: pd.DataFrame) -> list[str]:
    out = []
    for group, mine in by_group(trained(table)):
        for what in ("positions", "mask"):
            if (mine[what] == "unremovable").any():
                why = mine[f"why_{what}"].iloc[0]
                out.append(f"{group}: the {what} could not be removed: {why}.")
            elif (mine[what] == "absent").all():
                out.append(f"{group}: has no {what}.")
    return out


def claims(table: pd.DataFrame) -> list[Claim]:
    """Invariance without mask and positions, what the mask breaks, skips, and neighbours."""
    free = pd.concat(
        [
            constructed(table, variant="mask removed"),
            trained(table)[lambda t: (t["by"] == "variant") & (t["variant"] == "both removed")],
        ]
    )
    one = constructed(table, layers=1, variant="as is")
    deep = constructed(table, variant="as is")
    deep = deep[deep["layers"] > 1]
    return [
        Claim(
            "without positions and mask, the next token does not know the order",
            "the prediction is invariant to permutations of the earlier tokens",
            f"no gap in {zero(free)} of {len(free)} models"
            + (f", a gap in {seen(free)}" if zero(free) < len(free) else ""),
            "yes" if zero(free) == len(free) else "no" if seen(free) else "not decided",
            "sums over sets; what is left is rounding, which is measured beside it",
        ),
        Claim(
            "the causal mask breaks the symmetry",
            "without positions the order can be seen through the causal mask",
            f"one layer: a gap in {seen(one)} of {len(one)} random models; two and four layers: in "
            f"{seen(deep)} of {len(deep)}",
            _breaks(one, deep),
            "the last row of the first layer sees a set; only rows that saw prefixes, in the "
            "second, tell of the order",
        ),
        _skip_claim(deep),
        *_neighbour_claims(table),
    ]


def _breaks(one: pd.DataFrame, deep: pd.DataFrame) -> Literal["yes", "no", "in part"]:
    if seen(deep) < len(deep):
        return "in part" if seen(deep) else "no"
    return "in part" if seen(one) < len(one) else "yes"


def _skip_claim(deep: pd.DataFrame) -> Claim:
    bare = deep[deep["skip"] == "none"]
    return Claim(
        "skip connections and the order of tokens",
        "version 2 found no definitive evidence that residual connections are responsible",
        f"random models of 2 and 4 causal layers without any skip connection: a gap in "
        f"{seen(bare)} of {len(bare)}",
        "yes" if seen(bare) else "no",
        "they are not needed for the order to be seen; whether they help to learn from it is asked "
        "in the experiment `positions`",
    )


_PUBLISHED_NEAR: Final = (
    "nearby embeddings are more similar than faraway ones, in random and trained causal models "
    "without positions (arXiv 2501.00073)"
)


def _neighbour_claims(table: pd.DataFrame) -> list[Claim]:
    """Random models, with and without skips, and trained ones apart."""
    said, both = [], []
    for words, mine in _random_kinds(table):
        masked, free = (_nearer(mine, v) for v in ("as is", "mask removed"))
        both.append(masked)
        said.append(
            f"{words}: {100 * masked.mean():.0f}% of pairs (more than half in "
            f"{int((masked > 0.5).sum())} of {len(masked)} models), {100 * free.mean():.0f}% "
            "without the mask"
        )
    out = [
        Claim(
            "nearby positions are alike in random models, where order comes from the mask alone",
            _PUBLISHED_NEAR,
            f"the nearer is more alike, {'; '.join(said)}",
            _more_than_half(pd.concat(both)),
            f"random tokens, {LENGTH} of them; rows that attend to almost the same prefix",
        )
    ]
    bare = trained(table)
    shares = _nearer(bare, "positions removed")
    if len(shares):
        by = [
            f"{group} {_percents(_nearer(mine, 'positions removed'))}"
            for group, mine in by_group(bare)
            if len(_nearer(mine, "positions removed"))
        ]
        out.append(
            Claim(
                "nearby positions are alike in trained models whose positions are removed",
                _PUBLISHED_NEAR,
                f"the nearer is more alike in {', '.join(by)} of pairs (more than half in "
                f"{int((shares > 0.5).sum())} of {len(shares)} models)",
                _more_than_half(shares),
                "these were trained with positions, which are taken out afterwards; models that "
                "never had any are in the experiment `positions`",
            )
        )
    return out


def _more_than_half(shares: pd.Series[float]) -> Literal["yes", "no", "in part"]:
    more = int((shares > 0.5).sum())
    return "yes" if more == len(shares) else "in part" if more else "no"


EXPERIMENT: Final = Experiment(
    name="symmetry",
    title="What the order of the earlier tokens changes: positions, mask and depth",
    source="Zuo & Guerzhoy 2024, arXiv 2402.05969; arXiv 2501.00073",
    models="any",
    minutes={"smoke": 0.2, "quick": 0.5, "full": 3.5},
    version=2,
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
