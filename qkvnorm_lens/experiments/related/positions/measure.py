"""Three-digit addition without positional encoding, with and without skip connections.

Zuo & Guerzhoy 2024 (arXiv 2402.05969): a causal mask alone lets a transformer see order. Do skip
connections carry it? Small models, several seeds, trained on sums of two positive integers of three
digits: with rotary positions, without positions, and without positions and skip connections of
attention alone, or of attention and feed-forward. What they learned, how fast, and whether the
trained models see the order of a question's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    Claim,
    Experiment,
    Mean,
    Part,
    Size,
    Subject,
    difference,
    groups,
    markdown,
    mean,
    panels,
    trained,
)
from qkvnorm_lens.plots.charts import GREY, RUNS, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREFIX: Final = "order-"
CELLS: Final = {
    "order-rotary": "rotary",
    "order-rotary-no-attn": "rotary,\nno skip of\nattention",
    "order-rotary-no-skip": "rotary,\nno skips",
    "order-nope": "no positions",
    "order-nope-no-attn": "no positions,\nno skip of\nattention",
    "order-nope-no-skip": "no positions,\nno skips",
}
SUMS: Final[dict[Size, int]] = {"smoke": 400, "quick": 4_000, "full": 20_000}
QUESTIONS: Final[dict[Size, int]] = {"smoke": 8, "quick": 48, "full": 256}
PERMUTATIONS: Final[dict[Size, int]] = {"smoke": 2, "quick": 4, "full": 8}
SEED: Final = 20_240_617
LOSSES: Final = (1.0, 0.3, 0.1)  # nats per token
SHARES: Final = (0.5, 0.9)  # of tokens right
LEAST: Final = 1e-8  # of the figure's logarithmic axis
GAPS: Final = {
    "tv, as is": ("permuted", "o"),
    "tv, operands swapped": ("operands swapped", "D"),
    "tv, positions removed": ("permuted, positions removed", "s"),
    "tv, mask removed": ("permuted, mask removed", "^"),
}


# -- measuring --------------------------------------------------------------------------------


def measure(subject: Subject, size: Size) -> pd.DataFrame:
    """Accuracy, learning curve, symmetry gap and neighbours of one trained model."""
    import hooks
    from qkvnorm_lens.training import TEST_SEED, evaluate

    model = subject.load()
    accuracy = evaluate(model, subject.split, rows=SUMS[size], seed=TEST_SEED)
    facts: list[tuple[str, float, float]] = [
        ("per token", 0, accuracy.per_token),
        ("per token without ]", 0, accuracy.per_token_without_end),
        ("exact", 0, accuracy.exact),
        *of_log(subject),
    ]
    ids, swap = questions(subject, QUESTIONS[size])
    report = hooks.symmetry_gap(
        model, ids, permutations=PERMUTATIONS[size], keep_first=True, batch_size=64, progress=False
    )
    for row in report.to_frame().to_dict("records"):
        facts.append((f"tv, {row['variant']}", 0, row["tv"]))
        facts.append((f"rounding, {row['variant']}", 0, row["floor_tv"]))
        none = {"none": 1.0, "gap": 0.0, "undecided": math.nan}[row["verdict"]]
        facts.append((f"no gap, {row['variant']}", 0, none))
    unequal = [row for row in ids if [row[i] for i in swap] != row]
    swapped = hooks.symmetry_gap(
        model,
        unequal,
        permutations=[swap],
        positions=True,
        mask=True,
        batch_size=64,
        progress=False,
    )
    facts.append(("tv, operands swapped", 0, float(swapped.to_frame()["tv"].iloc[0])))
    layers = report.to_frame("layer")
    for row in layers[layers["variant"] == "as is"].to_dict("records"):
        facts.append(("nearer", row["layer"], row["nearer"]))
    return pd.DataFrame(
        [{**subject.columns, "quantity": q, "at": at, "value": value} for q, at, value in facts]
    )


def questions(subject: Subject, n: int) -> tuple[list[list[int]], list[int]]:
    """Questions up to ``=``, and the permutation that swaps the two integers, of equal digits."""
    from qkvnorm_lens.training import EQUALS, draw

    split = subject.split
    if split.counts != (2,) or len(split.digits) != 1 or split.signed:
        raise ValueError(
            f"{subject.name}: wanted a model trained on sums of two positive integers of as many "
            f"digits; got {split}"
        )
    rows = draw(split, n, seed=SEED).tokens.tolist()
    digits = split.digits[0]
    first = list(range(1, 1 + digits))
    second = list(range(2 + digits, 2 + 2 * digits))
    swap = [0, *second, 1 + digits, *first, 2 + 2 * digits]
    return [row[: row.index(EQUALS) + 1] for row in rows], swap


def of_log(subject: Subject) -> list[tuple[str, float, float]]:
    """The learning curve, and the steps until so low a loss, or so many right tokens.

    Every sum is new, so that the training loss (a mean over the steps between two rows of the log)
    is a test loss. Steps to a loss are interpolated in its logarithm; accuracy is measured seldom,
    and its steps are those of the first measurement that reached it.
    """
    assert subject.path is not None
    log = pd.read_csv(subject.path / "log.csv")
    steps, losses = (log[name].astype(float).tolist() for name in ("step", "loss"))
    facts = [("loss", step, loss) for step, loss in zip(steps, losses, strict=True)]
    facts += [(f"steps to {x:g} nats", 0.0, steps_to(steps, losses, x)) for x in LOSSES]
    seen = log.dropna(subset=["per_token"])
    for share in SHARES:
        reached = seen[seen["per_token"] >= share]["step"]
        first = float(reached.min()) if len(reached) else math.inf
        facts.append((f"measured {share:.0%} of tokens", 0.0, first))
    facts.append(("steps between measurements", 0.0, float(seen["step"].min())))
    return facts


def steps_to(steps: Sequence[float], losses: Sequence[float], level: float) -> float:
    """Steps until the loss first is at most ``level``; inf if never.

    Interpolated in the loss's logarithm between two rows; the first row's step where that row is
    low enough.
    """
    for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        if loss <= level:
            if i == 0:
                return step
            before, at = losses[i - 1], steps[i - 1]
            share = math.log(before / level) / math.log(before / max(loss, 1e-12))
            return at + share * (step - at)
    return math.inf


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each trained model; two of them in the smoke form.

    Raises:
        ValueError: none is trained.
    """
    from qkvnorm_lens.experiments.core import find_subjects

    names = sorted(trained(PREFIX), key=_order)
    if not names:
        raise ValueError(
            "positions: wanted trained models order-*; got none. To train them: "
            "python -m qkvnorm_lens.experiments.train"
        )
    if size == "smoke":
        names = [names[0], names[-1]] if len(names) > 1 else names
    settings = {
        "sums": SUMS[size],
        "questions": QUESTIONS[size],
        "permutations": PERMUTATIONS[size],
    }
    return [Part(s.name, partial(measure, s, size), s, settings) for s in find_subjects(names)]


