"""Tiny random models of several kinds, built offline, and text to run on models.

Every builder takes the same options and returns a `TransformerBridge` in eval mode, float32, on
the CPU. Queries and keys are enlarged so that sparse attention rows exist (at least a tenth of
the rows have a maximum >= 0.95; `tests/project/` holds them to it), and biases and norm weights are
random, so that nothing is a no-op by accident.
"""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.support.paths import DATA

VOCAB = 97
N_CTX = 64


def tiny_gpt2(**options: Any) -> TransformerBridge:
    """Learned positions, LayerNorm, biases: 2 layers of 4 heads of 8."""
    return bridge(GPT2LMHeadModel, tiny_gpt2_config(**options), **options)


def tiny_llama(**options: Any) -> TransformerBridge:
    """Rotary, RMSNorm, grouped-query attention: 2 layers of 4 query and 2 key/value heads of 8."""
    return bridge(LlamaForCausalLM, tiny_llama_config(**options), **options)


def tiny_bloom(**options: Any) -> TransformerBridge:
    """ALiBi, LayerNorm, biases: 2 layers of 4 heads of 8."""
    return bridge(BloomForCausalLM, tiny_bloom_config(**options), **options)


def tiny_qwen3(**options: Any) -> TransformerBridge:
    """QK-norm before rotary, grouped-query attention: 2 layers of 4 query and 2 kv heads of 8."""
    return bridge(Qwen3ForCausalLM, tiny_qwen3_config(**options), **options)


TINY = {"gpt2": tiny_gpt2, "llama": tiny_llama, "bloom": tiny_bloom, "qwen3": tiny_qwen3}


def tokens(batch: int = 3, pos: int = 24, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random token ids, [batch, pos]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, pos), generator=generator)


def shakespeare() -> list[str]:
    """Eight passages of English, each more than 128 tokens long for GPT-2 and SmolLM2."""
    text = (DATA / "shakespeare.txt").read_text(encoding="utf-8")
    return [passage.strip() for passage in text.split("\n\n\n")]


def tiny_gpt2_config(**options: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=_vocab(options),
        n_positions=N_CTX,
        n_embd=32,
        n_layer=options.get("n_layers", 2),
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )


def tiny_llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(**llama_like(options))


def tiny_qwen3_config(**options: Any) -> Qwen3Config:
    return Qwen3Config(**llama_like(options))


def tiny_bloom_config(**options: Any) -> BloomConfig:
    return BloomConfig(
        vocab_size=_vocab(options),
        hidden_size=32,
        n_layer=options.get("n_layers", 2),
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def llama_like(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": _vocab(options),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": options.get("n_layers", 2),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": N_CTX,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _vocab(options: dict[str, Any]) -> int:
    tokenizer = options.get("tokenizer")
    return VOCAB if tokenizer is None else len(tokenizer)


def bridge(
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    *,
    n_layers: int = 2,
    seed: int = 0,
    qk_scale: float = 6.0,
    tokenizer: Any = None,
) -> TransformerBridge:
    hf = tiny_hf(cls, config, seed=seed, qk_scale=qk_scale)
    with torch.random.fork_rng(devices=[]):  # splitting a fused qkv draws weights
        built = build_bridge_from_module(hf, cls.__name__, hf_config=hf.config, tokenizer=tokenizer)
    return built.eval()  # the bridge's own modules start in training mode, dropout and all


def tiny_hf(
    cls: type[PreTrainedModel], config: PretrainedConfig, *, seed: int = 0, qk_scale: float = 6.0
) -> PreTrainedModel:
    """The Hugging Face model itself. A bridge changes it in place: build a second as reference."""
    config.architectures = [cls.__name__]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = cls(config)
        for name, parameter in hf.named_parameters():
            _randomise(name, parameter.data, qk_scale)
    hf.set_attn_implementation("eager")
    return hf.eval()


def _randomise(name: str, weight: torch.Tensor, qk_scale: float) -> None:
    if weight.ndim == 1:
        centre = 0.0 if name.endswith("bias") else 1.0
        weight.copy_(centre + 0.1 * torch.randn_like(weight))
    else:
        weight.copy_(torch.randn_like(weight) / min(weight.shape) ** 0.5)
    # With QK-norm only the norm's weight can enlarge a score.
    enlarged = ("q_norm", "k_norm", "q_proj", "k_proj", "c_attn", "query_key_value")
    if any(part in name for part in enlarged):
        weight.mul_(qk_scale**0.5)
