"""The noise experiment: what is noised and scored, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from qkvnorm_lens.experiments.core.base import Subject
from qkvnorm_lens.experiments.core.running import read_table, run_experiment
from qkvnorm_lens.experiments.core.subjects import find_subjects
from qkvnorm_lens.experiments.paper.noise import (
    EXPERIMENT as NOISE,
    figure as noise_figure,
    measure as noise,
    rows as noise_rows,
    words as noise_words,
)
from qkvnorm_lens.training.addition import PAD, draw
from qkvnorm_lens.training.run import evaluate
from tests.support import models
from tests.support.watching import shape_checks_off

SMALL = noise.Scale(sums=12, windows=1, length=16, sigmas=(0.01, 0.5), draws=2)
PRE, QKV = find_subjects(["addition-pre", "addition-qkv"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("noise")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(noise.SCALES, "smoke", SMALL)
        with shape_checks_off():
            outcome = run_experiment(NOISE, [PRE, QKV], out, size="smoke", progress=False)
    return outcome.folder


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return read_table(folder)


def clean(table: pd.DataFrame, model: str, scored: str) -> pd.DataFrame:
    mine = table[(table["model"] == model) & (table["scored"] == scored)]
    return mine[mine["sigma"] == 0]


@pytest.mark.parametrize("subject", [PRE, QKV], ids=lambda s: s.name)
def test_clean_accuracy_is_that_of_the_same_sums(table: pd.DataFrame, subject: Subject) -> None:
    """Against training's own count, with `]` and without, under every condition."""
    wanted = evaluate(subject.load(), subject.split, rows=SMALL.sums, seed=noise.SEED)
    for scored, accuracy in (
        (noise.ALL, wanted.per_token),
        (noise.WITHOUT_END, wanted.per_token_without_end),
    ):
        rows = clean(table, subject.name, scored)
        assert len(rows) >= 7
        np.testing.assert_allclose(rows["accuracy"], accuracy, rtol=1e-12)
        assert (rows["kl"] == 0).all()
    ends = clean(table, subject.name, noise.ALL)["positions"].iloc[0]
    assert ends - clean(table, subject.name, noise.WITHOUT_END)["positions"].iloc[0] == SMALL.sums


def test_noise_before_the_norm_is_taken_away(table: pd.DataFrame) -> None:
    """QKV-Norm, theorem of its construction; Pre-Norm has no such norm, and no such rows."""
    before = noise.SHIELDED.of(table)
    assert set(before["model"]) == {QKV.name}
    assert before["kl"].max() < 1e-2
    behind = noise_rows.EVERY.of(table)
    worst = behind[(behind["model"] == QKV.name) & (behind["sigma"] == 0.5)]
    assert worst["kl"].min() > 100 * before["kl"].max()
    shields = table.groupby("model")["shield"].unique().map(list).to_dict()
    assert shields == {PRE.name: ["none"], QKV.name: ["removed"]}


def test_shares_of_rows(table: pd.DataFrame) -> None:
    """Against patterns of TransformerLens's own cache, prompt by prompt, unpadded."""
    model = PRE.load()
    counts = {"all": [0, 0], "sparse": [0, 0], "non-sparse": [0, 0]}
    for ids in draw(PRE.split, SMALL.sums, seed=noise.SEED).tokens:
        _, cache = model.run_with_cache(ids[ids != PAD][None])
        for layer in range(model.cfg.n_layers):
            for row in cache[f"blocks.{layer}.attn.hook_pattern"][0, :, 1:].flatten(0, 1):
                kinds = ["all"] + ["sparse"] * (row.max() >= 0.95)
                for kind in kinds + ["non-sparse"] * (row.max() < 0.7):
                    counts[kind][0] += 1
                    counts[kind][1] += int(row.argmax() == 0)
    mine = table[table["model"] == PRE.name]
    for kind, (n, first) in counts.items():
        rows = mine[mine["rows"] == kind]
        assert n > 0
        np.testing.assert_allclose(rows["share"], n / counts["all"][0])
        np.testing.assert_allclose(rows["share_first"], first / n)


