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

from qkvnorm_lens._plot_style import BLUE, GREEN, GREY, ORANGE, grid
from qkvnorm_lens.experiments._base import Claim, Experiment, Part, Size, Subject
from qkvnorm_lens.experiments._draw import panels
from qkvnorm_lens.experiments._grouped import by_group, group_mean, markdown
from qkvnorm_lens.experiments._read import Amount, reading

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
    from qkvnorm_lens.addition import EQUALS

    ids = reading(subject, amount).ids
    if subject.kind == "language":
        return ids
    return [row[: row.index(EQUALS) + 1] for row in ids]


def construct(n_layers: int, scale: Scale) -> pd.DataFrame:
    """Random models without positions: every placement, with and without skip connections."""
    import torch

    import hooks
    from qkvnorm_lens.adapter import to_bridge
    from qkvnorm_lens.config import QKVNormConfig
    from qkvnorm_lens.model import QKVNormTransformer

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
    whole = whole.assign(layer=-2, label="all", vanishes=whole["vanishes"].astype(int))
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


def deepest(table: pd.DataFrame) -> str:
    """The group of the model with most layers."""
    rows = trained(table)
    return str(rows.nlargest(1, "layers")["group"].iloc[0]) if len(rows) else ""


# -- figure -----------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """Total variation by model; of random models by depth; and two panels by layer of one model."""
    fig, axes = panels(2, 2, width=4.6, height=3.5)
    _draw_models(axes[0], trained(table))
    _draw_constructed(axes[1], table)
    group = deepest(table)
    layers = table[(table["group"] == group) & (table["by"] == "layer")]
    _draw_depth(axes[2], layers, "stream", f"{group}: the last position's stream")
    axes[2].set_ylabel("change of the stream, |y − y′| / |y|")
    axes[2].set_yscale("log")
    axes[2].set_ylim(LEAST / 2, 3)
    _draw_depth(axes[3], layers, "nearer", f"{group}: are neighbours alike?")
    axes[3].axhline(0.5, color=GREY, linewidth=0.9, linestyle="--")
    axes[3].set_ylabel("share of pairs, the nearer position\nmore alike (1/2: says nothing)")
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


