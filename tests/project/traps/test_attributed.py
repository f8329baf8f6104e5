"""4. An attribution that does not add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis import direct_logit_attribution

from tests.support.builders import build
from tests.support.traps import TEXT

# A norm stands between the attention's (and the MLP's) projection and the residual stream.
NORMED_BRANCHES = (
    "AfmoeForCausalLM Exaone4ForCausalLM FlexOlmoForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM "
    "Glm4ForCausalLM MuseGlimmerForConditionalGeneration Olmo2ForCausalLM Olmo3ForCausalLM"
)


def cached(model: Any) -> tuple[Tensor, Any]:
    return model.run_with_cache(TEXT)  # type: ignore[no-any-return]


def off(parts: Tensor, whole: Tensor) -> float:
    """How far the parts' sum is from the whole, over its largest entry."""
    return float((parts.sum(0) - whole).abs().max() / whole.abs().max())


def stream(cache: Any, model: Any) -> Tensor:
    return cache["resid_post", model.cfg.n_layers - 1]  # type: ignore[no-any-return]


def by_head(cache: Any) -> Tensor:
    """Embedding, heads, biases and whole MLPs."""
    return cache.get_full_resid_decomposition(expand_neurons=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("name", NORMED_BRANCHES.split())
@pytest.mark.filterwarnings("ignore:.*does not support")
def test_head_results_lack_the_norm_behind_them(name: str, compatible: bool) -> None:
    model = build(name).model
    if compatible:
        model.enable_compatibility_mode(disable_warnings=True)
    _, cache = cached(model)
    assert off(cache.decompose_resid(), stream(cache, model)) < 1e-4
    assert off(by_head(cache), stream(cache, model)) > 0.05
    heads = cache.stack_head_results(layer=1)
    assert off(heads, cache["attn_out", 0]) > 0.05


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("Gemma2ForCausalLM", True), ("Gemma3ForCausalLM", True), ("LlamaForCausalLM", False)],
)
def test_a_remainder_hides_what_heads_lack(name: str, wrong: bool) -> None:
    """Attribution by head, which refuses what it knows to be wrong, against that by layer."""
    model = build(name).model
    model.enable_compatibility_mode(disable_warnings=True)
    asked: dict[str, Any] = {"answer_tokens": torch.tensor(5), "incorrect_tokens": torch.tensor(9)}
    heads, layers = (
        direct_logit_attribution(model, TEXT, unit=unit, **asked) for unit in ("head", "component")
    )
    by_name = {True: "H", False: "attn_out"}
    attention, by_layer = (
        sum(float(x.sum()) for x, label in zip(found.attribution, found.labels, strict=True)
            if by_name[found is heads] in label)
        for found in (heads, layers)
    )  # fmt: skip
    torch.testing.assert_close(heads.attribution.sum(), layers.attribution.sum())
    assert (abs(attention - by_layer) > 0.1 * abs(by_layer)) is wrong


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_head_results_add_up_elsewhere(name: str) -> None:
    """The trap before is not of how it is measured."""
    model = build(name).model
    _, cache = cached(model)
    assert off(by_head(cache), stream(cache, model)) < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "BertForMaskedLM",  # each layer norms the stream itself
        "FalconH1ForCausalLM",  # the Mamba branch
        "Gemma3nForConditionalGeneration",  # several streams, and branches beside attention
        "Gemma4ForCausalLM",  # inputs by layer, and a scale of each layer
        "NanoChatForCausalLM",  # a norm on the embedding
        "XGLMForCausalLM",  # positions, which are computed
    ],
)
def test_a_decomposition_knows_embedding_attention_and_mlp_alone(name: str) -> None:
    model = build(name).model
    _, cache = cached(model)
    assert off(cache.decompose_resid(), stream(cache, model)) > 0.05


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "CohereForCausalLM"]
)
def test_logit_attributions_lack_the_last_gain_as_loaded(name: str) -> None:
    """In compatibility mode the gain (and Cohere's scale of logits) is in the unembedding."""
    model = build(name).model
    apart = []
    for _ in range(2):
        logits, cache = cached(model)
        best, other = logits[0, -1].topk(2).indices
        attributed = cache.logit_attrs(
            cache.decompose_resid(pos_slice=-1), tokens=best, incorrect_tokens=other, pos_slice=-1
        )
        bias = getattr(model, "b_U", None)
        rest = 0.0 if bias is None else bias[best] - bias[other]
        wanted = logits[0, -1, best] - logits[0, -1, other]
        apart.append(float((attributed.sum() + rest - wanted).abs() / wanted.abs()))
        if not model.compatibility_mode:
            model.enable_compatibility_mode(disable_warnings=True)
    assert apart[0] > 0.05
    assert apart[1] < 1e-3
