"""5. A hook that is declared, or should be, and never fires."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.builders import build, build_hf
from tests.support.traps import (
    TEXT,
    names,
    run,
)

SILENT_ON_SDPA = (
    "ASTForAudioClassification BartForConditionalGeneration BertForMaskedLM "
    "BlenderbotForConditionalGeneration DeiTForImageClassification "
    "Florence2ForConditionalGeneration HubertForCTC JambaForCausalLM JetMoeForCausalLM "
    "LagunaForCausalLM M2M100ForConditionalGeneration MarianMTModel MBartForConditionalGeneration "
    "ModernBertDecoderForCausalLM MT5ForConditionalGeneration NanoChatForCausalLM OPTForCausalLM "
    "PegasusForConditionalGeneration RobertaForMaskedLM T5ForConditionalGeneration "
    "T5Gemma2ForConditionalGeneration ViTForImageClassification Wav2Vec2ForCTC"
)


@pytest.mark.parametrize("name", SILENT_ON_SDPA.split())
def test_scores_and_pattern_never_fire_on_sdpa(name: str) -> None:
    built = build(name, attn="sdpa")
    declared = names(built, ".hook_attn_scores", ".hook_pattern")
    assert declared
    assert not run(built, declared).fired


@pytest.mark.parametrize(
    ("name", "prefix", "hooks"),
    [
        ("LEDForConditionalGeneration", "", (".hook_attn_scores", ".hook_pattern")),
        (
            "LongT5ForConditionalGeneration",
            "encoder_blocks",
            (".hook_attn_scores", ".hook_pattern"),
        ),
        ("Llama4ForCausalLM", "", (".hook_rot_q", ".hook_rot_k")),
        ("MuseGlimmerForConditionalGeneration", "", (".hook_rot_q", ".hook_rot_k")),
        ("JetMoeForCausalLM", "", (".hook_rot_q", ".hook_rot_k")),
    ],
)
def test_declared_hooks_never_fire_on_eager(name: str, prefix: str, hooks: tuple[str, ...]) -> None:
    built = build(name)
    declared = [n for n in names(built, *hooks) if n.startswith(prefix)]
    assert declared
    assert not run(built, declared).fired


def test_jetmoe_has_no_hook_on_q_k_v_or_z() -> None:
    built = build("JetMoeForCausalLM")
    assert names(built, ".hook_pattern")
    ends = tuple(f".{n}" for n in ("hook_q", "hook_k", "hook_v", "hook_z"))
    assert not names(built, *ends)


@pytest.mark.parametrize(
    "name",
    [
        "DeepseekV4ForCausalLM",
        "NemotronHForCausalLM",
        "RecurrentGemmaForCausalLM",
        "Zamba2ForCausalLM",
    ],
)
def test_models_with_attention_have_no_attention_hook(name: str) -> None:
    hf = build_hf(name)
    assert any(type(module).__name__.endswith("Attention") for module in hf.modules())
    ends = tuple(f".hook_{n}" for n in ("q", "k", "v", "z", "attn_scores", "pattern"))
    assert not names(build(name), *ends)


def test_a_filter_that_matches_nothing_is_no_error() -> None:
    built = build("LlamaForCausalLM")
    clean = built.model(TEXT)

    def never(name: str) -> bool:
        return name.endswith("hook_queries")

    def zero(tensor: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(tensor)

    assert torch.equal(built.model.run_with_hooks(TEXT, fwd_hooks=[(never, zero)]), clean)
    assert not built.model.run_with_cache(TEXT, names_filter=never)[1]
    with pytest.raises(KeyError, match="does not exist"):
        built.model.run_with_hooks(TEXT, fwd_hooks=[("hook_queries", zero)])
