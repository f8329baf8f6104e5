"""Packed documents: what each gives alone, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hooks import CollapseReport, UnsupportedModelError, merge_corpus, probe_corpus
from hooks.corpus import cut
from tests.hooks.collapse.test_pooled import assert_equal
from tests.hooks.corpus.conftest import OPTIONS
from tests.support import models


@pytest.fixture(scope="module")
def packed(model: Any, texts: list[str]) -> CollapseReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "BLOCK_TOKENS", 100)
        patch.setattr(cut, "CHARACTERS", 2)
        return probe_corpus(model, texts, pack=True, **OPTIONS)


def same_rates(packed: CollapseReport, alone: CollapseReport) -> None:
    """All rates, sinks apart, and every row of the table, wherever it lies."""
    assert packed.n_tokens == alone.n_tokens
    for by in ("head", "model"):
        frames = [r.to_frame(by).filter(regex="^(?!se_)") for r in (packed, alone)]
        pd.testing.assert_frame_equal(*frames, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(packed.rows.sum((2, 3)), alone.rows.sum((2, 3)))
    for content in (False, True):
        widths = [np.sort(r.fragile(10**6, content=content)["sigma"]) for r in (packed, alone)]
        np.testing.assert_allclose(*widths, rtol=1e-3)


def test_packed_documents_give_what_they_give_alone(
    packed: CollapseReport, whole: CollapseReport
) -> None:
    same_rates(packed, whole)
    assert len(packed.tokens) < 0.8 * len(whole.tokens)
    several = [starts for starts in packed.starts if len(starts) > 1]
    assert several
    for prompt, starts in enumerate(packed.starts):  # each begins as a document does
        if packed.tokens[prompt]:
            assert {packed.tokens[prompt][at] for at in starts} == {whole.tokens[-1][0]}


@pytest.mark.parametrize("build", [models.tiny_gpt2, models.tiny_qwen3])
def test_other_models_pack(build: Any, tokenizer: Any, texts: list[str]) -> None:
    model = build(tokenizer=tokenizer)
    same_rates(
        probe_corpus(model, texts, pack=True, **OPTIONS), probe_corpus(model, texts, **OPTIONS)
    )


@pytest.mark.parametrize("n", [2, 5])
def test_shards_of_packed_documents_merge(
    model: Any, texts: list[str], packed: CollapseReport, n: int, tmp_path: Path
) -> None:
    for i in range(1, n + 1):
        probe_corpus(model, texts, pack=True, shard=(i, n), out=tmp_path, **OPTIONS)
    merged = merge_corpus(tmp_path)
    assert_equal(merged, packed, rtol=1e-12)
    assert merged.starts == packed.starts
    assert merged.model == packed.model


def test_windows_are_full(model: Any, texts: list[str]) -> None:
    """No two windows of a group fit into one; no piece is lost."""
    options: dict[str, Any] = {"context": 24, "batch_size": 8, "most": None, "prepend_bos": None}
    groups: dict[int, list[int]] = {}
    pieces: list[list[list[int]]] = []
    for pack in (True, False):
        pieces.append([])
        for block in cut.Cut(model, texts, pack=pack, **options).blocks():
            for window in block.windows:
                ends = [*window.starts[1:], len(window)]
                pieces[-1] += [window.ids[a:b] for a, b in zip(window.starts, ends, strict=True)]
                if pack:
                    groups.setdefault(block.group, []).append(len(window))
    assert sorted(pieces[0]) == sorted(pieces[1])
    for lengths in groups.values():
        assert max(lengths) <= 24
        assert len(lengths) < 2 or sum(sorted(lengths)[:2]) > 24


def _sliding(**options: Any) -> Any:
    from transformers import Qwen3ForCausalLM

    config = models.tiny_qwen3_config(**options)
    config.use_sliding_window, config.sliding_window = True, 8
    config.layer_types = ["full_attention", "sliding_attention"]
    return models.bridge(Qwen3ForCausalLM, config, **options)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (models.tiny_bloom, "wanted a model that takes position_ids"),  # ALiBi, from the mask
        (_sliding, "wanted what each document gives alone; got the pattern of layer L1 off"),
    ],
)
def test_a_model_that_mixes_documents_is_refused(
    build: Any, said: str, tokenizer: Any, texts: list[str]
) -> None:
    model = build(tokenizer=tokenizer)
    with pytest.raises(UnsupportedModelError, match=f"packed into one window: {said}"):
        probe_corpus(model, texts, pack=True, **OPTIONS)
    assert probe_corpus(model, texts, **OPTIONS).n_tokens
