"""What the experiment found, in words and as claims."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.confound.measure import CELLS
from qkvnorm_lens.experiments.paper.accuracy import KINDS

SCALE_GAP: Final = "Sparse rows, QKV-Norm, 1/√d minus the paper's setting"
DECAY_GAP: Final = "Sparse rows, QKV-Norm, no decay on gains minus decay"
_SHARE: Final = {"quantity": "sparse share"}
_LEAD: Final = {"quantity": "accuracy", "variant": "extrapolation"}
GAPS: Final = (
    (SCALE_GAP, "qkv", "qkv-paper", _SHARE),
    (DECAY_GAP, "qkv-calibrated", "qkv-paper", _SHARE),
    (
        "Extrapolation, Pre-Norm minus QKV-Norm, the paper's setting",
        "pre-paper",
        "qkv-paper",
        _LEAD,
    ),
    ("Extrapolation, Pre-Norm minus QKV-Norm, 1/√d", "pre", "qkv", _LEAD),
    (
        "Extrapolation, Pre-Norm minus QKV-Norm with a learned temperature",
        "pre",
        "qkv-learned",
        _LEAD,
    ),
)
"""What is compared, its two cells, and their numbers: sparsity, or Pre-Norm's lead."""
PUBLISHED: Final = 0.199  # the paper's lead of Pre-Norm in extrapolation
NONE: Final = 0.01  # below this share of sparse rows a cell has none to speak of


def _named(group: str) -> str:
    return CELLS.get(group, group).replace("\n", " ")


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """The six cells, and the two differences that the question is about."""
    head = ["cell", "seeds", "sparse rows", *KINDS, "largest score", "collapse at 10%", "centred"]
    rows = []
    for group in core.groups(table):
        of = partial(core.numbers, table, group=group)
        cells = [
            _named(group),
            str(len(of("sparse share"))),
            core.share(of("sparse share")).percent(),
            *(core.share(of("accuracy", variant=kind)).percent() for kind in KINDS),
            f"{core.mean(of('largest score')).value:.3g}",
            core.share(of("collapse at 10%")).percent(2),
            core.share(of("collapse at 10%", variant="centred gauge")).percent(2),
        ]
        rows.append(cells)
    yield core.markdown(head, rows)
    yield (
        f"\nPercent, but the largest |score|; {core.CONFOUND_STEPS:,} steps each; 95% "
        "intervals over seeds."
    )
    for what, gap in _gaps(table).items():
        yield f"- {what}: {gap.percent()} points."


def _gaps(table: pd.DataFrame) -> dict[str, core.Mean]:
    """The paper's setting against ours: sparsity of QKV-Norm, and Pre-Norm's lead."""
    out: dict[str, core.Mean] = {}
    for what, a, b, quantity in GAPS:
        x, y = (core.numbers(table, group=f"confound-{cell}", **quantity) for cell in (a, b))
        if min(len(x), len(y)) > 1:
            out[what] = core.difference(x, y, shares=True)
    return out


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Is QKV-Norm never sparse; is Pre-Norm's lead its own?"""
    cells = [f"confound-{c}" for c in ("qkv-paper", "qkv-calibrated", "qkv", "qkv-learned")]
    seeds = {c: core.numbers(table, "sparse share", group=c) for c in cells}
    shares = {c: core.share(found) for c, found in seeds.items() if found}
    gaps = _gaps(table)
    if len(shares) > 1:
        paper = shares.get("confound-qkv-paper")
        sparse = any(core.above(m, NONE) for m in shares.values())
        gap = gaps.get(SCALE_GAP)
        none = paper is not None and paper.value < NONE
        yield core.Claim(
            "QKV-Norm has no sparse attention",
            "no peak of row maxima at 1 (Fig. 25-27)",
            "sparse rows: " + "; ".join(f"{_named(c)}: {m.percent()}%" for c, m in shares.items()),
            core.graded(none or not sparse, not sparse),
            "the share of sparse rows changes with the scores' scale, the norm being the same: "
            f"1/√d minus the paper's setting is {gap.percent()} points"
            if gap is not None and core.above(gap)
            else "whether the scale decides is open: our seeds scatter too much",
        )
    for what, *_, quantity in GAPS:
        if quantity is _LEAD and what in gaps:
            yield core.Claim(
                what,
                f"{100 * PUBLISHED:+.1f} points (one seed each)",
                f"{gaps[what].percent()} points ({gaps[what].n} seeds each)",
                core.decide(core.agrees(gaps[what], PUBLISHED)),
                "smaller models and sums; 95% interval over seeds",
                core.power(gaps[what], 0.0, PUBLISHED, either=True),
            )
