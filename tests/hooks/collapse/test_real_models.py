"""The probe on real architectures at full size: SmolLM2-135M-Instruct, and GPT-2 small's shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import hooks
from tests.oracles.agreement import compare

SIGMAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


def _tokens(model: TransformerBridge, prompts: list[str], n_pos: int) -> torch.Tensor:
    return torch.stack([model.to_tokens(prompt)[0, :n_pos] for prompt in prompts])


@pytest.mark.real_model
def test_smollm2_smoke(smollm2: TransformerBridge, prompts: list[str]) -> None:
    sites = hooks.attention_sites(smollm2)
    assert len(sites) == 30
    assert sites.layers[0].kv_head_of == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert {site.q.shield for site in sites} == {"none"}
    tokens = _tokens(smollm2, prompts[:2], 48)
    before = smollm2(tokens, return_type="logits")
    report = hooks.collapse_probe(smollm2, tokens, draws=2)
    after = smollm2(tokens, return_type="logits")
    assert torch.equal(before, after)
    assert report.n_sparse >= 500
    assert report.to_frame("model")["loose"].iloc[-1] > 0
    # Most sparse rows of a language model look at the first token: those are told apart.
    assert report.rows[..., 1].sum() > 0.5 * report.n_sparse
    assert "sinks" in str(report)


@pytest.mark.real_model
def test_smollm2_reads_a_chat_as_its_template_writes_it(smollm2: TransformerBridge) -> None:
    """Messages, the template's text and its ids: one BOS, which most sparse rows look at.

    With a second BOS, as TransformerLens's own tokens of that text have it, many fewer are sparse.
    """
    chat = [{"role": "user", "content": "Name the planets, and say which of them have rings."}]
    tokenizer = smollm2.tokenizer
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == text.count(tokenizer.bos_token)
    twice = smollm2.to_tokens(text)
    assert twice[0].tolist() == [tokenizer.bos_token_id, *ids]
    options = {"sigmas": [0.1, 0.3], "draws": 0}
    right = hooks.collapse_probe(smollm2, torch.tensor([ids]), **options)
    for given in (text, [text], chat, [chat], {"input_ids": [ids]}):
        report = hooks.collapse_probe(smollm2, given, **options)
        assert [list(x) for x in report.tokens] == [list(x) for x in right.tokens]
        np.testing.assert_array_equal(report.rows, right.rows)
        np.testing.assert_array_equal(report.loose, right.loose)
    doubled = hooks.collapse_probe(smollm2, twice, **options)
    assert doubled.n_sparse < 0.9 * right.n_sparse
    assert right.rows[..., 1].sum() > 0.5 * right.n_sparse


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_exact_and_sampled_agree(smollm2: TransformerBridge, prompts: list[str]) -> None:
    tokens = _tokens(smollm2, prompts, 128)
    assert tokens.shape == (8, 128)
    exact = hooks.collapse_probe(smollm2, tokens, sigmas=SIGMAS, draws=0)
    sampled = hooks.collapse_probe(smollm2, tokens, sigmas=SIGMAS, draws=48, method="sample")
    assert exact.n_sparse >= 10_000
    for name in ("loose", "centred"):
        agreement = compare(exact, sampled, name)
        assert agreement.cells >= 60
        assert agreement.events >= 10_000
        assert agreement.holds, agreement
    # The strict rate's draws are the same under both methods, and the computed one agrees.
    strict = hooks.collapse_probe(smollm2, tokens, sigmas=SIGMAS, draws=48, layers=[10, 20])
    both = [list(sampled.settings.layers).index(layer) for layer in (10, 20)]
    np.testing.assert_array_equal(strict.strict_draws, sampled.strict_draws[:, :, both])
    frame = strict.to_frame("model")
    away = (frame["strict"] - frame["strict_drawn"]).abs()
    assert (away <= 4 * frame["se_strict"] + 1e-3).all()


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_noise_in_the_model_equals_noise_on_its_scores(
    smollm2: TransformerBridge, prompts: list[str]
) -> None:
    """The sampled rate, row by row, against a forward pass with the noise really in it."""
    tokens = _tokens(smollm2, prompts, 96)
    layer, sigma = 7, 0.3
    sampled = hooks.collapse_probe(
        smollm2, tokens, sigmas=[sigma], draws=3, method="sample", layers=[layer], seed=5
    )
    _, clean = smollm2.run_with_cache(tokens, names_filter=f"blocks.{layer}.attn.hook_pattern")
    pattern = clean[f"blocks.{layer}.attn.hook_pattern"]
    sparse = (pattern.amax(-1) >= hooks.SPARSE)[:, :, 1:]
    moved = []
    for draw in range(3):
        noise = hooks.NormNoise(sigma=sigma, on="qk", layers=(layer,), seed=5, draw=draw)
        with noise.applied(smollm2):
            _, noisy = smollm2.run_with_cache(
                tokens, names_filter=f"blocks.{layer}.attn.hook_pattern"
            )
        jumped = noisy[f"blocks.{layer}.attn.hook_pattern"].argmax(-1) != pattern.argmax(-1)
        moved.append(int((jumped[:, :, 1:] & sparse).sum()))
    assert int(sparse.sum()) == sampled.n_sparse >= 50
    assert sum(moved) > 0
    np.testing.assert_array_equal(sampled.loose_draws[0].sum((-3, -2, -1)), moved)


@pytest.mark.slow
@pytest.mark.real_model
def test_gpt2_small_exact_and_sampled_agree(gpt2_hub: Path, prompts: list[str]) -> None:
    model = TransformerBridge.boot_transformers("gpt2")
    tokens = _tokens(model, prompts, 128)
    exact = hooks.collapse_probe(model, tokens, sigmas=SIGMAS[:4], draws=0)
    sampled = hooks.collapse_probe(model, tokens, sigmas=SIGMAS[:4], draws=32, method="sample")
    assert tokens.shape == (8, 128)
    assert exact.n_sparse >= 60_000
    assert exact.to_frame("model")["loose"].iloc[0] > 0
    agreement = compare(exact, sampled)
    assert agreement.cells >= 40
    assert agreement.holds, agreement
