"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.noise.rows import (
    ANY_ROWS,
    EVERY,
    LABELS,
    LOST,
    NEXT,
    OTHER_ROWS,
    ROWS,
    SHIELDED,
    SPARSE_ROWS,
    Condition,
    kept,
    kept_mean,
    lost_at,
    main_targets,
    telling,
)

PERCENT: Final = 0.01  # the sigma at which the paper gives numbers


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Sigma at which a tenth of the accuracy is lost, by condition; what a percent does; rows."""
    known = [c for c in LABELS if len(c.of(table))]
    rows = [
        _row(group, scored, mine, known)
        for group, each in core.by_group(table)
        for scored in dict.fromkeys(table["scored"])
        if len(mine := core.pick(each, scored=scored))
    ]
    yield (
        f"Sigma (%) at which {LOST:.0%} of the accuracy is lost (relative; 95% interval over seeds "
        "where a group has several; `>`: not lost at the largest sigma). Noise on the vectors that "
        "enter the dot product, in all layers, unless a column says otherwise.\n"
    )
    yield core.markdown(["models", "seeds", "scored", "clean (%)", *map(_head, known)], rows) + "\n"
    for group, mine in core.by_group(table):
        yield _sentences(group, main_targets(mine))
        yield ""


def _head(condition: Condition) -> str:
    return f"q, k of {LABELS[condition]}" if condition in ROWS else LABELS[condition]


def _row(group: str, scored: str, mine: pd.DataFrame, known: list[Condition]) -> list[str]:
    lost = [lost_at(rows) if len(rows := condition.of(mine)) else "" for condition in known]
    clean = mine[mine["sigma"] == 0].groupby("model")["accuracy"].first()
    return [group, str(len(clean)), scored, f"{100 * clean.mean():.1f}", *lost]


def _sentences(group: str, mine: pd.DataFrame) -> str:
    """What a percent of noise does to a group, and which rows cause the loss."""
    top = float(mine["sigma"].max())
    every = EVERY.of(mine)
    said = [
        f"{group}: noise on q, k and v of sigma = {PERCENT:.0%} leaves "
        f"{kept_mean(every, PERCENT).percent()}% of the accuracy, {top:.0%} leaves "
        f"{kept_mean(every, top).percent(0)}%."
    ]
    sigma = telling(mine)
    said.append(
        f"On q and k only, {sigma:.0%} leaves {kept_mean(ANY_ROWS.of(mine), sigma).percent()}%."
    )
    for condition in (SPARSE_ROWS, OTHER_ROWS):
        rows = condition.of(mine)
        share, first = rows["share"].mean(), rows["share_first"].mean()
        sinks = "" if math.isnan(first) else f" ({first:.0%} of them look to the first token)"
        said.append(
            f"On {LABELS[condition]} only, {share:.0%} of all{sinks}, {sigma:.0%} leaves "
            f"{kept_mean(rows, sigma).percent()}%, {top:.0%} {kept_mean(rows, top).percent(0)}%."
        )
    shielded = SHIELDED.of(mine)
    if len(shielded):
        said.append(
            f"Before the norm on q, k and v (noise {mine['shield'].iloc[0]} there), {top:.0%} "
            f"leaves {kept_mean(shielded, top).percent(2)}%: the norm takes it away; the vectors "
            "behind it are what the other numbers are of."
        )
    if (mine["scored"] == NEXT).all():
        least = every[every["sigma"] == PERCENT].mean(numeric_only=True)
        clean = every[every["sigma"] == 0].mean(numeric_only=True)
        said.append(
            f"Next-token loss {clean['loss']:.3f} nats, {least['loss'] - clean['loss']:+.4f} at "
            f"{PERCENT:.0%}, where KL(clean || noisy) is {least['kl']:.2g} nats."
        )
    return " ".join(said)


_SCALE_OF_OURS: Final = (
    "our models have 2 or 4 layers, the paper's 8 and 10, and their sums are smaller: probably "
    "fewer layers add up less noise and easier sums leave larger margins; not tested apart"
)


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Fig. 2: a percent of noise, sparse against other rows, and QKV-Norm's stability."""
    main = main_targets(table)
    for group, mine in core.by_group(main):
        if not group.startswith((core.STUDY, "addition-")):
            continue
        placement = core.placement_of(mine)
        if placement == "pre":
            yield _percent_claim(group, mine)
            yield _rows_claim(group, mine)
        if placement == "qkv":
            yield _shield_claim(group, mine)


def _percent_claim(group: str, mine: pd.DataFrame) -> core.Claim:
    fall = kept_mean(EVERY.of(mine), PERCENT).rest
    return core.Claim(
        f"fall of accuracy at sigma = 1%, q, k and v ({group})",
        ">= 10% (Baseline), >= 20% (Alternate), one seed each, Fig. 2",
        f"{fall.percent(2)}% of the accuracy; a tenth is lost at sigma = "
        f"{lost_at(EVERY.of(mine))}% ({fall.seeds})",
        core.decide(core.reaches(fall, LOST)),
        _SCALE_OF_OURS,
        core.power(fall, LOST),
    )


def _rows_claim(group: str, mine: pd.DataFrame) -> core.Claim:
    """Sparse rows lose less than non-sparse ones, where noise on all rows takes about a tenth."""
    sigma = telling(mine)
    sparse, other = SPARSE_ROWS.of(mine), OTHER_ROWS.of(mine)
    a, b = kept(sparse, sigma), kept(other, sigma)
    gap = a["kept"] - b["kept"]
    if len(gap) > 1:
        over = core.mean(gap.tolist())
    else:  # one model: over prompts, the two taken as independent
        half = math.hypot(a["half"].iloc[0], b["half"].iloc[0])
        over = core.Mean.around(float(gap.iloc[0]), half, 1)
    over = over.cut(-1.0, 1.0)
    share = {name: rows["share"].mean() for name, rows in (("sparse", sparse), ("other", other))}
    return core.Claim(
        f"sparse rows bear noise on q and k, non-sparse ones cause the drop ({group})",
        "sparse rows are stable to the percent level, the non-sparse ones cause the drop, Fig. 2",
        f"at sigma = {sigma:.0%}, where noise on all rows leaves "
        f"{kept_mean(ANY_ROWS.of(mine), sigma).percent()}% of the accuracy, noise on sparse rows "
        f"({share['sparse']:.0%} of all) leaves {kept_mean(sparse, sigma).percent()}%, on "
        f"non-sparse rows ({share['other']:.0%}) {kept_mean(other, sigma).percent()}%; difference "
        f"{over.percent()} points",
        core.decide(core.above(over)),
        "the two kinds are not equally many: the share noised stands beside each number",
        core.power(over),
    )


def _shield_claim(group: str, mine: pd.DataFrame) -> core.Claim:
    top = float(mine["sigma"].max())
    before, behind = (kept_mean(c.of(mine), top) for c in (SHIELDED, EVERY))
    held, falls = abs(1 - before.value) < 0.01, 1 - behind.value >= LOST
    return core.Claim(
        f"QKV-Norm is stable by construction ({group})",
        "the norm on q, k and v removes the noise, Fig. 2",
        f"at sigma = {top:.0%} noise before the norm leaves {before.percent(2)}% of the accuracy, "
        f"noise on what enters the dot product {behind.percent(0)}%",
        core.graded(held, not falls),
        "before the norm noise is removed up to its eps; that says nothing of the vectors behind "
        "it, which are as open to error (of rounding, say) as any other model's",
    )
