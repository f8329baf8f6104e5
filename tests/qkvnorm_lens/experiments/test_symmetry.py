"""The experiments about order: what they say follows from their tables."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from qkvnorm_lens.experiments.core.base import Subject
from qkvnorm_lens.experiments.core.grouped import PLAIN
from qkvnorm_lens.experiments.core.read import Amount
from qkvnorm_lens.experiments.core.running import read_table, run_experiment
from qkvnorm_lens.experiments.core.subjects import find_subjects
from qkvnorm_lens.experiments.related.positions import (
    EXPERIMENT as POSITIONS,
    figure as positions_figure,
    measure as positions,
    words as positions_words,
)
from qkvnorm_lens.experiments.related.symmetry import (
    EXPERIMENT as SYMMETRY,
    figure as symmetry_figure,
    measure as symmetry,
    words as symmetry_words,
)
from qkvnorm_lens.experiments.related.symmetry.figure import deepest
from qkvnorm_lens.training.addition import VOCAB
from tests.support.watching import shape_checks_off

TINY = symmetry.Scale(Amount(sums=4, windows=1, length=16), 2, (1,), 2)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return find_subjects(["addition-pre"])[0]


# -- symmetry ---------------------------------------------------------------------------------


def test_sums_are_read_up_to_their_question(subject: Subject) -> None:
    for row in symmetry.prompts_of(subject, Amount(sums=20, windows=1)):
        question = "".join(VOCAB[i] for i in row)
        assert question.startswith("[")
        assert question.index("=") == len(question) - 1


@pytest.mark.slow
@shape_checks_off()
def test_a_whole_run_and_its_table(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random models do what must be; the words say no more than the table."""
    monkeypatch.setitem(symmetry.SCALES, "smoke", TINY)
    outcome = run_experiment(SYMMETRY, [subject], tmp_path, size="smoke", progress=False)
    table = read_table(outcome.folder)
    pd.testing.assert_frame_equal(table, outcome.table, check_exact=True, check_dtype=False)
    assert symmetry_words.text(table) == outcome.text
    assert len(symmetry_figure.figure(table).axes) == 4
    for n in symmetry.LAYERS:
        causal = symmetry.constructed(table, layers=n, variant="as is")
        free = symmetry.constructed(table, layers=n, variant="mask removed")
        assert len(causal) == len(free) == 6  # placements, with and without skips
        assert (causal["vanishes"] == int(n == 1)).all()
        assert (free["vanishes"] == 1).all()
    same = {c.what: c.same for c in symmetry_words.claims(table)}
    assert same["without positions and mask, the next token does not know the order"] == "yes"
    assert same["the causal mask breaks the symmetry"] == "in part"  # not in one layer
    mine = symmetry.trained(table)
    assert set(mine["variant"]) == set(symmetry.VARIANTS)
    assert (mine["positions"] == "removable").all()
    assert deepest(table) == "addition-pre"
    assert "could not be removed" not in outcome.text


def cells(**changes: int) -> pd.DataFrame:
    """A table of random models: whether the gap vanishes, by ``{layers}_{mask or free}_{skip}``."""
    rows = []
    for n in symmetry.LAYERS:
        for variant, word in (("as is", "mask"), ("mask removed", "free")):
            for skip in symmetry.SKIPS:
                zero = changes.get(f"l{n}_{word}_{skip}", int(n == 1 or word == "free"))
                group = f"{symmetry.CONSTRUCTED}-{n}-pre-{skip}"
                shared = {"model": f"{group}-1", "group": group, "placement": "pre", "seed": 1,
                          "layers": n, "skip": skip, "positions": "absent",
                          "mask": "removable", "why_positions": "", "why_mask": "",
                          "variant": variant, "tv": 1e-7 if zero else 0.3}  # fmt: skip
                rows.append({**shared, "by": "variant", "layer": -2, "vanishes": zero})
                nearer = 0.5 if word == "free" else 0.5 + 0.1 * changes.get("nearer", 1)
                rows.append({**shared, "by": "layer", "layer": n - 1, "nearer": nearer})
    return pd.DataFrame(rows)


def test_claims_follow_the_table() -> None:
    def same(**changes: int) -> list[str]:
        return [c.same for c in symmetry_words.claims(cells(**changes))]

    assert same() == ["yes", "in part", "yes", "yes"]  # no trained model, no claim about one
    assert same(l4_free_both=0)[0] == "no"
    assert same(l1_mask_both=0, l1_mask_none=0)[1] == "yes"
    deep = [f"l{n}_mask_{s}" for n in (2, 4) for s in symmetry.SKIPS]
    assert same(**dict.fromkeys(deep, 1))[1:3] == ["no", "no"]
    assert same(**dict.fromkeys(deep[1::2], 1))[2] == "no"
    assert same(nearer=0)[3] == "no"


