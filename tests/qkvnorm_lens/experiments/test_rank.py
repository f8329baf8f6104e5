"""The experiments masks and rank: what they run, what they read out of their tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hooks
from qkvnorm_lens.experiments.core import running
from qkvnorm_lens.experiments.core.base import Subject
from qkvnorm_lens.experiments.core.digest import digest_of
from qkvnorm_lens.experiments.core.read import Amount, Reading, reading
from qkvnorm_lens.experiments.core.subjects import find_subjects
from qkvnorm_lens.experiments.core.verdict import Finding
from qkvnorm_lens.experiments.related.masks import (
    EXPERIMENT as MASKS,
    figure as masks_figure,
    measure as masks,
    words,
    words as masks_words,
)
from qkvnorm_lens.experiments.related.rank import (
    EXPERIMENT as RANK,
    figure as rank_figure,
    measure as rank,
    words as rank_words,
)
from qkvnorm_lens.models.bridge import from_pretrained
from tests.support import models

ids = models.tokens(3, 17).tolist()


# -- masks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> running.Outcome:
    """A run of two seeds and few layers."""
    patch = pytest.MonkeyPatch()
    patch.setitem(masks.SCALES, "smoke", masks.Scale((1, 2), 24, 40))
    out = tmp_path_factory.mktemp("masks")
    try:
        return running.run_experiment(MASKS, [], out, size="smoke", progress=False)
    finally:
        patch.undo()


def test_a_table_from_disk_says_the_same(outcome: running.Outcome) -> None:
    back = running.read_table(outcome.folder)
    assert masks_words.text(back) == outcome.text
    assert masks_words.claims(back) == masks_words.claims(outcome.table)
    assert "nan" not in outcome.text
    assert (outcome.folder / "figure.png").stat().st_size > 20_000
    masks_figure.figure(back)


def test_no_run_exceeds_its_bound(outcome: running.Outcome) -> None:
    violated = outcome.table["violated"].dropna()
    assert len(violated) > 20
    assert (violated == 0).all()


def test_parts_are_the_same_again() -> None:
    scale = masks.Scale((1,), 12, 12)
    for work in (lambda: masks.measure("MLP", ("causal",), scale), lambda: masks.held(scale)):
        pd.testing.assert_frame_equal(work(), work(), check_exact=True)


@pytest.mark.parametrize("setting", ["attention", "MLP", "residual", "RMSNorm"])
def test_random_weights_have_the_scale_that_is_said(setting: str) -> None:
    made = masks.dynamics_of("complete", setting, 3, 40)
    from qkvnorm_lens.theory.dynamics import unit_tokens

    x = unit_tokens(words.N, words.D, 5)
    scores = (x @ made.w_q) @ (x @ made.w_k).mT / math.sqrt(words.D)
    assert float(scores.std()) == pytest.approx(1, rel=0.1)
    if made.mlp is not None:
        w1, w2 = made.mlp
        after = ((x @ w1).relu() @ w2).norm(dim=1).square().mean()
        assert float(after) == pytest.approx(1, rel=0.25)


def test_the_rate_of_even_attention() -> None:
    assert masks.even_rate(masks.mask_of("causal", 6)) == pytest.approx(math.log(2))
    assert masks.even_rate(masks.mask_of("complete", 6)) == words.EVEN_MOST
    assert masks.even_rate(masks.mask_of("two parts", 6)) == pytest.approx(0, abs=1e-12)


def synthetic(rates: list[float], ends: list[float], off: float = 0.1) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "row": "run",
            "setting": "attention",
            "mask": "causal",
            "seed": range(len(rates)),
            "rate": rates,
            "off": off,
            "layers": 64,
            "reached": 5.0,
            "start": 1.0,
            "end": ends,
        }
    )


@pytest.mark.parametrize(
    ("rates", "ends", "wanted"),
    [
        ([0.5, 0.51, 0.52], [0.2, 0.2, 0.2], True),
        ([0.5, 0.01, 2.0], [0.2, 0.2, 0.2], None),
        ([0.5, -0.01, 2.0], [0.2, 0.2, 0.2], False),
        ([math.nan, math.nan], [1e-9, 1e-9], True),  # gone before a line could be drawn
        ([0.5], [0.2], None),
    ],
)
def test_what_counts_as_collapse(rates: list[float], ends: list[float], wanted: Finding) -> None:
    assert words.collapses(synthetic(rates, ends), "attention", "causal") is wanted


def test_a_rate_is_given_only_where_the_line_fits() -> None:
    fits = synthetic([0.5, 0.51, 0.52], [1e-9] * 3, off=0.1)
    bent = fits.assign(off=[0.1, 0.1, 4.1])  # one seed is enough
    fast = fits.assign(rate=math.nan, off=math.nan)
    assert words.speed(fits, "attention", "causal").startswith("0.51 ± ")
    for table in (bent, fast):
        assert words.speed(table, "attention", "causal") == "not exponential"
        assert words.collapses(table, "attention", "causal") is True  # gone, which is not the same
    said = words.counts(bent, "attention", ["causal"])
    assert "1 of 1 masks collapse, not exponential: causal" in said
    assert "(off a line by up to 4.1 nats, gone after 5 layers)" in said
    assert "too fast for a line" in words.counts(fast, "attention", ["causal"])
    assert "not exponential" not in words.counts(fits, "attention", ["causal"])


# -- rank -------------------------------------------------------------------------------------


def test_the_start_of_our_models_is_that_of_their_training() -> None:
    """Drawn from the model's own seed, and not what a module holds before its weights are read."""
    from qkvnorm_lens.models.bridge import to_plain
    from qkvnorm_lens.models.model import QKVNormTransformer

    starts = []
    for name in ("study-pre-1", "study-pre-2"):
        (subject,) = find_subjects([name])
        start = rank.at_start(subject)
        assert start is not None
        cfg = to_plain(from_pretrained(str(subject.path))).cfg
        cfg.init_weights = True
        wanted = QKVNormTransformer(cfg).state_dict()
        found = to_plain(start).state_dict()
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
        starts.append(found["tok_embed.weight"])
    assert not torch.equal(*starts)


