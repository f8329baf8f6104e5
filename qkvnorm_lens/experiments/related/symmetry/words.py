"""What the experiment found, in words and as claims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.related.symmetry.measure import (
    LAYERS,
    LENGTH,
    SKIPS,
    VARIANTS,
    constructed,
    nearer_stream,
    random_kinds,
    trained,
)


def zero(rows: pd.DataFrame) -> int:
    """Models without a gap; what rounding leaves undecided (NaN) is none of them."""
    return int((rows["vanishes"] == 1).sum())


def seen(rows: pd.DataFrame) -> int:
    """Models with a gap that is clearly above rounding."""
    return int((rows["vanishes"] == 0).sum())


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Gaps by group and variant, the random models, neighbours, and what could not be removed."""
    head = ["models", "seeds", *(f"TV, {v}" for v in VARIANTS)]
    head += ["arg max moves, as is (%)", "positions removed (%)"]
    rows = []
    for group, mine in core.by_group(trained(table)):
        cells = [core.pick(mine, by="variant", variant=v) for v in VARIANTS]
        moves = [core.group_share(c, "moved").percent(0) if len(c) else "-" for c in cells[:2]]
        rows.append([group, str(mine["model"].nunique()), *map(_gap, cells), *moves])
    yield core.markdown(head, rows) + "\n"
    yield (
        "Total variation between the next token's distributions (0 to 1; mean over prompts and "
        "permutations, with 95% intervals over seeds) when the tokens between the first and the "
        "last are permuted; how often the arg max moves, as it is and without "
        "positions. `0`: of no prompt a logit moves by ten times what rounding moves it, and "
        "rounding is small; `?`: undecided, rounding too large. Of sums, the question up to `=` is "
        "read: a permuted question has another answer, so that a model that adds must have a gap.\n"
    )
    yield from _constructed_words(table)
    yield from _neighbour_words(table)
    yield from _left_words(table)


def _gap(of: pd.DataFrame) -> str:
    if not len(of):
        return "-"
    if zero(of) == len(of):
        return f"0 (≤ {of['tv'].max():.0e})"
    found = core.group_share(of, "tv")
    doubt = "" if zero(of) + seen(of) == len(of) else " ?"
    return found.words(".3f") + doubt


def _constructed_words(table: pd.DataFrame) -> Iterator[str]:
    yield f"Random models without positions ({LENGTH} tokens, all but the last permuted):"
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
        yield f"- {n} layer{'s' * (n > 1)}: {', '.join(said)}."
    deep = _deep(table)
    means = {s: core.group_mean(deep[deep["skip"] == s], "tv").value for s in SKIPS}
    if seen(deep) == len(deep):
        yield (
            "Skip connections are not what breaks the symmetry: with two or more causal layers the "
            f"mean total variation is {means['both']:.3f} with them and {means['none']:.3f} "
            "without.\n"
        )
    else:
        zeros = f"{zero(deep)} of {len(deep)}"
        yield f"With two or more causal layers the gap is zero in {zeros} models.\n"


def _deep(table: pd.DataFrame) -> pd.DataFrame:
    """Random causal models of several layers."""
    rows = constructed(table, variant="as is")
    return rows[rows["layers"] > 1]


def _percents(shares: pd.Series[float]) -> str:
    """Of each model, by seed."""
    said = "/".join(f"{100 * x:.0f}" for x in shares)
    return f"{said}%" if said else "-"


def _neighbour_words(table: pd.DataFrame) -> Iterator[str]:
    yield (
        "Neighbours: of two earlier positions, how often is the nearer one more alike (cosine "
        "behind the last block, distances up to 16, the first token left out; 50%: distance says "
        "nothing)? Random models without positions:"
    )
    for words, mine in random_kinds(table):
        masked, free = (nearer_stream(mine, v) for v in ("as is", "mask removed"))
        yield (
            f"- {words}: {100 * masked.mean():.0f}% of pairs with the causal mask "
            f"({100 * masked.min():.0f}% to {100 * masked.max():.0f}% by model), "
            f"{100 * free.mean():.0f}% without it."
        )
    rows = [
        [group, *(_percents(nearer_stream(mine, v)) for v in VARIANTS)]
        for group, mine in core.by_group(trained(table))
    ]
    if rows:
        yield "\nModels, a number for each seed:\n"
        yield core.markdown(["models", *VARIANTS], rows)
        shares = nearer_stream(trained(table), "positions removed")
        if len(shares):
            yield (
                "\nWhere the mask alone is left (positions removed) it is more than half in "
                f"{int((shares > 0.5).sum())} of {len(shares)} models "
                f"({100 * shares.min():.0f}% to {100 * shares.max():.0f}%)."
            )
    yield ""


