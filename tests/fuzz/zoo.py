"""Tiny models to fuzz, each with a copy that no bridge has touched, and tokenizers.

model = zoo.model("llama", attn="sdpa")
model.bridge        # what a user has
model.hf            # the same weights, in float64, as its authors wrote it
"""

from __future__ import annotations

import copy
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tests.support import builders
from tests.support.families import D_HEAD, N_HEADS, VOCAB

PAD, BOS, EOS, UNK = 0, 1, 2, 3


@dataclass(frozen=True)
class Family:
    """How a family is built, and what of its inputs and arithmetic the oracle must know.

    Attributes:
        name: the architecture.
        named: inputs beside ids and mask that its forward pass takes.
        counts: whether TransformerLens counts its positions from the mask; Hugging Face's model
            counts from the first column.
        scale: of the dot product, where the scores are not it alone.
        biased: whether a bias is added to it.
        cap: soft cap of the scores.
        sdpa: whether it has fused attention.
        bos: whether TransformerLens begins a text with BOS where it is not told to.
        matters: a weight that every pattern hangs on, by the end of its name.
    """

    name: str
    named: tuple[str, ...] = ("position_ids", "use_cache")
    counts: bool = False
    scale: float | None = None
    biased: bool = False
    cap: float | None = None
    sdpa: bool = True
    matters: str = "input_layernorm.weight"
    grouped: bool = False
    bos: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def has_decoder(self) -> bool:
        return self.name.startswith(("T5", "Bart"))


FAMILIES = {
    "llama": Family("LlamaForCausalLM", grouped=True),
    "gpt2": Family("GPT2LMHeadModel", counts=True, matters="ln_1.weight"),
    "gemma2": Family("Gemma2ForCausalLM", cap=50.0, sdpa=False, grouped=True),
    "qwen3": Family("Qwen3ForCausalLM", grouped=True, bos=False, matters="k_norm.weight"),
    # Takes each row's maximum away before its softmax.
    "gptoss": Family(
        "GptOssForCausalLM", scale=D_HEAD**-0.5, sdpa=False, grouped=True, matters="sinks"
    ),
    "mistral": Family("MistralForCausalLM", grouped=True),
    "bert": Family(
        "BertForMaskedLM",
        ("position_ids", "token_type_ids"),
        counts=True,
        matters="embeddings.LayerNorm.weight",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        ("use_cache",),
        scale=1.0,
        biased=True,
        sdpa=False,
        matters="relative_attention_bias.weight",
        options=(("decoder_start_token_id", BOS),),
    ),
    "bart": Family("BartForConditionalGeneration", ("use_cache",), matters="q_proj.weight"),
    "opt": Family("OPTForCausalLM", matters="self_attn_layer_norm.weight"),
    "bloom": Family("BloomForCausalLM", ("use_cache",), scale=D_HEAD**-0.5, biased=True, bos=False),
    "ours": Family("QKVNormTransformer", ("position_ids",), grouped=True, matters="k_norm.weight"),
}


@dataclass
class Model:
    """A bridge, and the model it was made of in float64, untouched."""

    family: Family
    bridge: Any
    hf: Any
    plain: Any  # the same in the bridge's dtype
    tokenizer: Any

    @property
    def n_kv_heads(self) -> int:
        return N_HEADS // 2 if self.family.grouped else N_HEADS


def build(
    family: str,
    *,
    attn: str = "eager",
    dtype: torch.dtype = torch.float32,
    tokenizer: str = "",
    adapter: bool = False,
) -> Model:
    """A new model."""
    kind = FAMILIES[family]
    hf = builders.build_hf(kind.name, attn=attn, dtype=dtype, **dict(kind.options))
    if adapter:
        add_adapter(hf)
    own = family == "ours"
    plain = copy.deepcopy(hf)
    if own:
        plain.cfg.attn_implementation = "eager"
        for module in plain.modules():
            if hasattr(module, "sdpa"):
                module.sdpa = False
    else:
        plain.set_attn_implementation("eager")
    wide = copy.deepcopy(plain).double()
    words = load_tokenizer(tokenizer) if tokenizer else None
    config = {"tl_config": hf.cfg} if own else {"hf_config": hf.config}
    with torch.random.fork_rng(devices=[]):
        bridge = build_bridge_from_module(hf, kind.name, tokenizer=words, **config)
    return Model(kind, bridge.eval(), wide, plain, words)


model = functools.cache(build)


class Adapted(nn.Module):
    """W x + B A x, where the adapter is on: what LoRA makes of a projection."""

    def __init__(self, inner: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        weight: Tensor = inner.weight  # type: ignore[assignment]
        self.inner, self.on = inner, True
        n_out, n_in = weight.shape
        self.a = nn.Parameter(torch.randn(2, n_in, generator=generator).to(weight) / n_in**0.5)
        self.b = nn.Parameter(torch.randn(n_out, 2, generator=generator).to(weight))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + x @ self.a.T @ self.b.T if self.on else out


def add_adapter(hf: nn.Module) -> None:
    """One on each layer's keys and values."""
    generator = torch.Generator().manual_seed(7)
    targets = [
        (module, name)
        for module in hf.modules()
        for name, child in module.named_children()
        if name in ("k_proj", "v_proj") and isinstance(child, nn.Linear)
    ]
    for module, name in targets:
        setattr(module, name, Adapted(getattr(module, name), generator))


def switch_adapter(hf: nn.Module, on: bool) -> None:
    for module in hf.modules():
        if isinstance(module, Adapted):
            module.on = on


# --- tokenizers ------------------------------------------------------------------------------

_CHAT = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }} {{ eos_token }}"
    "{% endfor %}"
)

_directory = tempfile.TemporaryDirectory(prefix="qkvnorm-lens")


@functools.cache
def load_tokenizer(kind: str) -> Any:
    """A word a token, w4 to w96.

    Args:
        kind: ``"plain"`` (adds nothing by itself), ``"adds"`` (begins every text with BOS) or
            ``"one"`` (a single token begins, ends and pads, as GPT-2's).
    """
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    named = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    if kind == "one":
        named = dict.fromkeys(named, "[BOS]")
    vocabulary = {word: i for i, word in enumerate(special)} | {"user": 4, "assistant": 5}
    vocabulary |= {f"w{i}": i for i in range(6, VOCAB)}
    inner = Tokenizer(kinds.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "adds":
        inner.post_processor = processors.TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", BOS)]
        )
    path = Path(_directory.name) / kind  # stays: `TransformerBridge` loads it again
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **named)
    made.chat_template = _CHAT
    made.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def said(ids: list[int]) -> str:
    """Ids as a text of these tokenizers."""
    special = {PAD: "[PAD]", BOS: "[BOS]", EOS: "[EOS]", UNK: "[UNK]", 4: "user", 5: "assistant"}
    return " ".join(special.get(i, f"w{i}") for i in ids)
