"""Scores of a fused attention that are made tile by tile, and models that are probed so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import collapse_probe
from hooks.kernels.engines import operands, triton_tiles as tiles
from hooks.kernels.engines.apart import tell_apart
from hooks.model.taken import Fused
from tests.support import builders, models
from tests.support.engines import assert_same, few_places
from tests.support.launches import rule
from tests.support.probes import ids, probe


def _window(n: int) -> Tensor:
    at = torch.arange(n)
    return ((at[:, None] >= at) & (at[:, None] - at < 40))[None, None].expand(2, 1, -1, -1)


def _random(n: int) -> Tensor:
    mask = torch.rand(2, 1, n, n) > 0.4
    mask[:, :, 3] = False  # a row without keys
    return mask


def _added(n: int) -> Tensor:
    later = torch.ones(n, n).triu(1).bool()
    return torch.zeros(1, 1, n, n).masked_fill(later, torch.finfo(torch.float16).min).half()


CASES = {
    "causal": (2, torch.float32, None, True, 70, 70),
    "across": (4, torch.bfloat16, None, False, 20, 150),
    "random mask": (1, torch.float32, _random, False, 70, 70),
    "added mask": (2, torch.float16, _added, False, 33, 33),
    "window": (2, torch.bfloat16, _window, False, 200, 200),
    "a long row": (4, torch.bfloat16, None, True, 300, 300),
}


@pytest.mark.parametrize("name", CASES)
def test_tiles(name: str) -> None:
    """Rows are what the same scores say, and those written out are these."""
    torch.manual_seed(0)
    n_kv, dtype, make, causal, n_query, n_key = CASES[name]
    q = (3 * torch.randn(2, 4, n_query, 24)).to(dtype)
    k = (1.5 * torch.randn(2, n_kv, n_key, 24)).to(dtype)
    mask = None if make is None else make(n_query)
    fused = Fused(q, k, mask, causal, None)
    scores = fused.scores(0, n_query).flatten(0, 2)
    of = operands(q, k, mask, causal=causal, scale=None)
    mine, theirs = tiles.tell_rows_apart(rule(), of), tell_apart(rule(), scores, None)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    at = theirs.sparse.nonzero()[:, 0]
    assert len(at) > 5
    taken = torch.arange(len(at)) % 7 != 2
    found = tiles.rows_of(of, at, taken)
    visible = (scores[at] > -3e4) & taken[:, None]
    assert torch.equal(found > -3e4, visible)
    apart = torch.where(visible, found - scores[at], 0.0)
    assert apart.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "places", "strict"), [(torch.float32, 1e-9, True), (torch.bfloat16, 1.0, False)]
)
def test_a_model_with_fused_attention(dtype: torch.dtype, places: float, strict: bool) -> None:
    model = builders.build("LlamaForCausalLM", "gqa", attn="sdpa").model.to(dtype)
    tokens = models.tokens(vocab=int(model.cfg.d_vocab), batch=2, pos=8)
    how: dict[str, Any] = {"draws": 0, "sigmas": [0.4], "sparse": 0.6, "strict": strict}
    theirs = probe(model, tokens, engine="compiled", **how)
    with few_places(places):
        mine = probe(model, tokens, engine="triton", **how)
    assert mine.model["engine"] == "triton"
    assert mine.rows.sum() > 8
    assert_same(mine, theirs, strict=1e-6 if strict else None)


def test_a_bias_that_a_fused_attention_adds() -> None:
    """T5's: rows are told apart by tile, and the sparse ones written with it and without."""
    built = builders.build("T5ForConditionalGeneration", "mha", attn="sdpa")
    (tokens,), rest = built.inputs(batch=2, pos=7)
    how: dict[str, Any] = {"sparse": 0.6, "sigmas": [0.3], "strict": False, "progress": False}
    how["decoder_tokens"] = rest["decoder_input_ids"]
    mine, theirs = (
        collapse_probe(built.model, tokens, engine=e, keep=500, **how)
        for e in ("triton", "compiled")
    )
    assert mine.model["engine"] == "triton"
    assert mine.rows.sum() > 10
    assert_same(mine, theirs, strict=None, level=1e-6)


def test_prompts_of_different_lengths_share_a_pass() -> None:
    model = builders.build("LlamaForCausalLM", "gqa", attn="sdpa").model
    whole = models.tokens(vocab=int(model.cfg.d_vocab), batch=3, pos=20)
    prompts = [whole[0, :20], whole[1, :13], whole[2, :17]]
    how: dict[str, Any] = {"draws": 0, "sigmas": [0.4], "sparse": 0.6, "strict": False}
    mine, theirs = (probe(model, prompts, engine=e, **how) for e in ("triton", "compiled"))
    assert mine.rows.sum() > 10
    assert_same(mine, theirs, strict=None)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
def test_models(name: str) -> None:
    model = models.TINY[name]()
    how: dict[str, Any] = {"draws": 0, "sigmas": [0.1, 0.4], "strict": False}
    mine, theirs = (probe(model, ids[:2], engine=e, **how) for e in ("triton", "compiled"))
    assert mine.rows.sum() > 20
    assert_same(mine, theirs, strict=None)


@pytest.mark.parametrize("masked", [False, True])
def test_scores_far_below_zero(masked: bool) -> None:
    """Whose weights beside 1 are no numbers of float32."""
    q = torch.zeros(1, 1, 4, 16)
    q[..., 0] = 1
    k = torch.zeros(1, 1, 4, 16)
    k[0, 0, :, 0] = torch.tensor([-100.0, -101.0, -120.0, -9000.0])
    mask = torch.ones(4, 4, dtype=torch.bool)[None, None] if masked else None
    told = tiles.tell_rows_apart(rule(), operands(q, k, mask, causal=False, scale=1.0))
    assert not told.broken.any()
    k[0, 0, 1, 0] = -110
    told = tiles.tell_rows_apart(rule(), operands(q, k, mask, causal=False, scale=1.0))
    assert told.sparse.all()


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_of_no_numbers_is_told(masked: bool) -> None:
    q, k = torch.randn(1, 1, 5, 16), torch.randn(1, 1, 5, 16)
    q[0, 0, 2] = math.nan
    mask = torch.ones(5, 5, dtype=torch.bool)[None, None] if masked else None
    told = tiles.tell_rows_apart(rule(), operands(q, k, mask, causal=False, scale=None))
    assert told.broken.tolist() == [False, False, True, False, False]


def test_a_mask_that_heads_share_is_looked_at_once() -> None:
    q = torch.randn(2, 64, 8, 16)
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    for given in (mask, mask.expand(-1, 64, -1, -1), mask[0, 0]):
        of = operands(q, q, given, causal=False, scale=None)
        assert of.end.untyped_storage().nbytes() <= 4 * 2 * 8
        assert of.end[1, 5].tolist() == list(range(1, 9))


def test_padding_hides_rows() -> None:
    q, k = torch.randn(2, 1, 9, 16), torch.randn(2, 1, 9, 16)
    of = operands(q, k, None, causal=True, scale=None, lengths=torch.tensor([9, 4]))
    told = tiles.tell_rows_apart(rule(), of)
    wanted = [1] + [2] * 8 + [1, 2, 2, 2] + [0] * 5
    assert told.seen.tolist() == wanted
