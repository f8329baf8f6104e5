"""The torch engine and the compiled code on every architecture of the support table."""

from __future__ import annotations

from typing import Any

import pytest

import hooks
from tests.support import builders, matrix
from tests.support.engines import assert_same
from tests.support.watching import RENAMED

FEW = (  # a hook's scores, the softmax's, the product's; a bias, a cap, sinks, two stacks
    ("BloomForCausalLM", "mha"),
    ("Gemma2ForCausalLM", "gqa"),
    ("GptOssForCausalLM", "gqa"),
    ("OPTForCausalLM", "mha"),
    ("T5ForConditionalGeneration", "mha"),
)
KINDS = [key for key, row in matrix.stored().items() if row.verdict in ("verified", "limited")]


def compare(name: str, heads: str) -> None:
    """Both engines on one architecture; the strict rate where torch has it."""
    built = builders.build(name, heads or None)
    (tokens,), rest = built.inputs(batch=2, pos=13)
    caps = any(s.soft_cap for s in hooks.attention_sites(built.model))
    how: dict[str, Any] = {"sparse": 0.5, "sigmas": (0.05, 0.3, 0.5), "strict": not caps}
    if rest:
        how["decoder_tokens"] = rest["decoder_input_ids"]
    each = [
        hooks.collapse_probe(built.model, tokens, engine=engine, progress=False, **how)
        for engine in ("torch", "compiled")
    ]
    assert each[0].model["engine"] == "torch"
    assert_same(*each, strict=None if caps else 1e-5)


@pytest.mark.parametrize(("name", "heads"), FEW)
def test_some_architectures(name: str, heads: str) -> None:
    compare(name, heads)


@pytest.mark.matrix
@pytest.mark.filterwarnings("default")  # of a hundred families' own code
@pytest.mark.parametrize(("name", "heads"), KINDS)
def test_every_architecture(name: str, heads: str) -> None:
    if RENAMED and name in matrix.STOPPED_BY_5_24:
        with pytest.raises(hooks.UnsupportedModelError, match="a forward pass of the model"):
            compare(name, heads)
    else:
        compare(name, heads)