def near(shares: dict[str, list[float]]) -> pd.DataFrame:
    """A table of models whose neighbours are so alike with positions removed; 0.61 as they are."""
    rows = []
    for group, values in shares.items():
        for seed, value in enumerate(values, 1):
            shared = {"model": f"{group}-{seed}", "group": group, "placement": "pre", "seed": seed,
                      "layers": 4, "skip": "-", "positions": "removable", "mask": "removable",
                      "why_positions": "-", "why_mask": "-", "moved": 0.5, "tv": 0.3,
                      "floor_tv": 1e-6, "floor_stream": 1e-6, "stream": 0.1}  # fmt: skip
            for variant, x in (("as is", 0.61), ("positions removed", value)):
                rows.append({**shared, "variant": variant, "by": "variant", "layer": -2,
                             "vanishes": 0.0})  # fmt: skip
                rows.append({**shared, "variant": variant, "by": "layer", "layer": 3, "nearer": x})
    return pd.concat([cells(), pd.DataFrame(rows)], ignore_index=True)


def test_every_group_of_models_is_said_and_judged() -> None:
    """None stands for the others; trained models are judged apart from random ones."""
    table = near({"one-none": [0.65], "two-pre": [0.49, 0.52], "three-qkv": [0.43]})
    text = symmetry_words.text(table)
    assert "| one-none | 61% | 65% |" in text
    assert "| two-pre | 61/61% | 49/52% |" in text
    assert "| three-qkv | 61% | 43% |" in text
    assert "more than half in 2 of 4 models (43% to 65%)" in text
    claims = {c.what: c for c in symmetry_words.claims(table)}
    (trained,) = (c for what, c in claims.items() if "trained" in what)
    assert "one-none 65%, two-pre 49/52%, three-qkv 43%" in trained.ours
    assert trained.same == "in part"
    ax = symmetry_figure.figure(table).axes[3]
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names[:3] == ["one-none", "two-pre", "three-qkv"]
    squares = [line for line in ax.lines if line.get_marker() == "s"]
    drawn = sorted(float(x) for line in squares for x in np.asarray(line.get_xdata()))
    assert drawn == pytest.approx([43, 49, 52, 65])
    for shares, same in (([0.6, 0.7], "yes"), ([0.4, 0.5], "no")):
        (claim,) = (c for c in symmetry_words.claims(near({"a": shares})) if "trained" in c.what)
        assert claim.same == same


def test_random_models_with_and_without_skips_are_said_apart() -> None:
    table = cells()
    rows = (table["by"] == "layer") & (table["variant"] == "as is") & (table["skip"] == "none")
    table.loc[rows, "nearer"] = 0.9
    lines = symmetry_words.text(table).splitlines()
    assert any(x.startswith("- skip connections: 60% of pairs") for x in lines)
    assert any(x.startswith("- no skip connections: 90% of pairs") for x in lines)


def test_undecided_is_neither_a_gap_nor_none() -> None:
    table = cells()
    rows = (table["by"] == "variant") & (table["variant"] == "mask removed")
    table.loc[rows & (table["layers"] == 4), "vanishes"] = math.nan
    (claim, *_) = symmetry_words.claims(table)
    assert claim.same == "not decided"
    assert claim.ours == "no gap in 4 of 6 models, a gap in 0"
    table = near({"a": [0.5]})
    table.loc[(table["group"] == "a") & (table["by"] == "variant"), "vanishes"] = math.nan
    assert "| a | 1 | 0.300 ? | 0.300 ? |" in symmetry_words.text(table)


# -- positions --------------------------------------------------------------------------------


@given(losses=st.lists(st.floats(1e-6, 10), min_size=1, max_size=8), level=st.floats(1e-5, 5))
def test_steps_to_a_loss_lie_between_the_rows_that_bracket_it(
    losses: list[float], level: float
) -> None:
    steps = [100.0 * (i + 1) for i in range(len(losses))]
    got = positions.steps_to(steps, losses, level)
    below = [i for i, loss in enumerate(losses) if loss <= level]
    if not below:
        assert got == math.inf
    else:
        first = below[0]
        assert steps[max(first - 1, 0)] <= got <= steps[first]


def test_steps_are_interpolated_in_the_logarithm() -> None:
    assert positions.steps_to([100.0, 200.0], [1.0, 0.01], 0.1) == pytest.approx(150)
    assert positions.steps_to([100.0, 200.0, 300.0], [0.5, 2.0, 0.1], 0.5) == 100


