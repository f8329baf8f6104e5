"""Which runs count as failed, what is trained, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qkvnorm_lens.experiments.core.running import read_table, run_experiment
from qkvnorm_lens.experiments.paper.stability import (
    EXPERIMENT as STABILITY,
    figure as stability_figure,
    measure as stability,
    words as stability_words,
)
from tests.support.watching import shape_checks_off

KNOWN = 2.0


def made(losses: dict[tuple[str, int, float, int], float]) -> pd.DataFrame:
    """A table of final losses by (placement, width, rate, seed)."""
    rows = []
    for (placement, width, rate, seed), loss in losses.items():
        why = stability.failure([loss], KNOWN)
        rows.append(
            {
                "placement": placement,
                "width": width,
                "rate": rate,
                "seed": seed,
                "steps": 350,
                "loss": loss,
                "lowest": loss,
                "frequencies": KNOWN,
                "failed": int(bool(why)),
                "why": why or "trained",
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([1.9, 1.5, 1.0], ""),
        ([1.9, 1.0, 1.49], ""),  # of what was gained, 1.0, less than half is lost again
        ([1.9, 1.0, 1.51], "spike"),
        ([3.0, 2.5, 2.0], "frequencies"),  # no better than knowing frequencies
        ([3.0, 2.5, 1.99], ""),
        ([1.5, math.nan, math.nan], "not a number"),
        ([1.5, math.inf, 1.5], "not a number"),
    ],
)
def test_failure(losses: list[float], why: str) -> None:
    assert stability.failure(losses, KNOWN) == why


def test_frequencies_are_the_entropy_of_the_targets() -> None:
    """No constant prediction has a lower loss; uniform guesses have log 17."""
    from qkvnorm_lens.training.addition import draw

    known = stability.frequencies(2000, seed=3)
    batch = draw(stability.SPLIT, 2000, seed=3)
    targets = batch.targets[batch.scored].tolist()
    share = {t: targets.count(t) / len(targets) for t in set(targets)}
    assert known == pytest.approx(np.mean([-math.log(share[t]) for t in targets]), rel=1e-12)
    assert known < math.log(len(share)) < math.log(17)


@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
def test_runs_are_the_papers_recipe_at_another_width(placement: str) -> None:
    run = stability.run_of(placement, 32, 3e-2, 5, 60)
    assert (run.config.placement, run.config.d_model, run.config.n_heads) == (placement, 32, 2)
    assert (run.config.d_mlp, run.config.seed, run.seed, run.steps) == (128, 5, 5, 60)
    recipe = run.recipe
    assert not isinstance(recipe, str)
    assert (recipe.optimizer, recipe.decay_all, recipe.lr) == ("adamw", True, 3e-2)
    from qkvnorm_lens.training.recipes import LearningRate

    rate = LearningRate(recipe, run.steps)
    for _ in range(run.steps):
        rate.saw(1.0)  # never better
    assert rate.at(run.steps) == 3e-2  # constant over the run
    with pytest.raises(ValueError, match="constant rate"):
        stability.run_of(placement, 32, 3e-2, 5, recipe.epoch + 1)


@shape_checks_off()
def test_losses_are_of_the_run_in_equal_parts() -> None:
    """The mean of the parts is the mean of the run's losses; the run repeats itself."""
    run = stability.run_of("pre", 32, 1e-2, 1, 10)
    losses = stability.train_and_see(run)
    assert len(losses) == stability.WINDOWS
    assert losses == stability.train_and_see(run)
    assert losses[0] == pytest.approx(math.log(17), abs=0.2)  # a new model guesses
    assert losses[-1] < losses[0]


