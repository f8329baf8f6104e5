"""What the experiment found, in words and as claims."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd

from qkvnorm_lens.experiments import core
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


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Runs with and without the fix, and the differences seed by seed."""
    head = ["", "fix", "seeds", FINAL, WHOLE, *KINDS, "gap", "stable rank of A", "A - U: s1"]
    body = []
    for placement in placements_in(table):
        for fix in (0, 1):
            of = partial(values, table, placement, fix)
            losses = [core.mean(of(q).tolist()) for q in (FINAL, WHOLE)]
            right = [core.share(of("accuracy", k).tolist()) for k in KINDS]
            spectrum = [core.mean(of(q).tolist()) for q in SPECTRUM]
            row = [core.PLACEMENT_NAMES[placement], "A - U" if fix else "none", str(losses[0].n)]
            row += [*(m.words(".3f") for m in losses), *(m.percent() for m in right)]
            body.append([*row, *(f"{m.value:.2f}" for m in spectrum)])
    yield core.markdown(head, body)
    yield (
        f"\n{int(table['step'].max()):,} steps each; losses in nats per scored token (final: over "
        f"the last {LAST} entries of the log; mean: over the whole run); accuracy in percent; gap "
        "s1 - s2, stable rank |A|_F²/s1² and s1 of A - U: of the trained patterns A, also where "
        "values are averaged with A - U. 95% intervals over seeds."
    )
    for placement in placements_in(table):
        yield (
            f"- {core.PLACEMENT_NAMES[placement]}, fix minus none, seed by seed: final loss "
            f"{gain(table, placement, FINAL).words('.3f')}, mean loss "
            f"{gain(table, placement, WHOLE).words('.3f')}, accuracy "
            + ", ".join(
                f"{kind} {gain(table, placement, 'accuracy', kind).percent()}" for kind in KINDS
            )
            + " points."
        )


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Does training gain from the fix?"""
    for placement in placements_in(table):
        found = {q: gain(table, placement, q) for q in (FINAL, WHOLE)}
        lower = [core.below(m) for m in found.values()]
        yield core.Claim(
            f"training gains from the fix ({core.PLACEMENT_NAMES[placement]})",
            "lower loss, faster (reviewers questioned it)",
            "; ".join(f"{q} {m.words('.3f')}" for q, m in found.items())
            + f" (fix minus none, {found[FINAL].seeds})",
            core.decide(*(each for each in lower if each is not None)),  # one decided is enough
            "a causal model of 2 layers with skip connections, on sums of some 12 tokens: the "
            "paper's gap is that of long, unmasked sequences",
            f"of the final loss, {core.power(found[FINAL])}",
        )
