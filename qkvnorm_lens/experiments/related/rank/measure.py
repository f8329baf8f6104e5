"""Rank of the tokens by depth, trained and at random start (Wu et al. 2024)."""

from __future__ import annotations

import math
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
    Mean,
    Part,
    Size,
    Subject,
    by_group,
    difference,
    group_mean,
    is_language,
    markdown,
    panels,
    placement_of,
    reading,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

AMOUNT: Final[dict[Size, Amount]] = {
    "smoke": Amount(sums=16, windows=1, length=64),
    "quick": Amount(sums=64, windows=4),
    "full": Amount(sums=256, windows=16),
}
STATES: Final = ("trained", "random start")
STREAM: Final = {"in": 0.0, "mid": 0.5, "mid2": 0.75, "out": 1.0}  # place within a block
SHOWN: Final = {
    "relative_mu": "distance from mean\nμ(X) / |X|",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "mean_cosine": "mean |cosine| of tokens",
}
NOT_BUILT: Final = "not built"
LEVEL: Final = 0.95  # of an interval
SEED: Final = 1  # of a language model's random start


# -- measuring ------------------------------------------------------------------------------


def measure(subject: Subject, amount: Amount) -> pd.DataFrame:
    """`hooks.rank_profile` by site, with and without the first token, trained and at the start."""
    ids = reading(subject, amount).ids
    frames = [profile(subject.load(), ids).assign(state="trained")]
    start = at_start(subject)
    if start is None:
        frames.append(pd.DataFrame([{"state": "random start", "site": NOT_BUILT}]))
    else:
        frames.append(profile(start, ids).assign(state="random start"))
    rows = pd.concat(frames, ignore_index=True).assign(**subject.columns)
    rows["tokens"] = float(np.mean([len(row) for row in ids]))
    rows["prompts"] = len(ids)
    names = [*subject.columns, "state", "first", "stack", "layer", "site", "label"]
    return rows[[*names, *(c for c in rows.columns if c not in names)]]


def profile(model: TransformerBridge, ids: list[list[int]]) -> pd.DataFrame:
    """One row per site, for all tokens (``first`` 1) and without the first (0)."""
    import hooks

    report = hooks.rank_profile(model, ids, batch_size=16, progress=False)
    return pd.concat(
        [report.to_frame(without_first=w).assign(first=int(not w)) for w in (False, True)],
        ignore_index=True,
    )


def at_start(subject: Subject) -> TransformerBridge | None:
    """The same configuration before training; None where it isn't at hand.

    Ours: the weights of its own seed, from which it was trained. Others: weights as transformers
    draws them, of a fixed seed.
    """
    if subject.path is None:
        return None
    if subject.placement:
        from qkvnorm_lens.models import QKVNormTransformer, to_bridge, to_plain

        cfg = to_plain(subject.load()).cfg
        if cfg.calibrated or cfg.score_scale == "calibrated":
            return None  # its scales were fixed on the first batch of its training
        return to_bridge(QKVNormTransformer(cfg).eval())
    import torch
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(subject.path)
    if not config.architectures:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        plain = plain.float().eval()
        bridge: TransformerBridge = build_bridge_from_module(
            plain, config.architectures[0], hf_config=plain.config, tokenizer=None
        )
    return bridge.eval()


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    amount = AMOUNT[size]
    return [
        Part(s.name, partial(measure, s, amount), s, {**amount.settings(s), "start": SEED})
        for s in subjects
    ]


# -- reading the table ----------------------------------------------------------------------


def stream(table: pd.DataFrame, state: str, *, first: bool = False) -> pd.DataFrame:
    """The residual stream's rows in order; ``depth`` is in blocks: 0.5 is within the first one.

    Of an encoder-decoder the encoder.
    """
    some = table[(table["state"] == state) & (table["first"] == int(first))]
    some = some[some["site"].isin(STREAM) & ~some["stack"].astype(str).str.startswith("decoder")]
    some = some.assign(depth=some["layer"] + some["site"].map(STREAM).astype(float))
    # A block's input is the output of the one before.
    return some[(some["site"] != "in") | (some["layer"] == 0)]


def ends(table: pd.DataFrame, state: str, *, first: bool = False) -> pd.DataFrame:
    """One row per model: the stream behind the last block."""
    some = stream(table, state, first=first)
    return some.loc[some.groupby("model", sort=False)["depth"].idxmax()]


