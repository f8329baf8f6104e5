"""Noise on some heads: nothing else moves in their layer, and all heads together are the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks import NormNoise
from tests.support import models
from tests.support.noising import ids, logits
from tests.support.watching import shape_checks_off


def patterns(model: Any, noise: NormNoise | None, name: str) -> Tensor:
    entries = [] if noise is None else noise.hooks(model)
    seen: list[Tensor] = []
    with torch.no_grad():
        model.run_with_hooks(
            ids, fwd_hooks=[*entries, (name, lambda x, hook: seen.append(x.clone()))]
        )
    return seen[0]


@pytest.mark.parametrize("build", [models.tiny_gpt2, models.tiny_llama, models.tiny_qwen3])
@pytest.mark.parametrize(("on", "rows"), [("q", "all"), ("k", "all"), ("qk", "sparse")])
def test_only_heads_that_read_the_noise_move(build: Any, on: str, rows: Any) -> None:
    model = build(qk_scale=20)
    sites = hooks.attention_sites(model).layer(0)
    noise = NormNoise(sigma=0.4, on=on, rows=rows, heads=((0, 1),))
    clean, noisy = (patterns(model, n, sites.pattern) for n in (None, noise))
    moved = (clean != noisy).flatten(2).any(2).any(0)
    read = sites.kv_head_of[1]
    wanted = [h == 1 or ("k" in on and sites.kv_head_of[h] == read) for h in range(sites.n_heads)]
    assert moved.tolist() == wanted


@pytest.mark.parametrize("on", ["qk", "v"])
def test_all_heads_of_a_layer_are_the_layer(on: str) -> None:
    model = models.tiny_llama()
    every = NormNoise(sigma=0.3, on=on, heads=[(1, h) for h in range(4)])
    layer = NormNoise(sigma=0.3, on=on, layers=(1,))
    wanted = logits(model, ids, layer)
    assert torch.equal(logits(model, ids, every), wanted)
    with every.applied(model), torch.no_grad():
        assert torch.equal(model(ids), wanted)


def test_a_probes_heads_can_be_noised() -> None:
    model = models.tiny_gpt2(qk_scale=20)
    found = hooks.collapse_probe(model, ids).heads(min_rows=1).head(2)
    pairs = tuple(zip(found["layer"], found["head"], strict=True))
    noise = NormNoise(sigma=0.3, heads=pairs)
    assert noise.heads == tuple((int(a), int(b)) for a, b in pairs)
    assert hash(noise) == hash(NormNoise(sigma=0.3, heads=noise.heads))
    assert not torch.equal(logits(model, ids, noise), logits(model, ids, None))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((), "heads: wanted one or more pairs"),
        (((0, 1), (0, 1)), "each once"),
        (((0,),), r"pairs \(layer, head\)"),
        (((0, -1),), "heads: wanted an integer >= 0; got -1"),
        (((0, 4),), "heads: wanted a head of layer 0 from 0 to 3; got 4"),
        (((9, 0),), "wanted one of the attention layers"),
    ],
)
def test_wrong_heads_are_refused(heads: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormNoise(sigma=0.1, heads=heads).hooks(models.tiny_gpt2())


def test_heads_and_layers_are_not_both_taken() -> None:
    with pytest.raises(ValueError, match="heads: wanted None beside layers"):
        NormNoise(sigma=0.1, heads=((0, 0),), layers=(0,))
    with shape_checks_off(), pytest.raises(TypeError, match="heads: wanted one or more pairs"):
        NormNoise(sigma=0.1, heads=3)  # type: ignore[arg-type]
