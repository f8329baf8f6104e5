"""The experiments language and atlas, and the rows that both measure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.atlas import EXPERIMENT as ATLAS, measure as atlas
from qkvnorm_lens.experiments.beyond.language import (
    EXPERIMENT as LANGUAGE,
    measure as language,
    words,
)
from qkvnorm_lens.experiments.core import running, traits
from qkvnorm_lens.experiments.core.subjects import find_subjects
from qkvnorm_lens.models import QKVNormTransformer, load_model, named_config, to_bridge
from qkvnorm_lens.models.config import NormSpec
from qkvnorm_lens.training import held_out
from tests.support import models
from tests.support.paths import RESULTS


def ours(placement: str, **changes: Any) -> Any:
    """A language model of random weights, large enough for sparse rows."""
    config = named_config("language", placement, n_layers=2, initializer_range=0.3, **changes)
    return to_bridge(QKVNormTransformer(config).eval())


def value(
    rows: list[traits.Row], quantity: str, layer: int = -1, variant: str = core.PLAIN
) -> float:
    table = pd.DataFrame(rows)
    (found,) = core.pick(table, quantity=quantity, layer=layer, variant=core.PLAIN)["value"]
    return float(found)


def test_sparse_rows_and_sinks_are_those_of_the_pattern() -> None:
    """Counted from the pattern of one plain pass: the first row of a prompt has one key."""
    model, ids = models.tiny_llama(), models.tokens(4, 20)
    rows = list(traits.collapse_rows(model, ids.tolist()))
    _, cache = model.run_with_cache(ids)
    every, sparse, sinks = 0, 0, 0
    for layer in range(model.cfg.n_layers):
        top, at = cache[f"blocks.{layer}.attn.hook_pattern"][:, :, 1:].max(-1)
        chosen = top >= 0.95
        every, sparse = every + top.numel(), sparse + int(chosen.sum())
        sinks += int((chosen & (at == 0)).sum())
        assert value(rows, "sparse share", layer) == int(chosen.sum()) / top.numel()
    assert 0 < sinks < sparse
    assert value(rows, "sparse share") == sparse / every
    assert value(rows, "sink share") == pytest.approx(sinks / sparse)


def test_rates_by_layer_add_up_to_the_models() -> None:
    rows = list(traits.collapse_rows(models.tiny_llama(), models.tokens(4, 20).tolist()))
    table = pd.DataFrame(rows)
    whole = core.pick(table, quantity="loose", variant=core.PLAIN, layer=-1, at=traits.SIGMA)
    layers = traits.by_layer(table.assign(model="m"), "loose").set_index("layer")["value"]
    shares = traits.by_layer(table.assign(model="m"), "sparse share").set_index("layer")["value"]
    assert len(layers) == len(shares) > 1
    assert float((layers * shares).sum() / shares.sum()) == pytest.approx(whole["value"].iloc[0])


def test_norms_are_read_from_the_model() -> None:
    ids = models.tokens(1, 12).tolist()
    cases: list[tuple[Any, tuple[str, ...]]] = [
        (models.tiny_llama(), ("RMSNorm", "none", "none", "none")),
        (models.tiny_gpt2(), ("LayerNorm", "none", "none", "none")),
        (models.tiny_qwen3(), ("RMSNorm", "per head", "per head", "none")),
        (ours("none"), ("none", "none", "none", "none")),
        (ours("pre"), ("RMSNorm", "none", "none", "none")),
        (ours("qkv", norm=NormSpec(on="qk")), ("none", "per head", "per head", "none")),
        (ours("qkv"), ("none", "per head", "per head", "per head")),
        (ours("qkv", norm=NormSpec(over="projection")), ("none", *["all heads"] * 3)),
    ]
    for model, wanted in cases:
        found = atlas.norms_of(model, traits.norm_before(model, ids))
        assert tuple(found.values()) == wanted, model.cfg.model_name
    some = atlas.norms_of(models.tiny_llama(), {0: "RMSNorm"})
    assert some["before"] == f"RMSNorm in 1 of {models.tiny_llama().cfg.n_layers} layers"


def test_interference_is_measured_where_a_norm_is() -> None:
    ids = held_out(24, 3).tokens.tolist()
    pre, bare = ours("pre"), ours("none")
    assert not list(traits.interference_rows(bare, ids, list(traits.norm_before(bare, ids))))
    rows = list(traits.interference_rows(pre, ids, list(traits.norm_before(pre, ids))))
    variants = {row["variant"] for row in rows}
    assert variants == {core.PLAIN, "first token spared", "independent noise"}
    assert {row["layer"] for row in rows} == {-1, 0, 1}


def test_a_difference_is_taken_by_seed() -> None:
    """A seed that only one placement has tells nothing of the difference."""
    rows = [
        {"placement": placement, "seed": seed, "value": x}
        for placement, numbers in {"pre": (1.0, 5.0, 9.0), "qkv": (0.9, 4.7)}.items()
        for seed, x in enumerate(numbers)
    ]
    table = pd.DataFrame(rows).assign(quantity="loss", variant="-", at=0.0, layer=-1)
    found = words.gap(table, "pre", "qkv", "loss")
    assert found.n == 2
    assert found.value == pytest.approx(0.2)
    assert found.half == pytest.approx(12.706 * 0.1, rel=1e-3)  # t of one degree of freedom


def test_without_models_the_command_that_makes_them_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(language, "trained", lambda prefix: {})
    with pytest.raises(ValueError, match=r"language: wanted trained models language-\*; got none"):
        LANGUAGE.parts((), "full")


def test_language_models_are_known_by_placement_and_kind() -> None:
    found = find_subjects(["language"])
    assert {s.kind for s in found} == {"language"}
    assert {s.placement for s in found} == set(language.CELLS)
    assert all(s.group == f"language-{s.placement}" for s in found)
    assert all(s.sums is None for s in found)
    smoke, quick, full = (LANGUAGE.parts((), size) for size in ("smoke", "quick", "full"))
    assert [part.key for part in smoke] == ["language-pre-1", "language-qkv-1"]
    assert [part.key for part in quick] == [f"language-{cell}-1" for cell in language.CELLS]
    assert {part.key for part in full} == {s.name for s in found}


def test_language_models_learned_more_than_triples_of_tokens() -> None:
    """From their cards; nothing but the place of the norm, and the seed, differs in these."""
    from qkvnorm_lens.models import read_card

    runs = []
    for subject in find_subjects(["language"]):
        assert subject.path is not None
        card = read_card(subject.path / "card.json")
        held = card["accuracy"]["held out"]
        assert held["held_out"] < held["3-gram"] < held["2-gram"] - 0.5 < held["1-gram"]
        run = card["run"]
        for name in ("placement", "norm", "seed"):
            run["config"].pop(name)
        run.pop("seed")
        runs.append(run)
    assert all(run == runs[0] for run in runs)


def test_smoke_of_atlas_on_one_of_each_kind() -> None:
    subjects = find_subjects(["addition-qkv", "language-pre-1"])
    table = pd.concat([part.work() for part in ATLAS.parts(subjects, "smoke")])
    said = ATLAS.text(table)
    assert "| addition-qkv | none | per head | per head | per head |" in said
    assert "| language-pre-1 | RMSNorm | none | none | none |" in said
    assert ATLAS.figure(table).axes


@pytest.mark.slow
def test_numbers_of_the_language_results_are_made_again() -> None:
    """One model's part; its loss and its sparse share by plain passes too."""
    held = running.read_table(RESULTS / "language" / "language")
    (part,) = (p for p in LANGUAGE.parts((), "full") if p.key == "language-qkv-1")
    made = part.work().reset_index(drop=True)
    mine = held[held["model"] == "language-qkv-1"].reset_index(drop=True)
    keys = ["quantity", "variant", "layer", "at"]
    assert made[keys].equals(mine[keys])
    # Another processor rounds otherwise: a row at a threshold may change sides.
    np.testing.assert_allclose(made["value"], mine["value"], rtol=4e-3, atol=2e-4)

    model, windows = load_model("language-qkv-1"), held_out(128)
    with torch.no_grad():
        loss = [
            torch.nn.functional.cross_entropy(
                model(tokens).flatten(0, 1), wanted.flatten(), reduction="sum"
            )
            for tokens, wanted in zip(
                windows.tokens.split(64), windows.targets.split(64), strict=True
            )
        ]
    by_hand = float(sum(loss)) / windows.targets.numel()
    assert traits.whole(mine, "loss").iloc[0] == pytest.approx(by_hand, abs=1e-4)
    _, cache = model.run_with_cache(held_out(128, 64).tokens)
    top = cache["blocks.2.attn.hook_pattern"][:, :, 1:].amax(-1)
    share = core.pick(mine, quantity="sparse share", layer=2)["value"].iloc[0]
    assert share == pytest.approx(float((top >= 0.95).float().mean()), abs=1e-4)


def test_what_is_called_a_share_is_one() -> None:
    """Every quantity of that name is in the table, and no number of it is outside 0 and 1."""
    table = running.read_table(RESULTS / "language" / "language")
    for quantity in traits.SHARES:
        values = core.pick(table, quantity=quantity)["value"].dropna()
        assert len(values), quantity
        assert values.between(0, 1).all(), quantity
    assert all(words.of(table, quantity).of_shares for quantity in traits.SHARES)
    assert not words.of(table, "score level").of_shares
