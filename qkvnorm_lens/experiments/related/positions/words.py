"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.related.positions.measure import (
    AS_IS,
    GAPS,
    LEAST,
    LOSSES,
    SHARES,
    SWAPPED,
    cell_name,
)


def _steps(values: list[float]) -> str:
    """A mean with its interval, or how many got there."""
    reached = [v for v in values if math.isfinite(v)]
    if not values:
        return "-"
    if len(reached) < len(values):
        return f"never in {len(values) - len(reached)} of {len(values)}"
    return core.mean(reached).words(".0f")


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """What was learned, how fast, what the trained models see of order, and the differences."""
    head = ["model", "seeds", "per token (%)", "without `]`", "exact (%)"]
    head += [f"steps to {x:g} nats" for x in LOSSES]
    head += [f"TV, {name}" for name, _ in GAPS.values()]
    rows = []
    for group in core.groups(table):
        of = partial(core.numbers, table, group=group)
        gaps = [of("tv", variant=variant) for variant in GAPS]
        rows.append(
            [
                cell_name(group),
                str(len(of("exact"))),
                core.share(of("per token")).percent(),
                core.share(of("per token without ]")).percent(),
                core.share(of("exact")).percent(),
                *(_steps(of("steps to loss", at=x)) for x in LOSSES),
                *(f"{core.mean(g).value:.2g}" if g else "-" for g in gaps),
            ]
        )
    last = int(table[table["quantity"] == "loss"]["at"].max())
    between = core.numbers(table, "steps between measurements", group=core.groups(table)[0])[0]
    yield core.markdown(head, rows) + "\n"
    yield (
        f"Sums of two positive integers of three digits, Pre-Norm, {last:,} steps of 128 sums; "
        "95% intervals over seeds. Steps: until the loss, a mean over the steps between "
        "two rows of the log, is so low. TV: total variation of the first answer digit's "
        "distribution when the question's tokens between `[` and `=` are permuted, or the two "
        "integers swapped, which leaves the answer as it is.\n"
    )
    yield f"Tokens right, as measured every {between:.0f} steps: {_shares(table)}\n"
    yield from _differences(table)
    yield from _order_words(table)


def _shares(table: pd.DataFrame) -> str:
    out = []
    for group in core.groups(table):
        said = []
        for share in SHARES:
            first = core.numbers(table, "steps to share", group=group, at=share)
            got = [v for v in first if math.isfinite(v)]
            if len(got) < len(first):
                said.append(f"{share:.0%} in {len(got)} of {len(first)} runs")
            else:
                said.append(f"{share:.0%} by step {max(got):.0f}")
        out.append(f"{cell_name(group)}: {', '.join(said)}")
    return "; ".join(out) + "."


PAIRS: Final = (
    ("order-rotary", "order-nope", "rotary positions minus none"),
    ("order-nope", "order-nope-no-attn", "no positions: with the skip of attention minus without"),
    ("order-nope", "order-nope-no-skip", "no positions: with skip connections minus without any"),
    ("order-rotary", "order-rotary-no-skip", "rotary: with skip connections minus without any"),
)


def gap_between(
    table: pd.DataFrame, a: str, b: str, quantity: str, **wanted: Any
) -> core.Mean | None:
    """Mean of a minus mean of b with Welch's interval, where both have several seeds."""
    x, y = (core.numbers(table, quantity, group=group, **wanted) for group in (a, b))
    if min(len(x), len(y)) < 2 or not all(map(math.isfinite, [*x, *y])):
        return None
    return core.difference(x, y, shares=quantity in ("per token", "exact"))


def _differences(table: pd.DataFrame) -> list[str]:
    out = []
    for a, b, what in PAIRS:
        per_token, exact = (gap_between(table, a, b, q) for q in ("per token", "exact"))
        if per_token is None or exact is None:
            continue
        steps = gap_between(table, a, b, "steps to loss", at=LOSSES[1])
        line = f"- {what}: {per_token.percent()} points per token, {exact.percent()} exact"
        if steps is not None:
            line += f", {steps.words('+.0f', '.0f')} steps to {LOSSES[1]:g} nats"
        out.append(f"{line} ({per_token.n} seeds each).")
    return [*out, ""] if out else out


def _order_words(table: pd.DataFrame) -> Iterator[str]:
    for group in core.groups(table):
        of = partial(core.numbers, table, group=group)
        none = of("no gap", variant=AS_IS)
        doubt = len(of("exact")) - len(none)
        swap, permuted = (of("tv", variant=variant) for variant in (SWAPPED, AS_IS))
        ratio = core.mean(swap).value / max(core.mean(permuted).value, LEAST)
        yield (
            f"{cell_name(group)}: {len(none) - int(sum(none))} of {len(none) + doubt} trained "
            f"models see the order{f' ({doubt} undecided: rounding too large)' if doubt else ''}; "
            f"swapping the integers changes the prediction {ratio:.2f} times as much as permuting "
            "all tokens."
        )
    alike = [f"{cell_name(group)}: {_nearer_words(table, group)}" for group in core.groups(table)]
    yield (
        "Pairs of earlier positions of which the nearer is more alike (cosine, first token left "
        f"out), by blocks passed: {'; '.join(alike)}."
    )
    yield (
        "Version 2 of the paper found no definitive evidence that skip connections are "
        f"responsible. Here: {_skips(table).words}."
    )


