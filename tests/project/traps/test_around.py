"""6. Hooks, modules, loops and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.tools.training import TrainConfig, train
from transformers import AutoTokenizer

from tests.support.builders import NATIVE, build, build_hf
from tests.support.families import D_MODEL, N_CTX, VOCAB
from tests.support.traps import (
    POS,
    SMALL,
    TEXT,
    apart,
    in_memory_tokenizer,
    run,
    twice,
)


def test_alias_and_canonical_name_attach_a_hook_twice() -> None:
    built = build("LlamaForCausalLM")
    both = ["blocks.0.attn.hook_q", "blocks.0.attn.q.hook_out"]
    assert built.model.hook_dict[both[0]] is built.model.hook_dict[both[1]]
    clean = run(built, both[:1]).one(both[0])
    noisy = run(built, both[:1], dict.fromkeys(both, twice)).one(both[0])
    torch.testing.assert_close(noisy, 4 * clean)


def test_a_hook_is_told_another_name_in_compatibility_mode() -> None:
    model = build("GPT2LMHeadModel").model
    told: list[str] = []

    def note(tensor: Tensor, hook: Any) -> None:
        told.append(hook.name)

    model.run_with_hooks(TEXT, fwd_hooks=[("blocks.0.attn.hook_q", note)])
    model.enable_compatibility_mode(disable_warnings=True)
    model.run_with_hooks(TEXT, fwd_hooks=[("blocks.0.attn.hook_q", note)])
    assert told == ["blocks.0.attn.q.hook_out", "blocks.0.attn.hook_q"]


def test_the_wrapped_model_is_changed_in_place() -> None:
    hf = build_hf("GPT2LMHeadModel")
    before, weights = hf(TEXT).logits, set(hf.state_dict())
    bridge = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config)
    assert not weights & set(hf.state_dict())
    assert apart(hf(TEXT).logits, before) < 1e-4
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_v", lambda v, hook: 0 * v)]):
        assert apart(hf(TEXT).logits, before) > 1
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert apart(hf(TEXT).logits, before) > 0.1  # unembedding centred: another reference


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", NATIVE])
def test_the_unembedding_is_computed_where_nobody_wants_it(name: str) -> None:
    model = build(name).model
    calls: list[nn.Module] = []
    handle = model.unembed.original_component.register_forward_hook(lambda m, *_: calls.append(m))
    # HookedTransformer returned the residual stream here.
    assert model(TEXT, stop_at_layer=model.cfg.n_layers).shape == (1, POS, VOCAB)
    assert model(TEXT, return_type=None) is None
    assert len(calls) == 2
    assert model(TEXT, stop_at_layer=model.cfg.n_layers - 1).shape == (1, POS, D_MODEL)
    assert len(calls) == 2
    handle.remove()


@pytest.mark.usefixtures("capsys")
def test_training_makes_one_step_more_than_max_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = TransformerBridge.boot_native(TransformerBridgeConfig(**SMALL))
    forward, steps = bridge.forward, []

    def count(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(bridge, "forward", count)
    config = TrainConfig(num_epochs=2, batch_size=1, max_steps=3, device="cpu", print_every=None)
    rows: Any = [{"tokens": TEXT[0]}] * 9
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(123)
        train(bridge, config, rows)
        assert torch.initial_seed() == config.seed  # the caller's 123 is gone
    assert len(steps) == 2 * (3 + 1)  # in each epoch


def test_a_long_text_is_cut_to_the_context(tmp_path: Path) -> None:
    in_memory_tokenizer().save_pretrained(tmp_path)
    hf = build_hf("GPT2LMHeadModel")
    bridge = build_bridge_from_module(
        hf,
        "GPT2LMHeadModel",
        hf_config=hf.config,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    text = " ".join(["w1"] * (N_CTX + 20))
    assert bridge.to_tokens(text).shape == (1, N_CTX)
    assert bridge.to_tokens(text, truncate=False).shape == (1, N_CTX + 21)  # and <s>
    assert bridge(text).shape[1] == N_CTX


@pytest.mark.parametrize("name", ["BloomForCausalLM", "BertForMaskedLM", "GPT2LMHeadModel"])
def test_a_pass_from_a_layer_norms_the_stream_as_an_embedding(name: str) -> None:
    """Where a norm follows the embedding: BLOOM, BERT; GPT-2 has none, and goes on as it should."""
    built = build(name)
    stream = "blocks.1.hook_resid_pre"
    seen = run(built, [stream])
    begun = built.model(seen.one(stream), start_at_layer=1)
    assert (apart(begun, seen.out) > 1) is (name != "GPT2LMHeadModel")


@pytest.mark.parametrize(
    ("name", "hook", "of_positions"),
    [
        ("MixtralForCausalLM", "blocks.0.mlp.gate.hook_out", 0),  # [batch * pos, expert]
        ("NanoChatForCausalLM", "blocks.0.attn.q_norm.hook_out", 2),  # [batch, head, pos, d_head]
    ],
)
def test_a_slice_of_positions_takes_an_expert_or_a_head(
    name: str, hook: str, of_positions: int
) -> None:
    model = build(name).model
    whole = model.run_with_cache(TEXT)[1][hook]
    assert whole.shape[of_positions] == POS
    last = model.run_with_cache(TEXT, pos_slice=-1)[1][hook]
    torch.testing.assert_close(last, whole[:, -1:])  # wanted: whole.narrow(of_positions, -1, 1)
