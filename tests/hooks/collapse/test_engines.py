"""Models probed by the torch engine, and what leaves the device on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooks.kernels.engines import vectorised
from tests.support import builders, models
from tests.support.engines import HandMade, NothingIsAsked, assert_same, few_places
from tests.support.probes import ids, probe


def engines(model: Any, tokens: Any = ids, **options: Any) -> tuple[Any, Any]:
    """Reports of the torch engine and of the compiled code."""
    each = (probe(model, tokens, draws=0, engine=e, **options) for e in ("torch", "compiled"))
    return next(each), next(each)


def test_models(model: Any) -> None:
    mine, theirs = engines(model, strict=False)
    assert (mine.model["engine"], theirs.model["engine"]) == ("torch", "compiled")
    assert mine.rows.sum() > 100
    assert_same(mine, theirs, strict=None)
    for name in ("layer", "head", "prompt", "query", "key", "half_width", "draw"):
        np.testing.assert_array_equal(getattr(mine.kept, name), getattr(theirs.kept, name))
    np.testing.assert_allclose(mine.kept.noisy, theirs.kept.noisy, atol=1e-6)
    np.testing.assert_allclose(mine.sigma_at(0.01), theirs.sigma_at(0.01), rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_strict_rate(name: str) -> None:
    assert_same(*engines(models.TINY[name]()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    assert_same(*engines(models.tiny_llama().to(dtype)))


def test_sinks_of_a_model() -> None:
    built = builders.build("GptOssForCausalLM", "gqa")
    assert_same(*engines(built.model, models.tokens(vocab=50), sparse=0.7))


def test_fused_attention_in_blocks_of_queries() -> None:
    model = builders.build("LlamaForCausalLM", "gqa", attn="sdpa").model
    tokens = models.tokens(vocab=int(model.cfg.d_vocab))
    whole, theirs = engines(model, tokens)
    assert whole.rows.sum() > 20
    assert_same(whole, theirs)
    assert_same(engines(model, tokens, query_block=5)[0], theirs)


@pytest.mark.parametrize("share", [1e-9, 0.1])
def test_too_few_places_cost_a_pass_and_nothing_else(llama: Any, share: float) -> None:
    prompts = models.tokens(batch=5)
    wanted = probe(llama, prompts, draws=0, engine="torch", batch_size=2)
    passes: list[int] = []
    with few_places(share), llama.hooks(fwd_hooks=[(FIRST, lambda x, hook: passes.append(1))]):
        found = probe(llama, prompts, draws=0, engine="torch", batch_size=2)
    assert_same(found, wanted, strict=1e-12)
    assert len(passes) > 3


FIRST = "blocks.0.attn.hook_q"


@pytest.mark.parametrize("keep", [1, 40, 500])
def test_a_table_that_is_full(llama: Any, keep: int) -> None:
    """It holds what the compiled code's would, whatever came first."""
    mine, theirs = engines(llama, keep=keep, batch_size=1)
    assert_same(mine, theirs)
    assert len(mine.table.a) == keep


def test_a_table_that_was_packed_often() -> None:
    """More entries than there is room for, in many pieces."""
    torch.manual_seed(0)
    scores = 6 * torch.randn(1, 4, 64, 64) + 12
    scores[..., 0] = scores.amax(-1) + 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectorised, "_ROOM_CPU", 256)
        layer = HandMade(scores)
        how: dict[str, Any] = {"keep": 100, "strict": "sampled"}
        mine = layer.reduced("torch", fixed=True, **how)
        assert_same(mine, layer.reduced("compiled", **how), strict=None)
    assert len(mine.parts.table().a) == 100


@pytest.mark.usefixtures("unchecked")
def test_engines_are_chosen_by_name_and_device(llama: Any) -> None:
    assert probe(llama).model["engine"] == "compiled"  # the CPU's
    with pytest.raises(ValueError, match=r"engine: wanted one of .*; got 'cuda'"):
        probe(llama, engine="cuda")
    with pytest.raises(ValueError, match="engine: wanted 'compiled' or 'auto' for draws"):
        probe(llama, engine="torch")


def test_triton_that_is_not_installed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hooks.kernels.engines.triton_pass", raising=False)
    with pytest.raises(ImportError, match=r"engine: wanted triton, .*qkvnorm-lens\[triton\]"):
        probe(llama, draws=0, engine="triton")


def test_parts_of_two_engines_merge(llama: Any) -> None:
    whole = probe(llama, draws=0)
    first = probe(llama, ids[:2], draws=0, engine="torch")
    both = first.merge(probe(llama, ids[2:], draws=0, first_prompt=2))
    assert both.model["engine"] == "torch, compiled"
    assert_same(both, whole)


# -- what leaves the device ------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[tuple[list[int], list[int]]]:
    """Bytes of each copy to the host, which nothing else may read from, and its number by pass."""
    sizes: list[int] = []
    passes: list[int] = []
    add, bring, finish = vectorised.TorchPass.add, vectorised.bring, vectorised.TorchPass.finish

    def finishing(self: Any) -> Any:
        passes.append(len(sizes))
        return finish(self)

    def watched(self: Any, *args: Any) -> None:
        with NothingIsAsked():
            add(self, *args)

    def bringing(tensors: list[Tensor]) -> list[Tensor]:
        sizes.append(sum(x.nbytes for x in tensors))
        return bring(tensors)

    with pytest.MonkeyPatch.context() as patch, few_places(1e-9):
        patch.setattr(vectorised.TorchPass, "add", watched)
        patch.setattr(vectorised.TorchPass, "finish", finishing)
        patch.setattr(vectorised, "bring", bringing)
        yield sizes, passes


def test_the_guard_sees_what_asks() -> None:
    for asks in (lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0]):
        with pytest.raises(AssertionError, match="reads from a device"), NothingIsAsked():
            asks(torch.ones(3))


def test_transfers_do_not_grow_with_layers() -> None:
    for n_layers in (2, 5):
        model = models.tiny_gpt2(n_layers=n_layers)
        with counted() as (sizes, passes):
            probe(model, draws=0, engine="torch")
        # The sums of each pass; then the table and the rows to show.
        assert len(sizes) == len(passes) + 1
        assert len(passes) < 6


@pytest.mark.parametrize(
    ("n", "most"), [(256, 0.05), pytest.param(4096, 0.01, marks=pytest.mark.slow)]
)
def test_bytes_that_leave_the_device(n: int, most: float) -> None:
    """Of sums and the table, whose sizes do not depend on the length, and 4 rows to show."""
    torch.manual_seed(0)
    scores = (3 * torch.randn(1, 4, n, n)).tril_()
    scores[..., 0] = 20
    scores.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    how: dict[str, Any] = {"keep": 1 << 10, "sigmas": (0.02, 0.05), "strict": "sampled"}
    with counted() as (sizes, _):
        found = HandMade(scores).reduced("torch", **how)
    assert found.rows.sum() > n
    fixed = sum(sizes) - 4 * 8 * n
    assert fixed < 40_000
    assert sum(sizes) < most * scores.nbytes