def _draw_depth(ax: Axes, layers: pd.DataFrame, column: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for variant in VARIANTS:
        mine = layers[layers["variant"] == variant]
        if not len(mine):
            continue
        depth = mine.groupby("layer")[[column, "floor_stream"]].mean()
        x = depth.index.to_numpy() + 1
        if column == "stream":
            ax.plot(x, depth["floor_stream"].clip(lower=LEAST), color=GREY, linewidth=0.7)
        ax.plot(
            x,
            depth[column].clip(lower=LEAST),
            color=COLOURS[variant],
            marker=MARKERS[variant],
            markersize=3,
            linewidth=1.1,
        )
    ax.set_xlabel("blocks passed (0: embedding)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(title, fontsize=10)
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
        "positions. `0`: no logit moves by ten times what rounding moves it. Of sums, the "
        "question up to `=` is read: a permuted question has another answer, so that a model that "
        "adds must have a gap.",
        "",
        *_constructed_words(table),
        *_neighbour_words(table),
        *_left_words(table),
    ]
    return "\n".join(lines)


def _gap(of: pd.DataFrame) -> str:
    if not len(of):
        return "-"
    if of["vanishes"].min() == 1:
        return f"0 (≤ {of['tv'].max():.0e})"
    found = group_mean(of, "tv")
    return f"{found.value:.3f}" + ("" if np.isnan(found.half) else f" ± {found.half:.3f}")


def _constructed_words(table: pd.DataFrame) -> list[str]:
    lines = [f"Random models without positions ({LENGTH} tokens, all but the last permuted):"]
    for n in LAYERS:
        causal = constructed(table, layers=n, variant="as is")
        free = constructed(table, layers=n, variant="mask removed")
        said = []
        for rows, name in ((causal, "with the causal mask"), (free, "without")):
            zero = int(rows["vanishes"].sum())
            low, high = rows["tv"].min(), rows["tv"].max()
            said.append(
                f"{name} the gap is zero in {zero} of {len(rows)} models "
                f"(total variation {low:.1e} to {high:.1e})"
            )
        lines.append(f"- {n} layer{'s' * (n > 1)}: {', '.join(said)}.")
    deep = constructed(table, variant="as is")
    deep = deep[deep["layers"] > 1]
    means = {s: group_mean(deep[deep["skip"] == s], "tv").value for s in SKIPS}
    lines.append(
        f"Skip connections are not what breaks the symmetry: with two or more causal layers the "
        f"mean total variation is {means['both']:.3f} with them and {means['none']:.3f} without."
        if deep["vanishes"].sum() == 0
        else "With two or more causal layers the gap is zero in "
        f"{int(deep['vanishes'].sum())} of {len(deep)} models."
    )
    return [*lines, ""]


def _nearer(table: pd.DataFrame, variant: str) -> pd.Series[float]:
    """Behind the last block of each model."""
    rows = table[(table["by"] == "layer") & (table["variant"] == variant)]
    return rows.sort_values("layer").groupby("model")["nearer"].last()


def _neighbour_words(table: pd.DataFrame) -> list[str]:
    random = table[table["group"].str.startswith(f"{CONSTRUCTED}-")]
    masked, free = (_nearer(random, v) for v in ("as is", "mask removed"))
    lines = [
        "Of two earlier positions the nearer one is more alike (cosine behind the last block, "
        "distances up to 16, the first token left out): in random models without positions in "
        f"{100 * masked.mean():.0f}% of pairs with the causal mask ({100 * masked.min():.0f}% to "
        f"{100 * masked.max():.0f}% by model), in {100 * free.mean():.0f}% without it."
    ]
    group = deepest(table)
    mine = table[table["group"] == group]
    found = [
        f"{v}: {100 * _nearer(mine, v).mean():.0f}%"
        for v in VARIANTS
        if (mine["variant"] == v).any()
    ]
    if found:
        lines.append(f"In {group}: {', '.join(found)}.")
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
            f"no gap in {int(free['vanishes'].sum())} of {len(free)} models",
            "yes" if free["vanishes"].all() else "no",
            "sums over sets; what is left is rounding, which is measured beside it",
        ),
        Claim(
            "the causal mask breaks the symmetry",
            "without positions the order can be seen through the causal mask",
            f"one layer: a gap in {len(one) - int(one['vanishes'].sum())} of {len(one)} random "
            f"models; two and four layers: in {len(deep) - int(deep['vanishes'].sum())} of "
            f"{len(deep)}",
            _breaks(one, deep),
            "the last row of the first layer sees a set; only rows that saw prefixes, in the "
            "second, tell of the order",
        ),
        _skip_claim(deep),
        _neighbour_claim(table),
    ]


def _breaks(one: pd.DataFrame, deep: pd.DataFrame) -> Literal["yes", "no", "in part"]:
    if deep["vanishes"].any():
        return "no" if deep["vanishes"].all() else "in part"
    return "in part" if one["vanishes"].any() else "yes"


def _skip_claim(deep: pd.DataFrame) -> Claim:
    bare = deep[deep["skip"] == "none"]
    seen = len(bare) - int(bare["vanishes"].sum())
    return Claim(
        "skip connections and the order of tokens",
        "version 2 found no definitive evidence that residual connections are responsible",
        f"random models of 2 and 4 causal layers without any skip connection: a gap in {seen} of "
        f"{len(bare)}",
        "yes" if seen else "no",
        "they are not needed for the order to be seen; whether they help to learn from it is asked "
        "in the experiment `positions`",
    )


def _neighbour_claim(table: pd.DataFrame) -> Claim:
    random = table[table["group"].str.startswith(f"{CONSTRUCTED}-")]
    masked, free = (_nearer(random, v) for v in ("as is", "mask removed"))
    more = int((masked > 0.5).sum())
    return Claim(
        "nearby positions are alike where order comes from the mask alone",
        "nearby embeddings are more similar than faraway ones, in random and trained causal models "
        "without positions (arXiv 2501.00073)",
        f"random models: the nearer is more alike in {100 * masked.mean():.0f}% of pairs (more "
        f"than half in {more} of {len(masked)} models), without the mask in "
        f"{100 * free.mean():.0f}%",
        "yes" if more == len(masked) else "in part" if more else "no",
        f"random tokens, {LENGTH} of them; rows that attend to almost the same prefix",
    )


EXPERIMENT: Final = Experiment(
    name="symmetry",
    title="What the order of the earlier tokens changes: positions, mask and depth",
    source="Zuo & Guerzhoy 2024, arXiv 2402.05969; arXiv 2501.00073",
    models="any",
    minutes={"smoke": 0.2, "quick": 0.5, "full": 3.5},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