def _order(name: str) -> tuple[int, str]:
    known, cell = list(CELLS), name.rpartition("-")[0]
    return known.index(cell) if cell in known else len(known), name


# -- reading the table --------------------------------------------------------------------------


def of(table: pd.DataFrame, group: str, quantity: str) -> list[float]:
    """One number for each seed, without those that are none."""
    chosen = table[(table["group"] == group) & (table["quantity"] == quantity)]
    return [float(v) for v in chosen["value"] if not math.isnan(v)]


def _cell(group: str) -> str:
    return CELLS.get(group, group).replace("\n", " ")


def _steps(values: list[float]) -> str:
    """A mean with its interval, or how many got there."""
    reached = [v for v in values if math.isfinite(v)]
    if not values:
        return "-"
    if len(reached) < len(values):
        return f"never in {len(values) - len(reached)} of {len(values)}"
    m = mean(reached)
    return f"{m.value:.0f}" + ("" if math.isnan(m.half) else f" ± {m.half:.0f}")


# -- figure -----------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """Learning curves, accuracy at the end, symmetry gaps, and how alike neighbours are."""
    fig, axes = panels(2, 2, width=4.6, height=3.5)
    names = groups(table)
    colours = dict(zip(names, RUNS, strict=False))
    _draw_curves(axes[0], table, colours)
    _draw_accuracy(axes[1], table, names, colours)
    _draw_gaps(axes[2], table, names)
    _draw_nearer(axes[3], table, colours)
    ticks = [CELLS.get(name, name) for name in names]
    for ax in axes[1:3]:
        ax.set_xticks(range(len(names)), ticks, fontsize=7)
        ax.set_xlim(-0.5, len(names) - 0.5)
    return fig


