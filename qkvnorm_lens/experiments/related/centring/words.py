"""What the experiment found, in words and as claims."""

from __future__ import annotations

import pandas as pd

from qkvnorm_lens.experiments.core import PLACEMENT_NAMES, Claim, below, decide, markdown, mean
from qkvnorm_lens.experiments.paper.accuracy import KINDS
from qkvnorm_lens.experiments.related.centring.measure import (
    FINAL,
    LAST,
    SPECTRUM,
    WHOLE,
    gain,
    placements_in,
    values,
)


def text(table: pd.DataFrame) -> str:
    """Runs with and without the fix, and the differences seed by seed."""
    head = ["", "fix", "seeds", FINAL, WHOLE, *KINDS, "gap", "stable rank of A", "A - U: s1"]
    body = []
    for placement in placements_in(table):
        for fix in (0, 1):
            of = {
                q: mean(values(table, placement, fix, q).tolist())
                for q in (FINAL, WHOLE, *SPECTRUM)
            }
            right = [mean(values(table, placement, fix, "accuracy", k).tolist()) for k in KINDS]
            body.append(
                [
                    PLACEMENT_NAMES[placement],
                    "A - U" if fix else "none",
                    str(of[FINAL].n),
                    *(of[q].words(".3f") for q in (FINAL, WHOLE)),
                    *(m.percent() for m in right),
                    *(f"{of[q].value:.2f}" for q in SPECTRUM),
                ]
            )
    steps = int(table["step"].max())
    lines = [
        markdown(head, body),
        "",
        f"{steps:,} steps each; losses in nats per scored token (final: over the last {LAST} "
        "entries of the log; mean: over the whole run); accuracy in percent; gap s1 - s2, stable "
        "rank |A|_F²/s1² and s1 of A - U: of the trained patterns A, also where values are "
        "averaged with A - U. 95% intervals over seeds.",
    ]
    for placement in placements_in(table):
        lines += [
            f"- {PLACEMENT_NAMES[placement]}, fix minus none, seed by seed: final loss "
            f"{gain(table, placement, FINAL).words('.3f')}, mean loss "
            f"{gain(table, placement, WHOLE).words('.3f')}, accuracy "
            + ", ".join(
                f"{kind} {gain(table, placement, 'accuracy', kind).percent()}" for kind in KINDS
            )
            + " points."
        ]
    return "\n".join(lines)


def claims(table: pd.DataFrame) -> list[Claim]:
    """Does training gain from the fix?"""
    out = []
    for placement in placements_in(table):
        found = {q: gain(table, placement, q) for q in (FINAL, WHOLE)}
        lower = [below(m) for m in found.values()]
        out.append(
            Claim(
                f"training gains from the fix ({PLACEMENT_NAMES[placement]})",
                "lower loss, faster (reviewers questioned it)",
                "; ".join(f"{q} {m.words('.3f')}" for q, m in found.items())
                + f" (fix minus none, {found[FINAL].seeds})",
                decide(*(each for each in lower if each is not None)),  # one decided is enough
                "a causal model of 2 layers with skip connections, on sums of some 12 tokens: the "
                "paper's gap is that of long, unmasked sequences",
            )
        )
    return out
