"""What the probe refuses, and by which name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hooks import NormNoise, UnsupportedModelError, attention_sites
from tests.support import builders, models
from tests.support.probes import ids, probe
from tests.support.watching import (
    tiny_mamba,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": [-0.1]}, r"sigmas: wanted a finite number >= 0; got -0\.1"),
        ({"sigmas": [0.1, 0.6]}, r"wanted < 0\.57735 for uniform noise .*got 0\.6"),
        ({"sigmas": [0.25], "law": "gaussian"}, r"wanted <= 0\.2 for gaussian noise"),
        ({"sigmas": []}, "sigmas: wanted one or more; got none"),
        ({"sigmas": [0.2, 0.1]}, r"ascending and distinct; got \[0\.2, 0\.1\]"),
        ({"layers": [5]}, r"wanted one of the attention layers \[0, 1\]; got 5"),
        ({"layers": [-1]}, "got -1"),
        ({"layers": []}, "layers: wanted one or more"),
        ({"layers": [0, 0]}, "each once; got"),
        ({"on": "x"}, r"on: wanted some of 'q', 'k', 'v', each once; got 'x'"),
        ({"law": "cauchy"}, r"law: wanted one of .*got 'cauchy'"),
        ({"method": "guess"}, "method: wanted one of .*; got 'guess'"),
        ({"shared": "all"}, "shared: wanted one of .*got 'all'"),
        ({"draws": -1}, "draws: wanted an integer >= 0; got -1"),
        ({"draws": 1, "method": "sample"}, "draws: wanted an integer >= 2; got 1"),
        ({"batch_size": 0}, "batch_size: wanted an integer >= 1; got 0"),
        ({"keep": 0}, "keep: wanted an integer >= 1; got 0"),
        ({"query_block": 0}, "query_block: wanted an integer >= 1; got 0"),
        ({"sparse": 0.0}, r"sparse: wanted a maximum in \(0, 1\]; got 0"),
        ({"sparse": 1.5}, "got 1.5"),
        ({"seed": -1}, "seed: wanted an integer >= 0; got -1"),
        (
            {"attention_mask": torch.ones(3, 5).long()},
            r"wanted the shape .*\[3, 24\]; got \[3, 5\]",
        ),
        ({"attention_mask": torch.zeros(3, 24).long()}, "a real token in every row; got none in 0"),
        ({"tokens": torch.zeros(1, 65).long()}, r"prompt 0: wanted at most 64 tokens .*got 65"),
        ({"tokens": [[1, 2], [3] * 70]}, r"prompt 1: wanted at most 64 tokens .*got 70"),
        ({"tokens": ids[:, :1]}, "prompt 0: wanted at least 2 tokens .*got 1"),
        ({"tokens": ids + 50}, "prompt 0: wanted token ids from 0 to 96; got"),
        ({"tokens": ids - 50}, "prompt 0: wanted token ids from 0 to 96; got -"),
        ({"tokens": ids[:0]}, "tokens: wanted one token or more; got shape"),
        ({"tokens": ids.float()}, "tokens: wanted integer ids .*got torch.float32"),
        ({"tokens": ids[None]}, r"tokens: wanted integer ids .*of shape \[1, 3, 24\]"),
        ({"tokens": 5}, "tokens: wanted text or token ids; got int"),
        ({"tokens": None}, "tokens: wanted text or token ids; got NoneType"),
    ],
)
def test_bad_input_is_refused(
    llama: Any, options: dict[str, Any], message: str, unchecked: None
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        probe(llama, **({"tokens": ids} | options))


def _quantised(model: Any) -> Any:
    linear = model.original_model.model.layers[0].mlp.original_component.down_proj
    linear = getattr(linear, "original_component", linear)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def _meta(model: Any) -> Any:
    model.original_model.to("meta")
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny_mamba, "attention sites: wanted .*; got no attention layer"),
        (
            lambda: _quantised(models.tiny_llama()),
            "a forward pass of the model: wanted one that runs",
        ),
        (lambda: _meta(models.tiny_llama()), "got weights on the meta device"),
    ],
    ids=["mamba", "int8", "meta"],
)
def test_models_that_can_not_be_probed_are_refused(build: Any, message: str) -> None:
    model = build()
    for call in (attention_sites, probe, NormNoise(sigma=0.1).hooks):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            call(model)
        assert caught.value.wanted
        assert caught.value.got


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_scores_that_are_no_numbers_are_refused(bad: float, attn: str) -> None:
    """One token's embedding is broken: no rate of what is left, but an error that names it."""
    built = builders.build("OPTForCausalLM", attn=attn).model
    tokens = models.tokens(vocab=int(built.cfg.d_vocab))
    attention_sites(built)
    tokens[tokens == 7] = 8
    tokens[1, 5] = 7
    with torch.no_grad():
        built.original_model.get_input_embeddings().weight[7] = bad
    with pytest.raises(ValueError, match=r"wanted scores that are finite numbers.*prompt 1$"):
        probe(built, tokens)