def _left_words(table: pd.DataFrame) -> Iterator[str]:
    for group, mine in core.by_group(trained(table)):
        for what in ("positions", "mask"):
            if (mine[what] == "unremovable").any():
                why = mine[f"why_{what}"].iloc[0]
                yield f"{group}: the {what} could not be removed: {why}."
            elif (mine[what] == "absent").all():
                yield f"{group}: has no {what}."


def claims(table: pd.DataFrame) -> list[core.Claim]:
    """Invariance without mask and positions, what the mask breaks, skips, and neighbours."""
    given = core.pick(trained(table), by="variant", variant="both removed")
    free = pd.concat([constructed(table, variant="mask removed"), given])
    one, deep = constructed(table, layers=1, variant="as is"), _deep(table)
    return [
        core.Claim(
            "without positions and mask, the next token does not know the order",
            "the prediction is invariant to permutations of the earlier tokens",
            f"no gap in {zero(free)} of {len(free)} models"
            + (f", a gap in {seen(free)}" if zero(free) < len(free) else ""),
            core.decide(core.every(_no_gap(free))),
            "sums over sets; what is left is rounding, which is measured beside it",
        ),
        core.Claim(
            "the causal mask breaks the symmetry",
            "without positions the order can be seen through the causal mask",
            f"one layer: a gap in {seen(one)} of {len(one)} random models; two and four layers: in "
            f"{seen(deep)} of {len(deep)}",
            core.graded(seen(deep) > 0, seen(deep) == len(deep) and seen(one) == len(one)),
            "the last row of the first layer sees a set; only rows that saw prefixes, in the "
            "second, tell of the order",
        ),
        _skip_claim(deep),
        *_neighbour_claims(table),
    ]


def _no_gap(rows: pd.DataFrame) -> list[core.Finding]:
    return [True] * zero(rows) + [False] * seen(rows) + [None] * int(rows["vanishes"].isna().sum())


def _skip_claim(deep: pd.DataFrame) -> core.Claim:
    bare = deep[deep["skip"] == "none"]
    return core.Claim(
        "skip connections and the order of tokens",
        "version 2 found no definitive evidence that residual connections are responsible",
        f"random models of 2 and 4 causal layers without any skip connection: a gap in "
        f"{seen(bare)} of {len(bare)}",
        core.decide(seen(bare) > 0),
        "they are not needed for the order to be seen; whether they help to learn from it is asked "
        "in the experiment `positions`",
    )


_PUBLISHED_NEAR: Final = (
    "nearby embeddings are more similar than faraway ones, in random and trained causal models "
    "without positions (arXiv 2501.00073)"
)


def _neighbour_claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Random models, with and without skips, and trained ones apart."""
    said, both = [], []
    for words, mine in random_kinds(table):
        masked, free = (nearer_stream(mine, v) for v in ("as is", "mask removed"))
        both.append(masked)
        said.append(
            f"{words}: {100 * masked.mean():.0f}% of pairs (more than half in "
            f"{int((masked > 0.5).sum())} of {len(masked)} models), {100 * free.mean():.0f}% "
            "without the mask"
        )
    yield core.Claim(
        "nearby positions are alike in random models, where order comes from the mask alone",
        _PUBLISHED_NEAR,
        f"the nearer is more alike, {'; '.join(said)}",
        core.decide(*(share > 0.5 for share in pd.concat(both))),
        f"random tokens, {LENGTH} of them; rows that attend to almost the same prefix",
    )
    bare = trained(table)
    shares = nearer_stream(bare, "positions removed")
    if len(shares):
        by = [
            f"{group} {_percents(nearer_stream(mine, 'positions removed'))}"
            for group, mine in core.by_group(bare)
            if len(nearer_stream(mine, "positions removed"))
        ]
        yield core.Claim(
            "nearby positions are alike in trained models whose positions are removed",
            _PUBLISHED_NEAR,
            f"the nearer is more alike in {', '.join(by)} of pairs (more than half in "
            f"{int((shares > 0.5).sum())} of {len(shares)} models)",
            core.decide(*(share > 0.5 for share in shares)),
            "these were trained with positions, which are taken out afterwards; models that "
            "never had any are in the experiment `positions`",
        )