def made(exact: dict[str, list[float]], *, blind: str = "") -> pd.DataFrame:
    """A table of final accuracies by cell; models of ``blind`` do not see the order."""
    rows = []
    for cell, values in exact.items():
        for seed, value in enumerate(values, 1):
            group = f"order-{cell}"
            facts = {"exact": value, "per token": (1 + value) / 2, "per token without ]": value}
            facts |= {"steps between measurements": 1000.0}
            points = [(q, PLAIN, 0, v) for q, v in facts.items()]
            points += [("steps to loss", PLAIN, x, 100.0 + seed) for x in positions.LOSSES]
            points += [("steps to share", PLAIN, x, 1000.0) for x in positions.SHARES]
            points += [("tv", positions.AS_IS, 0, 0.5), ("tv", positions.SWAPPED, 0, 0.01)]
            points += [("no gap", positions.AS_IS, 0, float(cell == blind))]
            points += [("loss", PLAIN, at, loss) for at, loss in ((100, 1.0), (200, 0.1))]
            points += [("nearer", PLAIN, -1, 0.5)]
            rows += [
                {"model": f"{group}-{seed}", "group": group, "placement": "pre", "seed": seed,
                 "quantity": q, "variant": variant, "at": at, "value": v}
                for q, variant, at, v in points
            ]  # fmt: skip
    return pd.DataFrame(rows)


GOOD, BAD = [0.98, 0.99, 1.0], [0.01, 0.02, 0.03]


@pytest.mark.parametrize(
    ("exact", "blind", "same"),
    [
        ({"nope": GOOD, "nope-no-skip": GOOD}, "", "yes"),
        ({"nope": GOOD, "nope-no-skip": BAD}, "", "not decided"),  # no control
        ({"nope": GOOD, "nope-no-skip": BAD}, "nope-no-skip", "no"),
        ({"rotary": GOOD, "nope": GOOD, "nope-no-skip": BAD, "rotary-no-skip": BAD}, "", "yes"),
        (
            {"rotary": GOOD, "nope": GOOD, "nope-no-skip": BAD, "rotary-no-skip": GOOD},
            "",
            "in part",
        ),
        (  # a control that decides nothing
            {"rotary": GOOD, "nope": GOOD, "nope-no-skip": BAD, "rotary-no-skip": [0.0, 0.9, 0.99]},
            "",
            "not decided",
        ),
        ({"nope": GOOD[:1], "nope-no-skip": BAD[:1]}, "", "not decided"),  # one seed
        ({"nope": GOOD}, "", "not decided"),
    ],
)
def test_the_verdict_on_skip_connections(
    exact: dict[str, list[float]], blind: str, same: str
) -> None:
    table = made(exact, blind=blind)
    assert {c.what: c.same for c in positions_words.claims(table)}[
        "skip connections carry the order"
    ] == (same)
    text = positions_words.text(table)
    assert "no definitive evidence" in text
    assert len(positions_figure.figure(table).axes) == 4
    if len(exact["nope"]) > 1 and "nope-no-skip" in exact:
        assert "with skip connections minus without any: " in text


def test_runs_that_never_get_there_are_counted() -> None:
    table = made({"nope": GOOD})
    chosen = (table["quantity"] == "steps to loss") & (table["at"] == 0.1) & (table["seed"] == 2)
    table.loc[chosen, "value"] = math.inf
    assert "never in 1 of 3" in positions_words.text(table)


def test_without_trained_models_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "trained", lambda prefix: {})
    with pytest.raises(ValueError, match=r"python -m qkvnorm_lens\.experiments\.train"):
        run_experiment(POSITIONS, [], tmp_path, size="smoke", progress=False)


def test_questions_and_swapped_operands() -> None:
    (subject,) = find_subjects(["order-rotary-1"])
    rows, swap = positions.questions(subject, 5)
    for row in rows:
        text = "".join(VOCAB[i] for i in row)
        other = "".join(VOCAB[row[i]] for i in swap)
        assert text[0] == "["
        assert text[-1] == "="
        a, b = text[1:-1].split("+")
        assert other == f"[{b}+{a}="
        assert len(a) == len(b) == 3
    (signed,) = find_subjects(["addition-pre"])
    with pytest.raises(ValueError, match="wanted a model trained on sums of two positive"):
        positions.questions(signed, 5)


@shape_checks_off()
def test_a_run_on_trained_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(positions.SUMS, "smoke", 100)
    outcome = run_experiment(POSITIONS, [], tmp_path, size="smoke", progress=False)
    table = read_table(outcome.folder)
    assert positions_words.text(table) == outcome.text
    rotary = table[table["group"] == "order-rotary"].set_index(["quantity", "variant"])["value"]
    assert rotary["exact", PLAIN].item() > 0.9
    assert rotary["tv", "both removed"].item() < 1e-4  # nothing is left that knows the order
    assert rotary["no gap", "both removed"].item() == 1
    assert rotary["tv", positions.SWAPPED].item() < rotary["tv", positions.AS_IS].item()
