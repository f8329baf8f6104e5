"""The numbers of the tiny configurations, and what single families need beyond them.

`SIZES` is for every configuration: a number for each field that the class has. `CONFIGS` is by
configuration class, so that it holds wherever that class is nested; `BY_HEADS` likewise, for
families that say in words of their own how many key/value heads there are.
"""

from __future__ import annotations

from typing import Any

VOCAB, N_CTX = 97, 64
D_MODEL, N_HEADS, D_HEAD, D_MLP, N_LAYERS = 32, 4, 8, 64, 2
WINDOW = 4  # shorter than any prompt, so that the window shows

_SPELLINGS: dict[str, Any] = {
    "vocab_size vocab_size_per_layer_input decoder_vocab_size": VOCAB,
    "hidden_size d_model n_embd word_embed_proj_dim attention_hidden_size lru_width": D_MODEL,
    "out_hidden_size projection_dim projector_hidden_size mm_embed_dim output_proj_dims": D_MODEL,
    "num_attention_heads n_head n_heads num_heads attention_heads": N_HEADS,
    "encoder_attention_heads decoder_attention_heads": N_HEADS,
    "head_dim d_kv kv_channels rotary_dim query_pre_attn_scalar": D_HEAD,
    "qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim": D_HEAD,
    "linear_key_head_dim linear_value_head_dim": D_HEAD,
    "intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size d_ff": D_MLP,
    "encoder_ffn_dim decoder_ffn_dim": D_MLP,
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers depth": N_LAYERS,
    "encoder_layers decoder_layers": N_LAYERS,
    "max_position_embeddings n_positions n_ctx max_seq_len context_length": N_CTX,
    "max_encoder_position_embeddings max_decoder_position_embeddings": N_CTX,
    "pad_token_id": 0,
    "bos_token_id decoder_start_token_id": 1,
    "eos_token_id": 2,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok moe_k": 2,
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "n_shared_experts n_group topk_group first_k_dense_replace num_dense_layers": 1,
    "q_lora_rank kv_lora_rank o_lora_rank": 16,
    "mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_head mamba_head_dim": 8,
    "mamba_d_state ssm_state_size state_size": 8,
    "mamba_chunk_size chunk_size": 8,
    "mamba_dt_rank time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "no_rope_layer_interval": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "position_embedding_size num_position_embeddings mm_posemb_size": 16,
}
SIZES: dict[str, Any] = {key: size for keys, size in _SPELLINGS.items() for key in keys.split()}
WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")

_CONV = ["conv", "full_attention"] * 2
_MIXED = ["linear_attention", "full_attention"] * 2
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SPEECH: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "ASTConfig": {"max_length": 32, "frequency_stride": 4, "time_stride": 4},
    "BambaConfig": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "DeepseekV4Config": {"index_n_heads": N_HEADS, "index_topk": 4, "o_groups": 2},
    "Emu3Config": {"vocabulary_map": {"<|extra_200|>": 3, "<image>": 4}},
    "Emu3VQVAEConfig": {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "codebook_size": 8,
        "num_res_blocks": 1,
    },
    "FalconH1Config": {"mamba_d_ssm": 64},
    "Florence2VisionConfig": {
        "depths": (1, 1),
        "embed_dim": (8, 16),
        "num_groups": (2, 2),
        "num_heads": (2, 2),
        "patch_padding": (1, 1),
        "patch_prenorm": (False, True),
        "patch_size": (3, 3),
        "patch_stride": (2, 2),
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "Gemma3nAudioConfig": {"conf_num_attention_heads": 4, "conf_num_hidden_layers": 1},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "intermediate_size": [D_MLP] * 6,
        "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "Gemma4TextConfig": {"hidden_size_per_layer_input": 8, "global_head_dim": 16},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 16},
    "GlmMoeDsaConfig": {"index_n_heads": N_HEADS, "index_topk": 4},
    "Glm4vTextConfig": {"rope_parameters": _MROPE},
    "GraniteConfig": {"attention_multiplier": D_HEAD**-0.5},
    "GraniteMoeConfig": {"attention_multiplier": D_HEAD**-0.5},
    "GraniteMoeHybridConfig": {
        "attention_multiplier": D_HEAD**-0.5,
        "num_hidden_layers": 4,
        "layer_types": _MIXED,
        "position_embedding_type": "rope",
    },
    "HrmTextConfig": {"H_cycles": 1, "L_cycles": 1},
    "HubertConfig": _SPEECH,
    "JambaConfig": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "LEDConfig": {"attention_window": WINDOW},
    "LagunaConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "Lfm2Config": {"num_hidden_layers": 4, "layer_types": _CONV, "block_multiple_of": 8},
    "Lfm2MoeConfig": {"num_hidden_layers": 4, "layer_types": _CONV},
    "Llama4VisionConfig": {
        "vision_output_dim": D_MODEL,
        "projector_input_dim": D_MODEL,
        "projector_output_dim": D_MODEL,
    },
    "Mamba2Config": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ModernBertDecoderConfig": {"local_attention": 2 * WINDOW},
    "NemotronHConfig": {"n_groups": 1},
    "Qwen2_5_VLTextConfig": {"rope_parameters": _MROPE},
    "Qwen3VLMoeTextConfig": {"rope_parameters": _MROPE},
    "Qwen3VLTextConfig": {"rope_parameters": _MROPE},
    "Qwen3VLMoeVisionConfig": {"deepstack_visual_indexes": [0, 1]},
    "Qwen3VLVisionConfig": {"deepstack_visual_indexes": [0, 1]},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "Wav2Vec2Config": _SPEECH,
}
BY_HEADS: dict[str, dict[str, dict[str, Any]]] = {
    "DeepseekV4Config": {"mqa": {}},  # one key, which is the value too
    "FalconConfig": {
        "mha": {"multi_query": False},
        # The released ones have multi_query=True here: TransformerLens cannot split those.
        "gqa": {"new_decoder_architecture": True, "multi_query": False, "num_kv_heads": 2},
        "mqa": {"multi_query": True},
    },
    "GPTBigCodeConfig": {"mqa": {}},  # TransformerLens refuses multi_query=False
}

