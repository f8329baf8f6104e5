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
    assert short == watched.isolated()
    assert min(short.values()) > 0
    assert watched.seconds > 0


def test_the_risk_and_isolated_kl_agree_on_layers_that_differ(watched: Watched) -> None:
    """Within a factor of two, keys and values of both layers, under 8 bits."""
    ids = models.tokens(3, 16)
    report = hooks.cache_risk(watched.model, ids, formats=FORMATS[:1], samples=16, progress=False)
    frame, isolated = report.to_frame("layer"), watched.isolated()
    for i in range(2):
        for role in ("k", "v"):
            ratio = frame[f"risk_{role}"][i] / isolated[FORMATS[0], i, role]
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
