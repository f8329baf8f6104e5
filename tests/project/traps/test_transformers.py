"""8. transformers, not TransformerLens."""

from __future__ import annotations

import pytest
import torch

from tests.support.builders import build, build_hf
from tests.support.traps import (
    POS,
    TEXT,
    apart,
)


@pytest.mark.parametrize("heads", ["mha", "mqa"])
def test_transformers_falcon_is_not_causal_with_output_attentions(heads: str) -> None:
    """Its mask is one of booleans on sdpa, which is then added to the scores."""
    hf = build_hf("FalconForCausalLM", heads, attn="sdpa")
    asked = hf(TEXT, output_attentions=True)
    assert apart(asked.logits, hf(TEXT).logits) > 10
    future = torch.ones(POS, POS).triu(1).bool()
    assert float(asked.attentions[0][..., future].max()) > 0.9


def test_transformers_falcon_adds_alibi_twice_with_output_attentions() -> None:
    hf = build_hf("FalconForCausalLM", "mha", alibi=True)
    once, doubled = hf(TEXT).logits, hf(TEXT, output_attentions=True).logits
    assert apart(once, doubled) > 0.5
    assert apart(build("FalconForCausalLM", "mha", alibi=True).model(TEXT), doubled) < 1e-4
    hf.config._attn_implementation = "eager"
    assert apart(hf(TEXT).logits, doubled) < 1e-4
