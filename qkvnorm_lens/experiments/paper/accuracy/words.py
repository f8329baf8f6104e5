"""What the experiment found, in words and as claims."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.accuracy.measure import KINDS, PUBLISHED, over_seeds


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """The table of means, and the gaps between the placements."""
    rows = []
    for group in core.groups(table):
        means = [over_seeds(table, group, kind) for kind in KINDS]
        means.append(over_seeds(table, group, "extrapolation", "per_token_without_end"))
        rows.append([group, str(means[0].n), *(m.percent() for m in means)])
    yield core.markdown(["models", "seeds", *KINDS, "extrapolation without ]"], rows) + "\n"
    yield (
        "Per-token accuracy in percent, teacher forced, with 95% intervals over seeds. `]` ends an "
        "answer and is counted unless a column says otherwise: more than a quarter of the scored "
        "tokens of these sums, about a fifth of those of the paper's."
    )
    for kind in KINDS:
        for column, name in (("per_token", "`]` counted"), ("per_token_without_end", "without")):
            rows_of_kind = core.pick(table, kind=kind)
            for size, gap in core.placement_gaps(rows_of_kind, column, shares=True):
                yield (
                    f"Pre-Norm minus QKV-Norm ({size}), {kind}, {name}: {gap.percent()} points "
                    f"({gap.n} seeds each)."
                )


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """The table's entries, and its gap in extrapolation."""
    for kind in KINDS:
        gap = core.study_difference(core.pick(table, kind=kind), "per_token", shares=True)
        if gap is None:
            continue
        published = PUBLISHED["pre"][kind] - PUBLISHED["qkv"][kind]
        ours = f"{gap.percent()} points ({gap.n} seeds each)"
        why = (
            "smaller sums (2 or 4 numbers of 1 or 2 digits, extrapolation to 5 and 6), a model of "
            "2 layers, trained for 2 million sums with Muon"
        )
        yield core.Claim(
            f"Pre-Norm minus QKV-Norm, {kind}",
            f"{100 * published:+.1f} points (one seed each)",
            ours,
            core.decide(core.agrees(gap, published)),
            why,
            core.power(gap, 0.0, published, either=True),
        )
