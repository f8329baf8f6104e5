"""What the experiment found, in words and as claims."""

from __future__ import annotations

import pandas as pd

from qkvnorm_lens.experiments.core import Claim, Mean, agrees, decide, difference, groups
from qkvnorm_lens.experiments.paper.accuracy.measure import KINDS, PUBLISHED, over_seeds


def _study_difference(table: pd.DataFrame, kind: str, column: str) -> Mean | None:
    """Pre-Norm minus QKV-Norm over the study models, if several seeds of both are there."""
    study = table[(table["kind"] == kind) & table["group"].str.startswith("study-")]
    pre, qkv = (study[study["placement"] == p][column].tolist() for p in ("pre", "qkv"))
    return difference(pre, qkv) if min(len(pre), len(qkv)) > 1 else None


def text(table: pd.DataFrame) -> str:
    """The table of means, and the gaps between the placements."""
    lines = ["| models | seeds | " + " | ".join(KINDS) + " | extrapolation without ] |"]
    lines.append("|" + "---|" * 6)
    for group in groups(table):
        means = [over_seeds(table, group, kind) for kind in KINDS]
        bare = over_seeds(table, group, "extrapolation", "per_token_without_end")
        cells = " | ".join(m.percent() for m in [*means, bare])
        lines.append(f"| {group} | {means[0].n} | {cells} |")
    lines.append("")
    lines.append(
        "Per-token accuracy in percent, teacher forced, with 95% intervals over seeds. `]` ends an "
        "answer and is counted unless a column says otherwise: more than a quarter of the scored "
        "tokens of these sums, about a fifth of those of the paper's."
    )
    for kind in KINDS:
        for column, name in (("per_token", "`]` counted"), ("per_token_without_end", "without")):
            gap = _study_difference(table, kind, column)
            if gap is not None:
                lines.append(
                    f"Pre-Norm minus QKV-Norm, {kind}, {name}: {gap.percent()} points "
                    f"({gap.n} seeds each)."
                )
    return "\n".join(lines)


def claims(table: pd.DataFrame) -> list[Claim]:
    """The table's entries, and its gap in extrapolation."""
    out = []
    for kind in KINDS:
        gap = _study_difference(table, kind, "per_token")
        if gap is None:
            continue
        published = PUBLISHED["pre"][kind] - PUBLISHED["qkv"][kind]
        ours = f"{gap.percent()} points ({gap.n} seeds each)"
        why = (
            "smaller sums (2 or 4 numbers of 1 or 2 digits, extrapolation to 5 and 6), a model of "
            "2 layers, trained for 2 million sums with Muon"
        )
        out.append(
            Claim(
                f"Pre-Norm minus QKV-Norm, {kind}",
                f"{100 * published:+.1f} points (one seed each)",
                ours,
                decide(agrees(gap, published)),
                why,
            )
        )
    return out