# Times the width of the scores, where they are not q.k / sqrt(d_head) of unit vectors.
SCORES: dict[str, float] = {
    "Gemma4TextConfig": D_HEAD**-0.5,  # not divided by anything
    "Gemma4UnifiedTextConfig": D_HEAD**-0.5,
    "GptOssConfig": 0.6,  # YaRN
    "JetMoeConfig": 2.0,  # queries are weighted by their experts' probabilities
    "GPTNeoConfig": D_HEAD**-0.5,
    "Gemma3nTextConfig": D_HEAD**-0.5,
    "LongT5Config": D_HEAD**-0.5,
    "MT5Config": D_HEAD**-0.5,
    "MarianConfig": 0.6,  # no norm before the first layer
    "NemotronConfig": 0.25,  # its norm multiplies by 1 + weight, and the weight starts at 1
    "OpenAIGPTConfig": 0.7,
    "SwitchTransformersConfig": D_HEAD**-0.5,
    "T5Config": D_HEAD**-0.5,
}

# Names that no class has (old ones, other spellings), or that TransformerLens loads as another.
LOADED_AS = {
    "BloomModel": "BloomForCausalLM",
    "Gemma1ForCausalLM": "GemmaForCausalLM",
    "JetMoEForCausalLM": "JetMoeForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
    "NeoForCausalLM": "GPTNeoForCausalLM",
    "NeoXForCausalLM": "GPTNeoXForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
    "Wav2Vec2ForPreTraining": "Wav2Vec2Model",
}
# What one name needs beyond its configuration class.
NAMED: dict[str, dict[str, Any]] = {"BertLMHeadModel": {"is_decoder": True}}

_HUB = (
    "BD3LM BaiChuanForCausalLM BaichuanForCausalLM DreamModel ExaoneForCausalLM "
    "GPT2LMHeadCustomModel GiddForDiffusionLM HyenaDNAForCausalLM InternLM2ForCausalLM "
    "LLaDA2MoeModelLM LLaDAModelLM OpenELMForCausalLM OuroForCausalLM QwenForCausalLM "
    "RavenForCausalLM"
)
_LEGACY = (
    "neither transformers nor TransformerLens has the module: checkpoints are loaded as "
    "TransformerLensNative instead (boot_tl_legacy)"
)
NOT_TRIED: dict[str, str] = {
    **dict.fromkeys(_HUB.split(), "its class is on the hub only (trust_remote_code)"),
    "MinGPTForCausalLM": _LEGACY,
    "NeelSoluOldForCausalLM": _LEGACY,
    "NanoGPTForCausalLM": "its class is in the nanoGPT repository, which is no package",
    "RWKV7ForCausalLM": "its class is in flash-linear-attention, which needs Triton; no attention",
    "TransformerLensPretrain": "wraps a user's own module; no public class follows its protocol",
}