def figure(table: pd.DataFrame) -> Figure:
    """A row per kind of model, a column per measure; trained and at random start, by depth."""
    kinds = _kinds(table)
    fig, axes = panels(len(kinds), len(SHOWN), width=2.5, height=2.3)
    for row, (title, mine) in enumerate(kinds):
        for column, (name, said) in enumerate(SHOWN.items()):
            ax = axes[row * len(SHOWN) + column]
            _draw(ax, mine, name)
            ax.set_ylabel(said, fontsize=9)
            if not column:
                ax.set_title(title, fontsize=10, loc="left")
            if row == len(kinds) - 1:
                ax.set_xlabel("depth (blocks)")
    shown: dict[str, Any] = {}
    for row in range(len(kinds)):
        handles, names = axes[row * len(SHOWN)].get_legend_handles_labels()
        shown |= dict(zip(names, handles, strict=True))
    fig.legend(
        list(shown.values()),
        list(shown),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    return fig


def _kinds(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    study = table["group"].str.startswith(STUDY)
    language = table["placement"].fillna("").eq("")
    named = (
        ("study models", study),
        ("other addition models", ~study & ~language),
        ("language models", language),
    )
    return [(title, table[which]) for title, which in named if which.any()]


def _draw(ax: Axes, table: pd.DataFrame, measure: str) -> None:
    """Means over seeds: lines, dashed at random start; each seed's end as a dot."""
    from matplotlib.ticker import MaxNLocator

    from qkvnorm_lens.plots.charts import GREY, RUNS, grid

    others = iter((RUNS[6], *RUNS[3:6], GREY))
    for group, mine in by_group(table):
        placement = placement_of(mine)
        colour = COLOURS[placement] if placement else next(others, GREY)
        for state, line in zip(STATES, ("-", "--"), strict=True):
            some = stream(mine, state)
            if some.empty:
                continue
            by_depth = some.groupby("depth")[measure].mean()
            name = PLACEMENT_NAMES[placement] or group
            said = f"{name}, {state}"
            ax.plot(by_depth.index, by_depth, line, color=colour, linewidth=1.4, label=said)
            if len(set(mine["model"])) > 1:
                last = ends(mine, state)
                ax.plot(last["depth"], last[measure], ".", color=colour, markersize=4)
    ax.set_ylim(bottom=0)
    if measure in ("relative_mu", "mean_cosine"):
        ax.set_ylim(0, 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid(ax)


# -- words ------------------------------------------------------------------------------------


def _number(found: Mean, digits: int = 2) -> str:
    half = "" if math.isnan(found.half) else f" ± {found.half:.{digits}f}"
    return f"{found.value:.{digits}f}{half}"


def text(table: pd.DataFrame) -> str:
    """The stream behind the embedding and behind the last block, by group and state."""
    head = ["models", "state", "seeds", *("mu/‖X‖", "stable rank", "effective rank", "mean cosine")]
    head += ["numerical rank", "least singular value, over the largest", "first token's share"]
    rows = []
    for group, mine in by_group(table):
        for state in STATES:
            some = stream(mine, state)
            if some.empty:
                rows.append([group, state, *[NOT_BUILT], *[""] * (len(head) - 3)])
                continue
            last, start = ends(mine, state), some[some["depth"] == 0]
            cells = [
                f"{_number(group_mean(start, name))} → {_number(group_mean(last, name))}"
                for name in SHOWN
            ]
            least = math.log10(max(group_mean(last, "relative_least").value, 1e-300))
            share = stream(mine, state, first=True).groupby("depth")["first_share"].mean()
            rows.append(
                [
                    group,
                    state,
                    str(len(last)),
                    *cells,
                    f"{group_mean(start, 'rank').value:.1f} → {group_mean(last, 'rank').value:.1f}",
                    f"10^{least:.1f}",
                    f"{100 * share.max():.0f}%",
                ]
            )
    tokens = table.groupby("group", sort=False)["tokens"].mean()
    read = ", ".join(f"{group} {n:.0f}" for group, n in tokens.items())
    lines = [
        markdown(head, rows),
        "",
        "The residual stream behind the embedding → behind the last block, the first token left "
        "out; per prompt, then means over prompts and seeds (95% intervals over seeds). Stable "
        "rank: of X, ‖X‖_F²/‖X‖₂² (that of XXᵀ, with fourth powers, is in the experiment "
        "spectrum). Effective rank: exp of the entropy of the normalised singular values (Roy and "
        "Vetterli 2007); numerical rank: singular values above what rounding to the model's dtype "
        "can make, eps/2 ‖X‖_F. Beside: the largest "
        f"share of ‖X‖² that the first token has at any depth. Tokens of a prompt (mean): {read}. "
        "Cosines without their sign. Random start: the same configuration before training (our "
        "models: their own seed's weights).",
        "",
        *_findings(table),
    ]
    return "\n".join(lines)


def _findings(table: pd.DataFrame) -> list[str]:
    lines = []
    for group, mine in by_group(table):
        trained = ends(mine, "trained")
        start = stream(mine, "trained")
        begin = group_mean(start[start["depth"] == 0], "effective_rank").value
        said = (
            f"{group}: trained, the effective rank goes from {begin:.1f} to "
            f"{group_mean(trained, 'effective_rank').value:.1f} of at most "
            f"{mine['tokens'].mean() - 1:.0f}"
        )
        fresh = ends(mine, "random start") if not stream(mine, "random start").empty else None
        if fresh is not None:
            ratio = (
                group_mean(trained, "relative_mu").value / group_mean(fresh, "relative_mu").value
            )
            said += (
                f"; at random start to {group_mean(fresh, 'effective_rank').value:.1f}. Training "
                f"leaves the tokens {'nearer to' if ratio < 1 else 'farther from'} their mean than "
                f"the start does (mu/‖X‖ by a factor {ratio:.2f})"
            )
        with_first = ends(mine, "trained", first=True)
        said += (
            f". With the first token the stable rank at the end is "
            f"{group_mean(with_first, 'stable_rank').value:.2f} instead of "
            f"{group_mean(trained, 'stable_rank').value:.2f}."
        )
        lines.append(said)
    lines += _placements(table)
    return lines


PAIRS: Final = (("pre", "qkv"), ("pre", "none"), ("qkv", "none"))
COMPARED: Final = {"effective_rank": "effective rank", "mean_cosine": "mean cosine"}


def _placements(table: pd.DataFrame) -> list[str]:
    """Differences between the study models' placements at the end, where seeds allow."""
    study = table[table["group"].str.startswith(STUDY)]
    found = []
    for state in STATES:
        if study.empty or stream(study, state).empty:
            continue
        last = ends(study, state)
        for pair in PAIRS:
            a, b = (last[last["placement"] == p] for p in pair)
            if min(len(a), len(b)) > 1:
                found.append((state, pair, a, b))
    if not found:
        return []
    tried, decided, corrected, lines = len(found) * len(COMPARED), 0, 0, []
    level = 1 - (1 - LEVEL) / tried
    for state, (one, other), a, b in found:
        said = []
        for name, what in COMPARED.items():
            both = a[name].tolist(), b[name].tolist()
            gap = difference(*both, level=LEVEL)
            decided += gap.excludes_zero
            corrected += difference(*both, level=level).excludes_zero
            verdict = "" if gap.excludes_zero else ", not decided"
            said.append(f"{what} {gap.value:+.2f} ± {gap.half:.2f}{verdict}")
        lines.append(
            f"{PLACEMENT_NAMES[one]} minus {PLACEMENT_NAMES[other]} "
            f"(study models, {state}, {len(a)} and {len(b)} "
            f"seeds), behind the last block: {'; '.join(said)}."
        )
    lines.append(
        f"These are {tried} comparisons at {100 * LEVEL:.0f}% each, not corrected for their "
        "number: where nothing differs one in twenty would still be decided, by chance. Decided: "
        f"{decided}; at a level corrected for all of them (Bonferroni, {100 * level:.2f}%): "
        f"{corrected}."
    )
    return lines


def claims(table: pd.DataFrame) -> list[Claim]:
    """Language models by depth: what the paper plots, without a number here to hold it against."""
    out = []
    for group, mine in by_group(table):
        if not is_language(mine):
            continue
        some = stream(mine, "trained")
        last = ends(mine, "trained")
        top = some.nlargest(1, "mean_cosine").iloc[0]
        out.append(
            Claim(
                f"rank, least singular value and |cosine| by depth ({group})",
                "plotted for pretrained models",
                f"numerical rank {group_mean(last, 'rank').value:.0f} of "
                f"{mine['tokens'].mean() - 1:.0f} tokens at the end; least singular value "
                f"{group_mean(last, 'relative_least').value:.1e} of the largest; mean |cosine| at "
                f"most {top['mean_cosine']:.2f} ({top['label']})",
                "-",
                "other models than the paper's; the first token left out",
            )
        )
    return out


EXPERIMENT: Final = Experiment(
    name="rank",
    title="Rank of the tokens by depth, trained and at random start",
    source="Wu et al. 2024",
    models="any",
    minutes={"smoke": 0.1, "quick": 0.5, "full": 2.5},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