def _nearer(table: pd.DataFrame, group: str) -> list[float]:
    """Share of pairs in which the nearer position is more alike, by blocks passed; over seeds."""
    rows = core.pick(table, group=group, quantity="nearer")
    return [float(x) for x in rows.groupby("at")["value"].mean()]


def _nearer_words(table: pd.DataFrame, group: str) -> str:
    return ", ".join(f"{100 * x:.0f}%" for x in _nearer(table, group))


@dataclass(frozen=True)
class Skips:
    """What is lost without skip connections where there are no positions.

    Attributes:
        lost: exact answers with skips minus without, by the cell without them.
        worse: cells that lose some.
        blind: of those, with a model that does not see the order of tokens.
        unsure: of those, with a model of which rounding leaves that open.
        control: what models with positions lose without skips; None where none was trained.
    """

    lost: dict[str, core.Mean]
    worse: list[str]
    blind: list[str]
    unsure: list[str]
    control: core.Mean | None

    @property
    def order_seen(self) -> core.Finding:
        """Whether models that are worse without skips see the order all the same."""
        return False if self.blind else None if self.unsure else True

    @property
    def control_worse(self) -> core.Finding:
        """Whether models with positions are worse without skips too; no: they lose clearly less."""
        if self.control is None or core.above(self.control):
            return None if self.control is None else True
        least = min(self.lost[b].low for b in self.worse)
        return False if self.control.high < least else None

    @property
    def verdict(self) -> core.Verdict:
        """On: nothing tells that skip connections carry the order."""
        if not self.lost:
            return core.decide(None)
        return core.graded(self.order_seen, self.control_worse) if self.worse else core.decide(True)

    @property
    def words(self) -> str:
        """Differences, and what speaks for the order or against it."""
        if not self.lost:
            return "too few seeds are trained to say"
        said = [
            f"{cell_name(b)}: exact answers {g.percent()} points fewer than with skip connections"
            if b in self.worse
            else f"{cell_name(b)}: no difference in exact answers that the seeds decide "
            f"({g.percent()} points)"
            for b, g in self.lost.items()
        ]
        return "; ".join(said) + (self._why if self.worse else "")

    @property
    def _why(self) -> str:
        if not self.order_seen:
            cells = ", ".join(map(cell_name, self.blind or self.unsure))
            return f"; {cells}: " + (
                "some trained models do not see the order"
                if self.blind
                else "rounding is too large to say whether all trained models see the order"
            )
        why = "; yet every trained model sees the order, so that what is lacking is not the order"
        if self.control is None:
            why += ", and without a run that has positions and no skips"
            return f"{why}, nothing more can be said"
        but = {
            True: ": with rotary positions, models without skips are worse too",
            False: ", though models with rotary positions do without skips",
            None: ": with rotary positions the seeds do not decide whether models without skips "
            f"are worse ({self.control.percent()} points)",
        }
        return why + but[self.control_worse]


def _skips(table: pd.DataFrame) -> Skips:
    """Do models without positions learn addition without skip connections?"""
    gaps = {b: gap_between(table, a, b, "exact") for a, b, _ in PAIRS if a == "order-nope"}
    lost = {b: g for b, g in gaps.items() if g is not None}
    worse = [b for b, g in lost.items() if core.above(g)]
    none = {b: core.numbers(table, "no gap", variant=AS_IS, group=b) for b in worse}
    return Skips(
        lost,
        worse,
        blind=[b for b in worse if sum(none[b]) > 0],
        unsure=[b for b in worse if len(none[b]) < len(core.numbers(table, "exact", group=b))],
        control=gap_between(table, "order-rotary", "order-rotary-no-skip", "exact"),
    )


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Can addition be learned without positions; do skip connections carry the order?"""
    exact, rotary = (
        core.share(core.numbers(table, "exact", group=f"order-{cell}"))
        for cell in ("nope", "rotary")
    )
    if exact.n:
        yield core.Claim(
            "three-digit addition without positional encoding",
            "causal models without positional encoding see the order of tokens",
            f"exact answers {exact.percent()}% without positions, {rotary.percent()}% with "
            f"rotary ones ({exact.n} and {rotary.n} seeds)",
            core.decide(exact.value > 0.5),
            "no permutation of a sum's digits can be told apart without order; half of all "
            "answers right is far above what the digits' set allows",
        )
        shares = _nearer(table, "order-nope")[1:]
        yield core.Claim(
            "nearby positions are alike in trained models without positional encoding",
            "nearby embeddings are more similar than faraway ones (arXiv 2501.00073)",
            f"the nearer position is more alike in {', '.join(f'{100 * x:.0f}%' for x in shares)} "
            f"of pairs behind the blocks ({exact.seeds})",
            core.decide(*(x > 0.5 for x in shares)),
            "questions of nine tokens, whose digits and + differ more by what they are than by "
            "where they stand",
        )
    skips = _skips(table)
    yield core.Claim(
        "skip connections carry the order",
        "no definitive evidence that residual connections are responsible (version 2)",
        skips.words,
        skips.verdict,
        "2 layers of width 64, one task, few seeds; a model without skips may fail to train "
        "for other reasons than order",
    )
