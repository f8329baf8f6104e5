"""The experiment caches: its passes are the model's, its comparisons follow from its table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import hooks
from hooks.model import encode
from qkvnorm_lens.experiments.beyond.caches import measure, words
from qkvnorm_lens.experiments.beyond.caches.passes import Watched
from qkvnorm_lens.experiments.core import Amount, find_subjects, reading
from qkvnorm_lens.training.texts import held_out_tokens
from tests.support import models

FORMATS = ("fp8-e4m3", "quanto-int2 group=8", "q4_0")


@pytest.fixture(scope="module")
def watched() -> Watched:
    model = models.tiny_llama()
    prompts = encode(model, models.tokens(3, 16))
    return Watched(model, list(hooks.attention_sites(model)), prompts, FORMATS)


def test_formats_that_refuse_the_heads_are_left_out(watched: Watched) -> None:
    assert watched.formats == FORMATS[:2]


def test_passes_that_begin_at_a_layer_give_what_whole_ones_give(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = watched.isolated()
    monkeypatch.setattr(watched, "_streams", lambda clean: None)
    whole = watched.isolated()
    assert short.keys() == whole.keys()
    for at, nats in short.items():
        np.testing.assert_array_equal(nats, whole[at])
        assert nats.shape == watched.positions.shape == (3,)
        assert (nats > 0).all()
    assert watched.seconds > 0


def test_the_risk_and_isolated_kl_agree_on_layers_that_differ(watched: Watched) -> None:
    """Within a factor of two, keys and values of both layers, under 8 bits."""
    ids = models.tokens(3, 16)
    report = hooks.cache_risk(watched.model, ids, formats=FORMATS[:1], samples=16, progress=False)
    frame, isolated = report.to_frame("layer"), watched.isolated()
    for i in range(2):
        for role in ("k", "v"):
            nats = isolated[FORMATS[0], i, role].sum() / watched.positions.sum()
            ratio = frame[f"risk_{role}"][i] / nats
            assert 0.5 < ratio < 2


def test_gradients_and_entropy_are_finite(watched: Watched) -> None:
    assert all(np.isfinite(g) and g > 0 for g in watched.gradients().values())
    assert ((watched.entropy() >= 0) & (watched.entropy() <= np.log(16))).all()


def table(kl: dict[str, list[float]]) -> pd.DataFrame:
    """Two layers with known ranks, and recipes with these KLs on three prompts."""
    rows: list[dict[str, Any]] = []
    for layer, isolated in enumerate((1.0, 2.0, 3.0, 4.0)):
        for role in ("k", "v"):
            own = dict.fromkeys(measure.PREDICTORS, isolated) | {"score": -isolated}
            own |= {"even": isolated, "odd": (isolated - 2) ** 2}
            each = {"layer": layer, "format": "q4_0", "role": role, "isolated": isolated}
            rows.append({"what": "layer", **each, **own})
    for choice, values in kl.items():
        for prompt, value in enumerate(values):
            own = {"choice": choice, "budget": 4.5, "bits": 4.5, "prompt": prompt}
            rows.append({"what": "recipe", **own, "kl": value, "agreement": 1 - value})
    rows.append({"what": "seconds", "risk": 1.0, "more": 2.0, "isolated": 30.0})
    return pd.DataFrame(rows).assign(model="m", group="m", placement="", seed=0)


KL = {
    "risk": [0.10, 0.20, 0.30],
    "isolated": [0.11, 0.19, 0.31],
    "uniform": [0.30, 0.42, 0.50],
    "random 1": [0.2, 0.3, 0.2],
    "random 2": [0.4, 0.5, 0.4],
    "mse": [0.05, 0.14, 0.26],
    "entropy": [0.10, 0.20, 0.30],
}


def test_ranks_are_those_of_the_layers() -> None:
    found = measure.rank_correlations(table(KL)).iloc[0]
    assert found["risk"] == pytest.approx(1)
    assert found["score"] == pytest.approx(-1)
    assert found["ratio"] == pytest.approx(1)
    assert found["halves"] == pytest.approx(3 / 22.5**0.5)  # ranks 1, 2, 3, 4 and 2.5, 1, 2.5, 4


def test_recipes_are_compared_prompt_by_prompt() -> None:
    judged = measure.against(table(KL), "m", 4.5).set_index("choice")
    assert judged.loc["uniform", "more_kl"] == pytest.approx((0.20 + 0.22 + 0.20) / 3)
    assert judged.loc["random", "kl"] == pytest.approx(1 / 3)  # its draws are one choice
    assert judged.loc["mse", "less_agreement"] == pytest.approx(-0.05)
    assert judged.loc["uniform", "more_kl_half"] > 0
    assert judged.loc["risk", "more_kl"] == 0


def test_the_words_name_lost_and_undecided_cases() -> None:
    said = words.text(table(KL))
    assert "lower KL than 3 of 5 others; is the same as that of entropy; has higher KL than" in said
    assert (
        "higher KL than mean square error; over prompts it is not decided against isolated" in said
    )
    assert "8 gradients, errors of rows included: 2 s. It ranks layers as isolated KL" in said
    few, more = words.claims(table(KL))
    assert (few.same, more.same) == ("yes", "in part")  # right, but 15 times cheaper, not 20
    assert "in 1 of 1 formats (1.00 to 1.00); isolated KL takes 30 times as long" in few.ours
    wrong = table(KL)
    wrong["more"] = -wrong["more"].where(wrong["what"] == "layer", -wrong["more"])
    assert [claim.same for claim in words.claims(wrong)] == ["yes", "no"]


def test_windows_lie_evenly_over_the_held_out_books() -> None:
    (subject,) = find_subjects(["language-pre-1"])
    few, more, all_ = (
        reading(subject, Amount(1, n, 32, books=True)).ids for n in (3, 9, 1_000_000)
    )
    assert few == more[1::3]  # the middles of thirds are those of every third ninth
    assert {len(ids) for ids in all_} == {32}
    assert {ids[0] for ids in all_} == {0}  # each begins with <s>
    text = held_out_tokens()
    assert len(all_) == pytest.approx(len(text) / 31, rel=0.02)
    assert all_[0][1:] == text[:31].tolist()
    at = all_.index(few[1])
    assert at == len(all_) // 2
    assert Amount(1, 3, 32).settings(subject) == {"windows": 3, "length": 32}
    assert Amount(1, 3, 32, books=True).settings(subject)["text"] == "held-out books"
