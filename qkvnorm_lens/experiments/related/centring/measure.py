"""What is measured: a table for each part."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.accuracy import accuracies

SUMS: Final = core.by_size(200, 2_000, 20_000)
PAIRS: Final = {"pre": ("confound-pre", "centred-pre")}
"""By placement: the runs with A, and those with A - U."""
SEEDS: Final = tuple(range(1, core.CENTRING_SEEDS + 1))
LAST: Final = 5  # rows of the log: the final loss is their mean
FINAL: Final = "final loss"
WHOLE: Final = "mean loss"
SPECTRUM: Final = ("gap", "stable_rank", "left_s1")
COMMAND: Final = "python -m qkvnorm_lens.experiments.train"


def measure(subject: core.Subject, size: core.Size) -> pd.DataFrame:
    """A run's loss by step, its accuracy by kind of sums, and the spectrum of its patterns."""
    import hooks

    assert subject.path is not None
    log = pd.read_csv(subject.path / "log.csv")
    rows = [
        ("curve", int(s), "loss", core.PLAIN, float(x))
        for s, x in zip(log["step"], log["loss"], strict=True)
    ]
    last = int(log["step"].iloc[-1])
    rows.append(("number", last, FINAL, core.PLAIN, float(log["loss"].iloc[-LAST:].mean())))
    rows.append(("number", last, WHOLE, core.PLAIN, float(log["loss"].mean())))
    table = accuracies(subject, SUMS[size])
    rows += [
        ("number", last, "accuracy", kind, float(value))
        for kind, value in zip(table["kind"], table["per_token"], strict=True)
    ]
    read = core.reading(subject, core.AMOUNT[size])
    report = hooks.spectral_gap(subject.load(), read.ids, batch_size=32, progress=False)
    whole = report.to_frame("prompt")[list(SPECTRUM)].mean()
    rows += [("number", last, name, core.PLAIN, float(whole[name])) for name in SPECTRUM]
    names = ["what", "step", "quantity", "variant", "value"]
    fix = int(subject.group.startswith("centred"))
    return core.about(subject, pd.DataFrame(rows, columns=names).assign(fix=fix), "fix")


def parts(subjects: tuple[core.Subject, ...], size: core.Size) -> list[core.Part]:
    """One for each run; the first seed of Pre-Norm in the smoke form.

    Raises:
        ValueError: a run is missing, or two of a pair differ in more than the fix.
    """
    from qkvnorm_lens.experiments.core import find_subjects

    pairs = [(*PAIRS[p], seed) for p in PAIRS for seed in SEEDS]
    pairs = pairs[:1] if size == "smoke" else pairs
    there = core.trained()
    names = [f"{group}-{seed}" for *both, seed in pairs for group in both]
    missing = sorted(name for name in names if name not in there)
    if missing:
        raise ValueError(
            f"centring: wanted the trained models {', '.join(names)}; got none of "
            f"{', '.join(missing)}. To train them: {COMMAND} {' '.join(missing)}"
        )
    for plain, fixed, seed in pairs:
        _check_pair(there[f"{plain}-{seed}"], there[f"{fixed}-{seed}"])
    settings = {"sums": SUMS[size], "last": LAST}
    return [
        core.Part(
            s.name, partial(measure, s, size), s, {**settings, **core.AMOUNT[size].settings(s)}
        )
        for s in find_subjects(names)
    ]


def _check_pair(plain: Path, fixed: Path) -> None:
    """Refuse two runs that differ in more than the fix."""
    runs = []
    for path in (plain, fixed):
        run = json.loads((path / "card.json").read_text(encoding="utf-8"))["run"]
        runs.append((run["config"].pop("centred", False), run))
    (without, one), (with_fix, other) = runs
    unlike = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    if unlike or without or not with_fix:
        raise ValueError(
            f"centring: wanted {plain.name} and {fixed.name} to differ in the fix alone; got "
            f"centred = {without} and {with_fix}, other {', '.join(unlike) or 'settings equal'}"
        )


# -- reading the table ----------------------------------------------------------------------


def values(
    table: pd.DataFrame, placement: str, fix: int, quantity: str, variant: str = core.PLAIN
) -> pd.Series[float]:
    """One number for each seed."""
    chosen = core.pick(
        table, placement=placement, fix=fix, what="number", quantity=quantity, variant=variant
    )
    return chosen.set_index("seed")["value"].astype(float)


def gains(
    table: pd.DataFrame, placement: str, quantity: str, variant: str = core.PLAIN
) -> pd.Series[float]:
    """With the fix minus without it, seed by seed."""
    without, fixed = (values(table, placement, fix, quantity, variant) for fix in (0, 1))
    return fixed - without


def gain(
    table: pd.DataFrame, placement: str, quantity: str, variant: str = core.PLAIN
) -> core.Mean:
    """Mean over seeds of the difference within a seed."""
    found = core.mean(gains(table, placement, quantity, variant).dropna().tolist())
    return found.cut(-1.0, 1.0) if quantity == "accuracy" else found


def placements_in(table: pd.DataFrame) -> list[str]:
    """Placements with runs in the table."""
    return [p for p in PAIRS if p in set(table["placement"])]
