"""What the experiment found, in words and as claims."""

from __future__ import annotations

from functools import partial
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments.beyond.confound.measure import CELLS
from qkvnorm_lens.experiments.core import (
    CONFOUND_STEPS,
    Claim,
    Mean,
    above,
    agrees,
    decide,
    difference,
    graded,
    groups,
    markdown,
    mean,
    numbers,
)
from qkvnorm_lens.experiments.paper.accuracy import KINDS

SCALE_GAP: Final = "Sparse rows, QKV-Norm, 1/√d minus the paper's setting"

LEADS: Final = (
    ("Extrapolation, Pre-Norm minus QKV-Norm, the paper's setting", "pre-paper", "qkv-paper"),
    ("Extrapolation, Pre-Norm minus QKV-Norm, 1/√d", "pre", "qkv"),
    ("Extrapolation, Pre-Norm minus QKV-Norm with a learned temperature", "pre", "qkv-learned"),
)
"""Cells whose difference is Pre-Norm's lead in extrapolation."""
PUBLISHED: Final = 0.199  # the paper's lead of Pre-Norm in extrapolation
NONE: Final = 0.01  # below this share of sparse rows a cell has none to speak of


def text(table: pd.DataFrame) -> str:
    """The six cells, and the two differences that the question is about."""
    head = ["cell", "seeds", "sparse rows", *KINDS, "largest score", "collapse at 10%", "centred"]
    rows = []
    for group in groups(table):
        of = partial(numbers, table, group=group)
        cells = [
            CELLS.get(group, group).replace("\n", " "),
            str(len(of("sparse share"))),
            mean(of("sparse share")).percent(),
            *(mean(of("accuracy", variant=kind)).percent() for kind in KINDS),
            f"{mean(of('largest score')).value:.3g}",
            mean(of("collapse at 10%")).percent(2),
            mean(of("collapse at 10%", variant="centred gauge")).percent(2),
        ]
        rows.append(cells)
    lines = [
        markdown(head, rows),
        "",
        f"Percent, but the largest |score|; {CONFOUND_STEPS:,} steps each; ± half a 95% interval "
        "over seeds.",
    ]
    for what, gap in _gaps(table).items():
        lines.append(f"- {what}: {gap.percent()} points.")
    return "\n".join(lines)


def _gaps(table: pd.DataFrame) -> dict[str, Mean]:
    """The paper's setting against ours: sparsity of QKV-Norm, and Pre-Norm's lead."""
    out: dict[str, Mean] = {}
    for what, a, b in (
        (SCALE_GAP, "qkv", "qkv-paper"),
        ("Sparse rows, QKV-Norm, no decay on gains minus decay", "qkv-calibrated", "qkv-paper"),
        *LEADS,
    ):
        accuracy = {"quantity": "accuracy", "variant": "extrapolation"}
        quantity = accuracy if (what, a, b) in LEADS else {"quantity": "sparse share"}
        x, y = (numbers(table, group=f"confound-{cell}", **quantity) for cell in (a, b))
        if min(len(x), len(y)) > 1:
            out[what] = difference(x, y)
    return out


def claims(table: pd.DataFrame) -> list[Claim]:
    """Is QKV-Norm never sparse; is Pre-Norm's lead its own?"""
    out = []
    cells = [f"confound-{c}" for c in ("qkv-paper", "qkv-calibrated", "qkv", "qkv-learned")]
    seeds = {c: numbers(table, "sparse share", group=c) for c in cells}
    shares = {c: mean(found) for c, found in seeds.items() if found}
    if len(shares) > 1:
        ours = "; ".join(
            f"{CELLS[c].replace(chr(10), ' ')}: {m.percent()}%" for c, m in shares.items()
        )
        paper = shares.get("confound-qkv-paper")
        sparse = any(above(m) for m in shares.values())
        gap = _gaps(table).get(SCALE_GAP)
        scale = gap is not None and above(gap)
        none = paper is not None and paper.value < NONE
        out.append(
            Claim(
                "QKV-Norm has no sparse attention",
                "no peak of row maxima at 1 (Fig. 25-27)",
                f"sparse rows: {ours}",
                graded(none or not sparse, not sparse),
                "the share of sparse rows changes with the scores' scale, the norm being the same: "
                f"1/√d minus the paper's setting is {gap.percent()} points"
                if scale and gap is not None
                else "whether the scale decides is open: our seeds scatter too much",
            )
        )
    known = _gaps(table)
    gaps = {what: known[what] for what, *_ in LEADS if what in known}
    for what, gap in gaps.items():
        out.append(
            Claim(
                what,
                f"{100 * PUBLISHED:+.1f} points (one seed each)",
                f"{gap.percent()} points ({gap.n} seeds each)",
                decide(agrees(gap, PUBLISHED)),
                "smaller models and sums; 95% interval over seeds",
            )
        )  # fmt: skip
    return out