def test_rows_are_the_profiles_own() -> None:
    (subject,) = find_subjects(["addition-qkv"])
    amount = Amount(sums=6, windows=1)
    table = rank.measure(subject, amount)
    report = hooks.rank_profile(subject.load(), reading(subject, amount).ids, progress=False)
    for first in (True, False):
        mine = table[(table["state"] == "trained") & (table["first"] == int(first))]
        wanted = report.to_frame(without_first=not first)
        np.testing.assert_allclose(mine["mu"], wanted["mu"], rtol=1e-5)
        np.testing.assert_allclose(mine["mean_cosine"], wanted["mean_cosine"], rtol=1e-4)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rank.AMOUNT, "smoke", Amount(sums=8, windows=1))


@pytest.mark.slow
@pytest.mark.usefixtures("little")
def test_a_run_on_our_models_is_read_back_and_says_the_same(tmp_path: Path) -> None:
    names = ["addition-pre", "study-pre-1", "study-pre-2", "study-qkv-1", "study-qkv-2"]
    subjects = find_subjects(names)
    outcome = running.run_experiment(RANK, subjects, tmp_path, size="smoke", progress=False)
    assert list(outcome.table.columns[:4]) == ["model", "group", "placement", "seed"]
    assert set(outcome.table["state"]) == set(rank.STATES)
    back = running.read_table(outcome.folder)
    assert rank_words.text(back) == outcome.text
    assert rank_words.claims(back) == rank_words.claims(outcome.table) == []
    # One pair of placements, two measures, two states.
    assert "These are 4 comparisons at 95% each" in outcome.text
    assert "(Bonferroni, 98.75%)" in outcome.text
    assert "Pre-Norm minus QKV-Norm (study models, trained, 2 and 2 seeds)" in outcome.text
    assert "nan" not in outcome.text
    rank_figure.figure(back)


@pytest.mark.usefixtures("little")
def test_a_model_without_a_directory_has_no_start_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.tiny_qwen3()
    monkeypatch.setattr(Subject, "load", lambda self: model)
    monkeypatch.setattr(rank, "reading", lambda subject, amount: Reading(ids, ids))
    nobody = Subject("tiny", "language", None, "", "tiny", None, "0")
    outcome = running.run_experiment(RANK, [nobody], tmp_path, size="smoke", progress=False)
    back = running.read_table(outcome.folder)
    assert rank_words.text(back) == outcome.text
    assert rank.NOT_BUILT in outcome.text
    assert [c.same for c in rank_words.claims(back)] == ["-"]
    rank_figure.figure(back)


def test_a_language_models_start_has_its_configuration(tmp_path: Path) -> None:
    plain = models.tiny_hf(models.LlamaForCausalLM, models.tiny_llama_config())
    plain.save_pretrained(tmp_path / "tiny")
    digest = digest_of(tmp_path / "tiny")
    subject = Subject("tiny", "language", tmp_path / "tiny", "", "tiny", None, digest)
    before = torch.get_rng_state()
    one, two = rank.at_start(subject), rank.at_start(subject)
    assert torch.equal(torch.get_rng_state(), before)
    assert one is not None
    assert two is not None
    tokens = torch.tensor(ids)
    with torch.no_grad():
        logits = one(tokens)
        assert torch.equal(logits, two(tokens))
        assert not torch.allclose(logits, plain(tokens).logits, atol=0.1)
    assert one.cfg.n_layers == plain.config.num_hidden_layers
    # transformers' own start: small weights, norms of one.
    weight: Any = one.original_model.model.layers[0].mlp.up_proj
    values = dict(weight.named_parameters())
    (matrix,) = (v for v in values.values() if v.ndim == 2)
    assert float(matrix.detach().std()) == pytest.approx(plain.config.initializer_range, rel=0.1)
