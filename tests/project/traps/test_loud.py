"""7. Loud: refused, and only the reason is surprising."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tests.support.builders import build, build_hf
from tests.support.traps import (
    TEXT,
    in_memory_tokenizer,
)


def _phi_in_compatibility_mode() -> None:
    build("PhiForCausalLM", "gqa").model.enable_compatibility_mode(disable_warnings=True)


def _with_tokenizer_in_memory() -> None:
    hf = build_hf("GPT2LMHeadModel")
    build_bridge_from_module(
        hf, "GPT2LMHeadModel", hf_config=hf.config, tokenizer=in_memory_tokenizer()
    )


def _pickled() -> None:
    pickle.dumps(build("GPT2LMHeadModel").model)


def _cache_get() -> None:
    _, cache = build("GPT2LMHeadModel").model.run_with_cache(TEXT)
    cache.get("blocks.0.attn.hook_q")


def _built(name: str, heads: str | None = None, **options: Any) -> Callable[[], Any]:
    return lambda: build(name, heads, **options)


LOUD: Sequence[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "falcon_new_with_multi_query",
        _built("FalconForCausalLM", "gqa", multi_query=True),
        RuntimeError,
        "split_with_sizes expects split_sizes to sum exactly to 64",
    ),
    (
        "bigcode_without_multi_query",
        _built("GPTBigCodeForCausalLM", multi_query=False),
        AssertionError,
        "only supports multi_query=True",
    ),
    (
        "phi_with_qk_layernorm",
        _built("PhiForCausalLM", qk_layernorm=True),
        RuntimeError,
        "has 'q_layernorm' but adapter did not declare 'q_norm'",
    ),
    (
        "granite_hybrid_without_positions",
        lambda: build("GraniteMoeHybridForCausalLM", position_embedding_type=None).model(TEXT),
        RuntimeError,
        "Original component not set for model.rotary_emb",
    ),
    (
        "phi_gqa_in_compatibility_mode",
        _phi_in_compatibility_mode,
        RuntimeError,
        "must match the size of tensor b",
    ),
    ("tokenizer_in_memory", _with_tokenizer_in_memory, KeyError, "name_or_path"),
    ("pickled_bridge", _pickled, AttributeError, "Can't (pickle|get) local object"),
    ("cache_get", _cache_get, AttributeError, "get"),
]


@pytest.mark.parametrize(("what", "attempt", "error", "message"), LOUD, ids=[c[0] for c in LOUD])
def test_refused_loudly(
    what: str, attempt: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attempt()
