"""Look into forward passes of test models, and more tiny models for what the four can't show."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jaxtyping
import numpy as np
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tests.support import models


def watch(
    model: Any, ids: Tensor, names: Sequence[str], fwd_hooks: Sequence[Any] = (), **options: Any
) -> dict[str, Tensor]:
    """What these hook points carry in one forward pass, after other hooks; "logits" too."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook_fn(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach().clone()

        return hook_fn

    with torch.no_grad():
        seen["logits"] = model.run_with_hooks(
            ids, fwd_hooks=[*fwd_hooks, *((name, keep(name)) for name in names)], **options
        )
    return seen


def attn(layer: int, name: str) -> str:
    return f"blocks.{layer}.attn.hook_{name}"


def tiny_gemma2(**options: Any) -> TransformerBridge:
    """Soft-capped scores, and a sliding window in every second layer."""
    config = Gemma2Config(
        **models.llama_like(options),
        attn_logit_softcapping=20.0,
        sliding_window=8,
        query_pre_attn_scalar=8,
    )
    return models.bridge(Gemma2ForCausalLM, config, **options)


def tiny_opt() -> TransformerBridge:
    """Its scores hook carries the pattern."""
    config = OPTConfig(
        vocab_size=models.VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=models.N_CTX,
    )
    return models.bridge(OPTForCausalLM, config)


def tiny_bert() -> TransformerBridge:
    """No causal mask, and no next token."""
    config = BertConfig(
        vocab_size=models.VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=models.N_CTX,
    )
    return models.bridge(BertForMaskedLM, config)


def tiny_mamba() -> TransformerBridge:
    """No attention."""
    config = MambaConfig(vocab_size=models.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    return models.bridge(MambaForCausalLM, config)


RENAMED = tuple(int(part) for part in version("transformers").split(".")[:2]) >= (5, 24)


def keeps_cache(bridge: Any) -> bool:
    """Whether steps with a cache give what the whole pass gives, without noise.

    TransformerLens 4.3 loses the cache of many models under transformers 5.24, which calls it by
    another name; of none of the tests' models before.
    """
    inner = bridge.original_model
    ids = models.tokens(2, 14, vocab=min(models.VOCAB, int(bridge.cfg.d_vocab)))
    decoder = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
    named = {"input_ids": ids} if decoder else {}
    key = "decoder_input_ids" if decoder else "input_ids"
    with torch.no_grad():
        whole = inner(**named, **{key: ids})
        whole = whole if isinstance(whole, Tensor) else whole.logits
        first = inner(**named, **{key: ids[:, :5]}, use_cache=True)
        rest = inner(
            **named, **{key: ids[:, 5:]}, past_key_values=first.past_key_values, use_cache=True
        )
    kept = bool((rest.logits - whole[:, 5:]).abs().max() < 1e-3 * whole.abs().max())
    assert kept or RENAMED
    return kept


@contextmanager
def shape_checks_off() -> Iterator[None]:
    """As users run the library: the checker refuses bad input first and draws random numbers."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _all_modules(model: Any) -> list[Any]:
    return [*model.modules(), *model.original_model.modules()]


class Found:
    """All that a library call must leave alone: compare one taken before with one taken after."""

    def __init__(self, model: Any) -> None:
        modules = _all_modules(model)
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        self.grads = [p.requires_grad for p in model.parameters()]
        self.training = [m.training for m in modules]
        self.torch_hooks = [
            [id(h) for hooks in (m._forward_hooks, m._forward_pre_hooks) for h in hooks.values()]
            for m in modules
        ]
        self.hooks = {
            name: [id(h) for h in (*point.fwd_hooks, *point.bwd_hooks)]
            for name, point in model.hook_dict.items()
        }
        self.grad_mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.random = random.getstate()
        self.numpy = np.random.get_state()  # noqa: NPY002
        self.torch = torch.get_rng_state()

    def assert_same(self, other: Found) -> None:
        for mine, theirs in ((self.weights, other.weights), (self.buffers, other.buffers)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[n], theirs[n]) for n in mine)
        for name in ("grads", "training", "torch_hooks", "hooks", "grad_mode", "random"):
            assert getattr(self, name) == getattr(other, name), name
        assert all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
        assert torch.equal(self.torch, other.torch)