def test_rows_that_are_noised_and_those_that_are_not(table: pd.DataFrame) -> None:
    """Noise on fewer rows of the same factors moves the output less, at small sigma."""
    mine = noise_rows.main_targets(table)
    mine = mine[mine["sigma"] == 0.01]
    kl = {c: c.of(mine).groupby("model")["kl"].first() for c in noise.ROWS}
    for name in (PRE.name, QKV.name):
        assert 0 < kl[noise_rows.SPARSE_ROWS][name] < kl[noise_rows.ANY_ROWS][name]
        assert 0 < kl[noise_rows.OTHER_ROWS][name] < 2 * kl[noise_rows.ANY_ROWS][name]


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_qwen3])
def test_language_models(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next tokens; norms on q and k alone shield a part, which is said."""
    model = build()
    tokens = models.tokens(3, 12).tolist()
    monkeypatch.setattr(Subject, "load", lambda self: model)
    monkeypatch.setattr(noise, "prompts_of", lambda *given: (tokens, {noise.NEXT: None}))
    subject = Subject("tiny", "language", None, "", "tiny", None, "0")
    table = pd.concat([noise.of_vectors(subject, SMALL), noise.of_rows(subject, SMALL)])
    shielded = build is models.tiny_qwen3
    assert len(noise.SHIELDED.of(table)) == 3 * shielded
    assert set(table["shield"]) == {"removed" if shielded else "none"}
    assert (table["positions"] == 3 * 11).all()
    noisy = noise_rows.EVERY.of(table).query("sigma == 0.5")
    with torch.no_grad():
        logits = model(torch.tensor(tokens))[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(tokens)[:, 1:].flatten()
    )
    rows = table[table["sigma"] == 0]
    np.testing.assert_allclose(rows["loss"], float(loss), rtol=1e-5)
    assert (noisy["kl"] > 0.1).all()
    assert "Next-token loss" in noise_words.text(table)
    assert noise_words.claims(table) == []
    assert len(noise_figure.figure(table).axes) == 2


# -- reading a table ------------------------------------------------------------------------


def curve(
    group: str, placement: str, falls: dict[str, list[float]], condition: noise_rows.Condition
) -> list[dict[str, Any]]:
    """Rows of models (by name) whose accuracy at sigma = 0, 0.01, 0.1 is given."""
    rows = []
    for seed, (model, accuracies) in enumerate(falls.items()):
        lost = [s for s, a in zip((0, 0.01, 0.1), accuracies, strict=True) if a <= 0.9]
        for sigma, accuracy in zip((0.0, 0.01, 0.1), accuracies, strict=True):
            rows.append(
                {
                    "model": model,
                    "group": group,
                    "placement": placement,
                    "seed": seed,
                    "on": condition.on,
                    "at": condition.at,
                    "rows": condition.rows,
                    "scored": noise.ALL,
                    "shield": "removed" if placement == "qkv" else "none",
                    "share": 0.25,
                    "share_first": math.nan,
                    "prompts": 3,
                    "sigma_lost": lost[0] if lost else math.inf,
                    "sigma": sigma,
                    "positions": 100,
                    "accuracy": accuracy,
                    "se_draws": 0.0,
                    "se_prompts": 0.01 if sigma else 0.0,
                    "loss": 0.0,
                    "kl": 0.0,
                    "top1_agreement": 1.0,
                }
            )
    return rows


def named(*curves: list[float]) -> dict[str, list[float]]:
    return {f"study-pre-{i}": accuracies for i, accuracies in enumerate(curves, 1)}


def test_kept_is_relative_with_an_interval_over_seeds_or_prompts() -> None:
    every = noise_rows.EVERY
    one = pd.DataFrame(curve("study-pre", "pre", named([0.8, 0.4, 0.2]), every))
    share = noise_rows.kept_mean(one, 0.01)
    assert share.value == pytest.approx(0.5)
    assert share.half == pytest.approx(4.303 * 0.01 / 0.8, rel=1e-3)  # t of three prompts
    two = pd.DataFrame(curve("study-pre", "pre", named([0.8, 0.4, 0.2], [1.0, 0.7, 0.5]), every))
    share = noise_rows.kept_mean(two, 0.01)
    assert share.value == pytest.approx(0.6)
    apart, k = 12.706 * 0.1, (12.706 * 0.1) ** 2 / 0.24  # t of one degree of freedom; a share's
    assert share.half == pytest.approx((apart**2 + k**2 / 4) ** 0.5 / (1 + k), rel=1e-3)
    assert share.n == 2


def test_no_more_than_all_of_the_accuracy_is_kept() -> None:
    """Where noise happens to help, also in what a claim says is lost."""
    every = noise_rows.EVERY
    for curves in ([[0.8, 0.81, 0.2]], [[0.8, 0.81, 0.2], [0.8, 0.79, 0.2]]):
        rows = pd.DataFrame(curve("study-pre", "pre", named(*curves), every))
        kept = noise_rows.kept_mean(rows, 0.01)
        assert 0 <= kept.low <= kept.value <= kept.high <= 1
        lost = kept.rest
        assert 0 <= lost.low <= lost.value <= lost.high <= 1
        assert lost.half == pytest.approx(kept.half)


def test_sigma_at_which_a_tenth_is_lost_is_a_mean_or_a_bound() -> None:
    every = noise_rows.EVERY

    def said(*curves: list[float]) -> str:
        return noise_rows.lost_at(pd.DataFrame(curve("study-pre", "pre", named(*curves), every)))

    assert said([1.0, 0.99, 0.95]) == "> 10"
    assert said([1.0, 0.8, 0.5]) == "1"
    assert said([1.0, 0.8, 0.5], [1.0, 0.95, 0.5]).startswith("5.5 ± ")
    assert said([1.0, 0.8, 0.5], [1.0, 0.99, 0.95]) == "1 to > 10"


def whole(placement: str, every: list[float], sparse: list[float], other: list[float]) -> Any:
    """A group of two seeds that hardly differ."""
    group = f"study-{placement}"
    rows: list[dict[str, Any]] = []
    for condition, values in (
        *((c, every) for c in noise.VECTORS),
        (noise_rows.ANY_ROWS, [min(a, b) for a, b in zip(sparse, other, strict=True)]),
        (noise_rows.SPARSE_ROWS, sparse),
        (noise_rows.OTHER_ROWS, other),
        *(((noise.SHIELDED, [1.0, 1.0, 1.0]),) if placement == "qkv" else ()),
    ):
        falls = {f"{group}-{i}": [values[0], *(v - 1e-3 * i for v in values[1:])] for i in (1, 2)}
        rows += curve(group, placement, falls, condition)
    return pd.DataFrame(rows)


def test_claims_follow_the_table() -> None:
    def same(table: pd.DataFrame) -> list[str]:
        return [claim.same for claim in noise_words.claims(table)]

    assert same(whole("pre", [1, 0.8, 0.2], [1, 1, 0.99], [1, 0.9, 0.3])) == ["yes", "yes"]
    assert same(whole("pre", [1, 0.99, 0.9], [1, 0.9, 0.3], [1, 1, 0.99])) == ["no", "no"]
    level = [1, 0.95, 0.5]
    assert same(whole("pre", [1, 0.99, 0.9], level, level)) == ["no", "not decided"]
    assert same(whole("qkv", [1, 0.9, 0.3], level, level)) == ["in part"]
    assert same(whole("qkv", [1, 0.99, 0.98], level, level)) == ["yes"]
    assert noise_words.claims(whole("none", [1, 0.9, 0.3], level, level)) == []


def test_rows_are_compared_where_noise_on_all_of_them_tells() -> None:
    """Where all rows together lose about a tenth; the largest sigma where nothing is lost."""

    def telling(*falls: float) -> float:
        return noise_rows.telling(whole("pre", [1, 0.8, 0.2], [1, 1, 1], [1, *falls]))

    assert telling(0.89, 0.3) == 0.01
    assert telling(0.92, 0.3) == 0.01
    assert telling(0.99, 0.85) == 0.1
    assert noise_rows.telling(whole("pre", [1, 0.8, 0.2], [1, 0.95, 1.0], [1, 0.95, 1.0])) == 0.01


def test_words_and_figure_come_from_the_table(folder: Path, table: pd.DataFrame) -> None:
    text = noise_words.text(table)
    assert text.rstrip() == (folder / "text.md").read_text().rstrip()
    for row in ("| addition-pre | 1 | with ] |", "| addition-qkv | 1 | without ] |"):
        assert row in text
    assert "Before the norm on q, k and v (noise removed there)" in text
    assert len(noise_figure.figure(table).axes) == 4
