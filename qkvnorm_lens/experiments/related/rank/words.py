"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.related.rank.measure import NOT_BUILT, SHOWN, STATES, ends, stream

LEVEL: Final = 0.95  # of an interval
COLUMNS: Final = (*SHOWN, "rank", "relative_least")


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """The stream behind the embedding and behind the last block, by group and state."""
    head = ["models", "state", "seeds", *("mu/‖X‖", "stable rank", "effective rank", "mean cosine")]
    head += ["numerical rank", "least singular value, over the largest", "first token's share"]
    rows = []
    for group, mine in core.by_group(table):
        for state in STATES:
            some = stream(mine, state)
            if some.empty:
                rows.append([group, state, *[NOT_BUILT], *[""] * (len(head) - 3)])
                continue
            last, start = ends(mine, state), some[some["depth"] == 0]
            both = {name: [core.group_mean(at, name) for at in (start, last)] for name in COLUMNS}
            cells = [" → ".join(m.words(".2f") for m in both[name]) for name in SHOWN]
            cells.append(" → ".join(f"{m.value:.1f}" for m in both["rank"]))
            least = math.log10(max(both["relative_least"][1].value, 1e-300))
            share = stream(mine, state, first=True).groupby("depth")["first_share"].mean()
            cells += [f"10^{least:.1f}", f"{100 * share.max():.0f}%"]
            rows.append([group, state, str(len(last)), *cells])
    tokens = table.groupby("group", sort=False)["tokens"].mean()
    read = ", ".join(f"{group} {n:.0f}" for group, n in tokens.items())
    yield core.markdown(head, rows) + "\n"
    yield (
        "The residual stream behind the embedding → behind the last block, the first token left "
        "out; per prompt, then means over prompts and seeds (95% intervals over seeds). Stable "
        "rank: of X, ‖X‖_F²/‖X‖₂² (that of XXᵀ, with fourth powers, is in the experiment "
        "spectrum). Effective rank: exp of the entropy of the normalised singular values (Roy and "
        "Vetterli 2007); numerical rank: singular values above what rounding to the model's dtype "
        "can make, eps/2 ‖X‖_F. Beside: the largest share of ‖X‖² that the first token has at any "
        f"depth. Tokens of a prompt (mean): {read}. Cosines without their sign. Random start: the "
        "same configuration before training (our models: their own seed's weights).\n"
    )
    yield from _findings(table)


def _findings(table: pd.DataFrame) -> Iterator[str]:
    for group, mine in core.by_group(table):
        start, fresh = stream(mine, "trained"), stream(mine, "random start")
        trained = ends(mine, "trained")
        begin, end = (
            core.group_mean(at, "effective_rank").value
            for at in (start[start["depth"] == 0], trained)
        )
        said = (
            f"{group}: trained, the effective rank goes from {begin:.1f} to {end:.1f} of at most "
            f"{mine['tokens'].mean() - 1:.0f}"
        )
        if not fresh.empty:
            fresh = ends(mine, "random start")
            near, far = (core.group_mean(at, "relative_mu").value for at in (trained, fresh))
            ratio = near / far
            said += (
                f"; at random start to {core.group_mean(fresh, 'effective_rank').value:.1f}. "
                f"Training leaves the tokens {'nearer to' if ratio < 1 else 'farther from'} their "
                f"mean than the start does (mu/‖X‖ by a factor {ratio:.2f})"
            )
        with_first = ends(mine, "trained", first=True)
        said += (
            f". With the first token the stable rank at the end is "
            f"{core.group_mean(with_first, 'stable_rank').value:.2f} instead of "
            f"{core.group_mean(trained, 'stable_rank').value:.2f}."
        )
        yield said
    yield from _placements(table)


PAIRS: Final = (("pre", "qkv"), ("pre", "none"), ("qkv", "none"))
COMPARED: Final = {"effective_rank": "effective rank", "mean_cosine": "mean cosine"}


def _placements(table: pd.DataFrame) -> list[str]:
    """Differences between the study models' placements at the end, where seeds allow."""
    study = table[table["group"].str.startswith(core.STUDY)]
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
            gap = core.difference(*both, level=LEVEL)
            decided += gap.excludes_zero
            corrected += core.difference(*both, level=level).excludes_zero
            verdict = "" if gap.excludes_zero else ", not decided"
            said.append(f"{what} {gap.words('+.2f', '.2f')}{verdict}")
        lines.append(
            f"{core.PLACEMENT_NAMES[one]} minus {core.PLACEMENT_NAMES[other]} (study models, "
            f"{state}, {len(a)} and {len(b)} seeds), behind the last block: {'; '.join(said)}."
        )
    lines.append(
        f"These are {tried} comparisons at {100 * LEVEL:.0f}% each, not corrected for their "
        "number: where nothing differs one in twenty would still be decided, by chance. Decided: "
        f"{decided}; at a level corrected for all of them (Bonferroni, {100 * level:.2f}%): "
        f"{corrected}."
    )
    return lines


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Language models by depth: what the paper plots, without a number here to hold it against."""
    for group, mine in core.by_group(table):
        if not core.is_language(mine):
            continue
        some = stream(mine, "trained")
        last = ends(mine, "trained")
        top = some.nlargest(1, "mean_cosine").iloc[0]
        yield core.Claim(
            f"rank, least singular value and |cosine| by depth ({group})",
            "plotted for pretrained models",
            f"numerical rank {core.group_mean(last, 'rank').value:.0f} of "
            f"{mine['tokens'].mean() - 1:.0f} tokens at the end; least singular value "
            f"{core.group_mean(last, 'relative_least').value:.1e} of the largest; mean |cosine| at "
            f"most {top['mean_cosine']:.2f} ({top['label']})",
            "-",
            "other models than the paper's; the first token left out",
        )