def _draw_curves(ax: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    losses = table[table["quantity"] == "loss"]
    for group, colour in colours.items():
        mine = losses[losses["group"] == group]
        for _, run in mine.groupby("model"):
            ax.plot(run["at"], run["value"].clip(lower=1e-5), color=colour, linewidth=0.9)
        ax.plot([], [], color=colour, label=_cell(group))
    ax.set_yscale("log")
    ax.set_xlabel("training steps of 128 sums")
    ax.set_ylabel("loss (nats per token)")
    ax.set_title("learning, a line for each seed", fontsize=10)
    ax.legend(fontsize=7, frameon=False)
    grid(ax)


def _draw_accuracy(
    ax: Axes, table: pd.DataFrame, names: list[str], colours: dict[str, str]
) -> None:
    shown = (("per token", "o", -0.15), ("exact", "s", 0.15))
    for quantity, marker, shift in shown:
        for x, group in enumerate(names):
            seeds = of(table, group, quantity)
            m = mean(seeds)
            ax.errorbar(
                x + shift,
                100 * m.value,
                yerr=100 * np.nan_to_num(m.half),
                fmt=marker,
                color=colours.get(group, GREY),
                capsize=3,
                markersize=5,
            )
            ax.plot([x + shift + 0.07] * len(seeds), [100 * s for s in seeds], ".", color=GREY)
        ax.plot([], [], marker, color=GREY, label=quantity)
    ax.set_ylim(-3, 105)
    ax.set_ylabel("accuracy at the end (%)")
    ax.set_title("new sums; bars: 95% intervals, dots: seeds", fontsize=10)
    ax.legend(fontsize=7, frameon=False, loc="lower left")
    grid(ax)


def _draw_gaps(ax: Axes, table: pd.DataFrame, names: list[str]) -> None:
    for i, (quantity, (name, marker)) in enumerate(GAPS.items()):
        for x, group in enumerate(names):
            seeds = of(table, group, quantity)
            at = x + 0.16 * (i - 1.5)
            ax.plot(
                [at] * len(seeds),
                [max(s, LEAST) for s in seeds],
                marker,
                color=RUNS[i],
                markersize=4,
            )
        ax.plot([], [], marker, color=RUNS[i], markersize=4, label=name)
    ax.set_yscale("log")
    ax.set_ylim(LEAST / 2, 3e3)  # room for the legend
    ax.set_yticks([10.0**e for e in range(-8, 1, 2)])
    ax.set_ylabel("total variation of the next token")
    ax.set_title("symmetry gap: the digit behind “=”", fontsize=10)
    ax.legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    grid(ax)


def _draw_nearer(ax: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    nearer = table[table["quantity"] == "nearer"]
    for group, colour in colours.items():
        for _, run in nearer[nearer["group"] == group].groupby("model"):
            ax.plot(run["at"] + 1, 100 * run["value"], color=colour, marker="o", markersize=3)
    ax.axhline(50, color=GREY, linewidth=0.9, linestyle="--")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("blocks passed (0: embedding)")
    ax.set_ylabel("pairs, the nearer more alike (%)")
    ax.set_title("are neighbours alike? (dashed: no)", fontsize=10)
    grid(ax)


# -- words ------------------------------------------------------------------------------------


def text(table: pd.DataFrame) -> str:
    """What was learned, how fast, what the trained models see of order, and the differences."""
    head = ["model", "seeds", "per token (%)", "without `]`", "exact (%)"]
    head += [f"steps to {x:g} nats" for x in LOSSES]
    head += [f"TV, {name}" for name, _ in GAPS.values()]
    rows = []
    for group in groups(table):
        gaps = [of(table, group, quantity) for quantity in GAPS]
        rows.append(
            [
                _cell(group),
                str(len(of(table, group, "exact"))),
                mean(of(table, group, "per token")).percent(),
                mean(of(table, group, "per token without ]")).percent(),
                mean(of(table, group, "exact")).percent(),
                *(_steps(of(table, group, f"steps to {x:g} nats")) for x in LOSSES),
                *(f"{mean(g).value:.2g}" if g else "-" for g in gaps),
            ]
        )
    last = int(table[table["quantity"] == "loss"]["at"].max())
    between = of(table, groups(table)[0], "steps between measurements")[0]
    lines = [
        markdown(head, rows),
        "",
        f"Sums of two positive integers of three digits, Pre-Norm, {last:,} steps of 128 sums; "
        "± half a 95% interval over seeds. Steps: until the loss, a mean over the steps between "
        "two rows of the log, is so low. TV: total variation of the first answer digit's "
        "distribution when the question's tokens between `[` and `=` are permuted, or the two "
        "integers swapped, which leaves the answer as it is.",
        "",
        f"Tokens right, as measured every {between:.0f} steps: {_shares(table)}",
        "",
        *_differences(table),
        *_order_words(table),
    ]
    return "\n".join(lines)


def _shares(table: pd.DataFrame) -> str:
    out = []
    for group in groups(table):
        said = []
        for share in SHARES:
            first = of(table, group, f"measured {share:.0%} of tokens")
            got = [v for v in first if math.isfinite(v)]
            if len(got) < len(first):
                said.append(f"{share:.0%} in {len(got)} of {len(first)} runs")
            else:
                said.append(f"{share:.0%} by step {max(got):.0f}")
        out.append(f"{_cell(group)}: {', '.join(said)}")
    return "; ".join(out) + "."


PAIRS: Final = (
    ("order-rotary", "order-nope", "rotary positions minus none"),
    ("order-nope", "order-nope-no-attn", "no positions: with the skip of attention minus without"),
    ("order-nope", "order-nope-no-skip", "no positions: with skip connections minus without any"),
    ("order-rotary", "order-rotary-no-skip", "rotary: with skip connections minus without any"),
)


def gap_between(table: pd.DataFrame, a: str, b: str, quantity: str) -> Mean | None:
    """Mean of a minus mean of b with Welch's interval, where both have several seeds."""
    x, y = of(table, a, quantity), of(table, b, quantity)
    if min(len(x), len(y)) < 2 or not all(map(math.isfinite, [*x, *y])):
        return None
    return difference(x, y)


def _differences(table: pd.DataFrame) -> list[str]:
    out = []
    for a, b, what in PAIRS:
        per_token, exact = (gap_between(table, a, b, q) for q in ("per token", "exact"))
        if per_token is None or exact is None:
            continue
        steps = gap_between(table, a, b, f"steps to {LOSSES[1]:g} nats")
        line = f"- {what}: {per_token.percent()} points per token, {exact.percent()} exact"
        if steps is not None:
            line += f", {steps.value:+.0f} ± {steps.half:.0f} steps to {LOSSES[1]:g} nats"
        out.append(f"{line} ({per_token.n} seeds each).")
    return [*out, ""] if out else out


def _order_words(table: pd.DataFrame) -> list[str]:
    out = []
    for group in groups(table):
        none = of(table, group, "no gap, as is")
        doubt = len(of(table, group, "exact")) - len(none)
        swap, permuted = (of(table, group, q) for q in ("tv, operands swapped", "tv, as is"))
        ratio = mean(swap).value / max(mean(permuted).value, LEAST)
        out.append(
            f"{_cell(group)}: {len(none) - int(sum(none))} of {len(none) + doubt} trained models "
            f"see the order{f' ({doubt} undecided: rounding too large)' if doubt else ''}; "
            f"swapping the integers changes the prediction {ratio:.2f} times as much as permuting "
            "all tokens."
        )
    alike = [f"{_cell(group)}: {_nearer_words(table, group)}" for group in groups(table)]
    out.append(
        "Pairs of earlier positions of which the nearer is more alike (cosine, first token left "
        f"out), by blocks passed: {'; '.join(alike)}."
    )
    out.append(
        "Version 2 of the paper found no definitive evidence that skip connections are "
        f"responsible. Here: {_verdict(table)[1]}."
    )
    return out


def _nearer(table: pd.DataFrame, group: str) -> list[float]:
    """Share of pairs in which the nearer position is more alike, by blocks passed; over seeds."""
    rows = table[(table["group"] == group) & (table["quantity"] == "nearer")]
    return [float(x) for x in rows.groupby("at")["value"].mean()]


def _nearer_words(table: pd.DataFrame, group: str) -> str:
    return ", ".join(f"{100 * x:.0f}%" for x in _nearer(table, group))


def _verdict(table: pd.DataFrame) -> tuple[Literal["yes", "no", "in part", "not decided"], str]:
    """Do models without positions learn addition without skip connections?"""
    gaps = {b: gap_between(table, a, b, "exact") for a, b, _ in PAIRS if a == "order-nope"}
    found = {b: g for b, g in gaps.items() if g is not None}
    if not found:
        return "not decided", "too few seeds are trained to say"
    said = [
        f"{_cell(b)}: exact answers {g.percent()} points fewer than with skip connections"
        if g.excludes_zero and g.value > 0
        else f"{_cell(b)}: no difference in exact answers that the seeds decide "
        f"({g.percent()} points)"
        for b, g in found.items()
    ]
    worse = [b for b, g in found.items() if g.excludes_zero and g.value > 0]
    blind = [b for b in worse if sum(of(table, b, "no gap, as is")) > 0]
    unsure = [b for b in worse if len(of(table, b, "no gap, as is")) < len(of(table, b, "exact"))]
    words = "; ".join(said)
    if not worse:
        return "yes", words
    control = gap_between(table, "order-rotary", "order-rotary-no-skip", "exact")
    if blind:
        words += f"; {', '.join(map(_cell, blind))}: some trained models do not see the order"
        return "no", words
    if unsure:
        words += f"; {', '.join(map(_cell, unsure))}: rounding is too large to say whether all "
        return "not decided", f"{words}trained models see the order"
    words += "; yet every trained model sees the order, so that what is lacking is not the order"
    if control is None:
        words += ", and without a run that has positions and no skips, nothing more can be said"
        return "not decided", words
    if control.excludes_zero and control.value > 0:
        return "yes", f"{words}: with rotary positions, models without skips are worse too"
    least = min(found[b].value - found[b].half for b in worse)
    if not control.value + control.half < least:
        return "not decided", (
            f"{words}: with rotary positions the seeds do not decide whether models without skips "
            f"are worse ({control.percent()} points)"
        )
    return "in part", f"{words}, though models with rotary positions do without skips"


def claims(table: pd.DataFrame) -> list[Claim]:
    """Can addition be learned without positions; do skip connections carry the order?"""
    out = []
    if of(table, "order-nope", "exact"):
        exact, rotary = (mean(of(table, f"order-{c}", "exact")) for c in ("nope", "rotary"))
        out.append(
            Claim(
                "three-digit addition without positional encoding",
                "causal models without positional encoding see the order of tokens",
                f"exact answers {exact.percent()}% without positions, {rotary.percent()}% with "
                f"rotary ones ({exact.n} and {rotary.n} seeds)",
                "yes" if exact.value > 0.5 else "no",
                "no permutation of a sum's digits can be told apart without order; half of all "
                "answers right is far above what the digits' set allows",
            )
        )
        shares = _nearer(table, "order-nope")[1:]
        more = sum(x > 0.5 for x in shares)
        out.append(
            Claim(
                "nearby positions are alike in trained models without positional encoding",
                "nearby embeddings are more similar than faraway ones (arXiv 2501.00073)",
                "the nearer position is more alike in "
                f"{', '.join(f'{100 * x:.0f}%' for x in shares)} of pairs behind the blocks "
                f"({exact.n} seed{'s' * (exact.n != 1)})",
                "yes" if more == len(shares) else "in part" if more else "no",
                "questions of nine tokens, whose digits and + differ more by what they are than by "
                "where they stand",
            )
        )
    same, words = _verdict(table)
    out.append(
        Claim(
            "skip connections carry the order",
            "no definitive evidence that residual connections are responsible (version 2)",
            words,
            same,
            "2 layers of width 64, one task, few seeds; a model without skips may fail to train "
            "for other reasons than order",
        )
    )
    return out


EXPERIMENT: Final = Experiment(
    name="positions",
    title="Three-digit addition without positions, with and without skip connections",
    source="Zuo & Guerzhoy 2024, arXiv 2402.05969",
    models="none",
    minutes={"smoke": 0.1, "quick": 0.4, "full": 2.0},
    version=2,
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