def test_least_failing_rate() -> None:
    table = made(
        {
            ("pre", 32, 1e-3, 1): 1.0,
            ("pre", 32, 1e-2, 1): 2.5,  # fails, and trains again above
            ("pre", 32, 3e-2, 1): 1.0,
            ("pre", 32, 1e-1, 1): 2.5,
            ("qkv", 32, 1e-3, 1): 1.0,
            ("qkv", 32, 1e-1, 1): 1.0,
            ("none", 32, 1e-2, 1): math.nan,
            ("none", 32, 1e-1, 1): 1.0,
            ("none", 32, 1e-2, 2): 1.0,
            ("none", 32, 1e-1, 2): 2.0,
        }
    )
    rates = {p: stability_words.least_failing(table, p, 32) for p in ("pre", "qkv", "none")}
    assert rates == {"pre": 1e-2, "qkv": math.inf, "none": 1e-2}


def test_where_neither_fails_they_do_not_fail_at_the_same_rate() -> None:
    losses = {32: (1.0, 1.0), 64: (2.5, 1.0), 128: (2.5, 2.5)}
    table = made(
        {
            (p, width, 1e-2, 1): loss
            for width, both in losses.items()
            for p, loss in zip(("pre", "qkv"), both, strict=True)
        }
    )
    found = stability_words.compared(table, stability_words.least_failing)
    assert found == {"lower": [64], "same": [128], "higher": [], "neither": [32]}


def test_half_gain_is_interpolated_in_the_logarithm() -> None:
    """Best 1.0, known 2.0: half is 1.5, half-way between losses of 1.0 and 2.0 at 1e-3 and 1e-1."""
    table = made(
        {
            ("pre", 32, 1e-3, 1): 1.0,
            ("pre", 32, 1e-1, 1): 2.0,
            ("qkv", 32, 1e-3, 1): 1.0,
            ("qkv", 32, 1e-1, 1): 1.4,
            ("qkv", 32, 1e-3, 2): 1.0,
            ("qkv", 32, 1e-1, 2): math.nan,
        }
    )
    assert stability_words.half_gain(table, "pre", 32) == [pytest.approx(1e-2)]
    first, second = stability_words.half_gain(table, "qkv", 32)
    assert first == math.inf
    assert 1e-3 < second < 1e-2  # a loss that is no number counts as twice the known one


def test_claims_follow_the_table() -> None:
    def losses(pre: float, qkv: float) -> pd.DataFrame:
        grid = {
            (p, w, r, s): 1.0
            for p in ("pre", "qkv")
            for w in (32, 64)
            for r in (1e-3, 1e-2, 1e-1)
            for s in (1, 2)
        }
        for p, at in (("pre", pre), ("qkv", qkv)):
            grid |= {k: 2.5 for k in grid if k[0] == p and k[2] >= at}
        return made(grid)

    def same(pre: float, qkv: float) -> list[str]:
        return [c.same for c in stability_words.claims(losses(pre, qkv))]

    assert same(1e-2, 1e-1) == ["no", "yes", "yes"]
    assert same(1e-1, 1e-2) == ["no", "no", "no"]
    assert same(1e-1, 1e-1) == ["no", "not decided", "not decided"]
    assert same(1e-3, 1e-1)[:2] == ["yes", "yes"]
    text = stability_words.text(losses(1e-2, 1e-1))
    assert "at lower rates than QKV-Norm at width 32, 64" in text


@shape_checks_off()
def test_a_whole_run_and_its_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table, figure and words from what was trained; a second time nothing is."""
    scale = stability.Scale((32,), (1e-3, 1.0), ("pre", "qkv"), (1,), 20)
    monkeypatch.setitem(stability.SCALES, "smoke", scale)
    outcome = run_experiment(STABILITY, [], tmp_path, size="smoke", progress=False)
    table = read_table(outcome.folder)
    pd.testing.assert_frame_equal(table, outcome.table, check_exact=True, check_dtype=False)
    assert len(table) == 4
    assert (table["loss"] >= table["lowest"]).all()
    assert stability_words.text(table) == outcome.text
    assert len(stability_figure.figure(table).axes) == 1
    monkeypatch.setattr(stability, "train_and_see", None)
    again = run_experiment(STABILITY, [], tmp_path, size="smoke", progress=False)
    pd.testing.assert_frame_equal(again.table, outcome.table, check_exact=True)
