"""Recipes: the best within a budget, what engines can express of them, and text made with them."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, Fp8QuantizedLayer

from hooks import CacheRecipe, cache_risk
from hooks.measures.cache import TransformersFloat8, read_format
from hooks.measures.cache.mixed import MixedCache
from hooks.measures.cache.recipe import choose
from tests.support import models

FORMATS = ("fp8-e4m3", "quanto-int4 group=8", "quanto-int2 group=8")
options = st.dictionaries(
    st.sampled_from("abcd"),
    st.tuples(st.fractions(0, 8, max_denominator=4), st.floats(0, 9)),
    min_size=1,
)


@pytest.fixture(scope="module")
def report() -> Any:
    return cache_risk(models.tiny_llama(), models.tokens(4), formats=FORMATS, progress=False)


def recipe(keys: str, values: str, layers: tuple[int, ...] = (), **facts: Any) -> CacheRecipe:
    """Names separated by commas."""
    named = tuple(keys.split(",")), tuple(values.split(","))
    layers = layers or tuple(range(len(named[0])))
    return CacheRecipe("m", layers, *named, bits=8.0, risk=0.1, budget=8.0, **facts)


# -- the choice -------------------------------------------------------------------------------


@given(st.lists(options, min_size=1, max_size=5), st.fractions(0, 30, max_denominator=3))
def test_the_choice_is_the_best_of_all(items: Any, budget: Fraction) -> None:
    found = choose(items, budget)
    losses = [
        sum(item[name][1] for item, name in zip(items, names, strict=True))
        for names in itertools.product(*items)
        if sum(item[name][0] for item, name in zip(items, names, strict=True)) <= budget
    ]
    if found is None:
        assert not losses
        return
    taken = [item[name] for item, name in zip(items, found, strict=True)]
    assert sum(cost for cost, _ in taken) <= budget
    assert sum(loss for _, loss in taken) == pytest.approx(min(losses))


def test_a_recipe_keeps_its_budget_and_gains_with_it(report: Any) -> None:
    budgets = np.linspace(6, 16, 21)
    made = [report.recipe(float(bits)) for bits in budgets]
    assert all(r.bits <= r.budget for r in made)
    risks = [r.risk for r in made]
    assert risks == sorted(risks, reverse=True)
    assert risks[-1] == 0
    assert set(made[-1].keys) == {"full"}


def test_a_recipe_is_the_best_of_all_on_a_small_model(report: Any) -> None:
    """Two layers, keys and values, three formats: 81 choices, weighed one by one."""
    frame = report.to_frame("layer").set_index(["format", "layer"])
    for bits in (6.0, 6.7, 7.5, 8.0):
        best = report.recipe(bits, formats=FORMATS)
        losses = {}
        for names in itertools.product(FORMATS, repeat=4):
            cost = np.mean([read_format(n).bits("k", 8) for n in names])
            columns = [(n, i // 2, "kv"[i % 2]) for i, n in enumerate(names)]
            if cost <= bits:
                losses[names] = sum(frame.loc[n, i][f"risk_{role}"] for n, i, role in columns)
        assert best.risk == pytest.approx(min(losses.values()))
        chosen = tuple(itertools.chain(*zip(best.keys, best.values, strict=True)))
        assert losses[chosen] == pytest.approx(best.risk)


def test_keys_and_values_together(report: Any) -> None:
    made = report.recipe(7.0, together=True)
    assert made.keys == made.values
    assert made.risk >= report.recipe(7.0).risk


def test_too_few_bits_and_unknown_formats_are_named(report: Any) -> None:
    with pytest.raises(ValueError, match="bits: wanted 6 or more, for these formats; got 3"):
        report.recipe(3.0)
    with pytest.raises(ValueError, match=r"formats: wanted one of .*; got 'q4_0'"):
        report.recipe(8.0, formats=["q4_0"])


def test_a_file_gives_the_recipe(report: Any, tmp_path: Path) -> None:
    made = report.recipe(7.0)
    assert CacheRecipe.load(made.save(tmp_path / "recipe.json")) == made
    (tmp_path / "other.json").write_text('{"layers": [1]}')
    with pytest.raises(ValueError, match="path: wanted a recipe; got"):
        CacheRecipe.load(tmp_path / "other.json")
    written = json.loads((tmp_path / "recipe.json").read_text())
    for wrong in (
        {"layers": ["a", "b"]},
        {"layers": [0, 0]},
        {"bits": "x"},
        {"widths": [["y", 1]]},
    ):
        (tmp_path / "other.json").write_text(json.dumps(written | wrong))
        with pytest.raises(ValueError, match="path: wanted a recipe; got"):
            CacheRecipe.load(tmp_path / "other.json")
    old = {k: v for k, v in written.items() if k not in ("attentions", "widths")}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert CacheRecipe.load(tmp_path / "old.json").keys == made.keys


# -- what engines can express -----------------------------------------------------------------


def test_exports() -> None:
    made = recipe("full,fp8-e4m3,fp8-e4m3,full", "full,fp8-e4m3,fp8-e4m3,full")
    said = "--kv-cache-dtype fp8_e4m3 --kv-cache-dtype-skip-layers 0 3"
    assert made.export("vllm") == said
    assert made.layer_lists() == {("full", "full"): (0, 3), ("fp8-e4m3", "fp8-e4m3"): (1, 2)}
    assert recipe("full", "full").export("vllm") == "--kv-cache-dtype auto"
    assert recipe("q8_0,q8_0", "q4_0,q4_0").export("llama.cpp") == "-ctk q8_0 -ctv q4_0"
    made = recipe("q8_0,q4_0,q4_0,full", "q4_0,q4_0,q5_0 rotated=False,q5_0 rotated=False")
    ends = "-ctk q4_0 -ctk-first q8_0,1 -ctk-last f16,1 -khad -ctv q4_0 -ctv-last q5_0,2 -vhad"
    assert made.export("ik_llama.cpp") == ends
    made = recipe("kivi-int4,quanto-int2", "hqq-int8,kivi-int2")
    assert yaml.safe_load(made.export("kvtuner")) == {
        0: {"nbits_key": 4, "nbits_value": 8},
        1: {"nbits_key": 2, "nbits_value": 2},
    }


@pytest.mark.parametrize(
    ("engine", "keys", "values", "says"),
    [
        ("vllm", "q8_0", "q8_0", "one float8 format of scale 1 .* got q8_0"),
        ("vllm", "fp8-e4m3,fp8-e5m2", "full,full", "one float8 format"),
        ("vllm", "fp8-e4m3", "full", "alike .together=True.*fp8-e4m3 and full in layer 0"),
        ("llama.cpp", "q8_0,q4_0", "q4_0,q4_0", "one type for the keys .* got q8_0 and q4_0"),
        ("ik_llama.cpp", "q8_0,q4_0,q8_0,q4_0", "q4_0,q4_0,q4_0,q4_0", "a first, a middle"),
        ("ik_llama.cpp", "q8_0,kivi-int4", "q8_0,q8_0", "got kivi-int4 in layer 1"),
        ("kvtuner", "kivi-int4", "full", "integers of 2, 4 or 8 bits .* got full in layer 0"),
        ("sglang", "full", "full", "engine: wanted one of"),
    ],
)
def test_what_an_engine_lacks_is_named(engine: str, keys: str, values: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        recipe(keys, values).export(engine)


def test_layers_that_were_not_measured_stay_in_full_precision() -> None:
    """As in the cache that the recipe makes."""
    found = cache_risk(
        models.tiny_llama(), models.tokens(2), formats=["fp8-e4m3"], layers=[1], progress=False
    )
    made = found.recipe(8.0, together=True)
    assert made.layers == (1,)
    assert made.attentions == (0, 1)
    said = "--kv-cache-dtype fp8_e4m3 --kv-cache-dtype-skip-layers 0"
    assert made.export("vllm") == said
    some = {"layers": (0, 1), "attentions": (0, 1, 2, 3)}
    ends = recipe("q8_0,q8_0", "q4_0,q4_0", **some).export("ik_llama.cpp")
    assert ends == "-ctk q8_0 -ctk-last f16,2 -khad -ctv q4_0 -ctv-last f16,2 -vhad"
    with pytest.raises(ValueError, match=r"one type for the keys of all layers.* q8_0 and f16"):
        recipe("q8_0,q8_0", "q4_0,q4_0", **some).export("llama.cpp")
    with pytest.raises(ValueError, match=r"integers of 2, 4 or 8 bits .* got full in layer 2"):
        recipe("kivi-int4,kivi-int4", "kivi-int4,kivi-int4", **some).export("kvtuner")


def test_a_rotation_that_is_not_the_engines_is_named() -> None:
    """ik_llama.cpp rotates whole heads, llama.cpp all heads of a multiple of 64."""

    def of(width: int, name: str = "q4_0") -> CacheRecipe:
        return recipe(name, name, widths=((width, width),))

    assert of(64).export("ik_llama.cpp") == "-ctk q4_0 -khad -ctv q4_0 -vhad"
    assert of(32).export("ik_llama.cpp") == "-ctk q4_0 -ctv q4_0"  # none was measured
    with pytest.raises(ValueError, match=r"values whose whole heads .* 64 of 128 channels"):
        of(128).export("ik_llama.cpp")
    with pytest.raises(ValueError, match=r"keys whose whole heads .* 64 of 192 channels"):
        of(192).export("ik_llama.cpp")
    plain = "q4_0 rotated=False"
    with pytest.raises(ValueError, match="keys that are rotated, as heads of 64 are"):
        of(64, plain).export("llama.cpp")
    assert of(32, plain).export("llama.cpp") == of(32).export("llama.cpp") == "-ctk q4_0 -ctv q4_0"
    assert of(64, plain).export("ik_llama.cpp") == "-ctk q4_0 -ctv q4_0"


# -- generating -------------------------------------------------------------------------------


def llama(width: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=width, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def generate(model: Any, cache: Any, n: int = 40) -> torch.Tensor:
    prompt = torch.arange(1, 9)[None]
    how = GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        out: torch.Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache,
            generation_config=how,
        )  # fmt: skip
    return out


def test_full_precision_generates_what_transformers_does() -> None:
    model, mixed, plain = llama(), MixedCache({}), DynamicCache()
    assert torch.equal(generate(model, mixed), generate(model, plain))
    for mine, other in zip(mixed.layers, plain.layers, strict=True):
        assert torch.equal(mine.stored()[0], other.keys)
        assert mine.get_seq_length() == other.get_seq_length()


def test_8_bit_floats_generate_what_transformers_own_layers_do() -> None:
    model = llama()
    theirs = Cache(layers=[Fp8QuantizedLayer() for _ in range(3)])
    form = TransformersFloat8()
    mine = MixedCache(dict.fromkeys(range(3), (form, form)))
    assert torch.equal(generate(model, mine), generate(model, theirs))
    for own, other in zip(mine.layers, theirs.layers, strict=True):
        assert torch.equal(own.stored()[0], other._dequantize(other._quantized_keys))
        assert torch.equal(own.stored()[1], other._dequantize(other._quantized_values))


@pytest.mark.parametrize("name", ["q4_0", "kivi-int2", "quanto-int4 window=16", "hqq-int4"])
def test_the_first_layer_holds_what_the_format_makes_of_its_clean_keys(name: str) -> None:
    """Keys of layer 0 do not depend on any cache: the simulated store of the same text."""
    model, form = llama(), read_format(name)
    mixed = recipe(f"full,full,{name}", f"{name},full,{name}", (1, 2, 0)).cache()
    text = generate(model, mixed)
    plain = DynamicCache()
    with torch.no_grad():
        model(text[:, :8], past_key_values=plain)
        for at in range(8, text.shape[1] - 1):
            model(text[:, at : at + 1], past_key_values=plain)
    for role, clean, stored in zip(
        ("k", "v"), (plain.layers[0].keys, plain.layers[0].values), mixed.layers[0].stored(),
        strict=True,
    ):  # fmt: skip
        store = form.store(role)
        store.append(clean[:, :, :8])
        for token in clean[:, :, 8:].split(1, dim=2):
            store.append(token)
        assert torch.equal(store.read(), stored)
        assert not torch.equal(clean, stored)


def test_what_a_mixed_cache_cannot_do_is_named() -> None:
    mixed = MixedCache({0: (read_format("q4_0"),) * 2})
    with pytest.raises(ValueError, match=r"q4_0: wanted a multiple of 32.*got 8"):
        generate(llama(8), mixed)
    layer = MixedCache({0: (read_format("q4_0"),) * 2}).layers[0]
    for call in (layer.batch_repeat_interleave, layer.crop):
        with pytest.raises(NotImplementedError, match="MixedCache: wanted one row of tokens"):
            call(1)
