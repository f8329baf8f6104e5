"""What the probe's numbers do not depend on: batches, order, padding, the form of the prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hooks import LAWS
from qkvnorm_lens.models.config import ARCHITECTURE as OURS
from tests.support import builders, models
from tests.support.marks import slowly
from tests.support.probes import SIGMAS, assert_frames, assert_same_numbers, ids, probe


def test_batch_size_does_not_matter(model: Any) -> None:
    for method in ("exact", "sample"):
        whole, single, two = (
            probe(model, sigmas=SIGMAS, batch_size=n, method=method) for n in (8, 1, 2)
        )
        assert_same_numbers(whole, single)
        assert_same_numbers(whole, two)
        assert whole.to_frame("model")["loose"].iloc[-1] > 0.05


def test_order_of_prompts_does_not_matter(model: Any) -> None:
    """Exactly so for exact rates; a draw belongs to the place of a prompt in the corpus."""
    order = [2, 0, 1]
    a, b = (probe(model, t, sigmas=SIGMAS, draws=0) for t in (ids, ids[order]))
    assert_same_numbers(a, b, order)
    assert_frames(a.to_frame("model"), b.to_frame("model"))


def test_padding_does_not_matter(model: Any) -> None:
    """Left, right and both; prompts of different lengths, as a list or padded."""
    prompts = [ids[0, :20], ids[1], ids[2, :17]]
    plain = probe(model, [p.tolist() for p in prompts], sigmas=SIGMAS)
    padded, mask = torch.full((3, 29), 5), torch.zeros(3, 29, dtype=torch.long)
    for row, (prompt, first) in enumerate(zip(prompts, (9, 0, 6), strict=True)):
        padded[row, first : first + len(prompt)] = prompt
        mask[row, first : first + len(prompt)] = 1
    got = probe(model, padded, attention_mask=mask, sigmas=SIGMAS)
    assert_same_numbers(plain, got)
    assert got.padding.tolist() == [9, 5, 12]
    assert plain.padding.tolist() == [0, 0, 0]


def test_pad_tokens_of_the_tokenizer_are_padding(words: Any) -> None:
    model = models.tiny_llama(tokenizer=words)
    row = ids[:1].clamp(3)
    plain = probe(model, row, sigmas=SIGMAS)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row, torch.zeros(1, 2).long()], 1)
    mask = (padded != 0).long()
    got = probe(model, padded, sigmas=SIGMAS, attention_mask=mask)
    assert_same_numbers(plain, got)
    assert got.padding.tolist() == [5]
    longer = torch.cat([row, row[:, 1:6]], 1)  # without a mask: where other rows have more
    both = probe(model, torch.cat([padded, longer]), sigmas=SIGMAS)
    assert both.padding.tolist() == [5, 0]
    assert both.tokens[0] == plain.tokens[0]
    text = " ".join(f"w{int(i)}" for i in row[0])
    said = probe(model, text, sigmas=SIGMAS, prepend_bos=False)
    assert_same_numbers(plain, said)
    assert said.tokens[0][:2] == tuple(text.split()[:2])
    assert probe(model, [text, "w5 w6"], prepend_bos=True).tokens[1] == ("[BOS]", "w5", "w6")


def test_a_law_of_ones_own_is_refused_by_name(llama: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(LAWS, "mine", LAWS["uniform"])
    with pytest.raises(ValueError, match=r"law: wanted one of .*'uniform'.*got 'mine'"):
        probe(llama, law="mine")


@pytest.mark.parametrize("empty", ["", "  \n", ["w3 w4", ""], [], [[]]])
def test_empty_text_is_refused(words: Any, empty: Any) -> None:
    model = models.tiny_llama(tokenizer=words)
    with pytest.raises(
        (ValueError, TypeError), match=r"wanted (text|one prompt|at least 2 tokens).*got"
    ):
        probe(model, empty)


@pytest.mark.parametrize(
    "same",
    [
        lambda: ids[0],
        lambda: ids[:1],
        lambda: ids[0].tolist(),
        lambda: [ids[0]],
        lambda: ids[:1].int(),
        lambda: [ids[0].tolist()],
        lambda: list(ids[0].numpy()),
        lambda: [ids[0].numpy()],
    ],
)
def test_ids_may_come_in_many_forms(llama: Any, same: Callable[[], Any]) -> None:
    assert_same_numbers(probe(llama, ids[:1]), probe(llama, same()))


@pytest.mark.parametrize("block", [*slowly(1), 5, *slowly(24), None])
@pytest.mark.parametrize(
    ("name", "heads"),
    [("OPTForCausalLM", None), ("T5ForConditionalGeneration", None), (OURS, "gqa")],
)
def test_blocks_of_queries_change_nothing(name: str, heads: str | None, block: int | None) -> None:
    """Fused attention, its scores made for some queries at a time: a mask, a bias, is_causal."""
    built = builders.build(name, heads, attn="sdpa")
    tokens = models.tokens(vocab=int(built.model.cfg.d_vocab))
    # A tiny model's attention is flat: what counts as sparse here is little.
    how: dict[str, Any] = {"sparse": 0.3}
    if name.startswith("T5"):
        how["decoder_tokens"] = tokens.flip(1)
    whole = probe(built.model, tokens, query_block=10**6, **how)
    assert whole.n_sparse > 20
    parts = probe(built.model, tokens, query_block=block, **how)
    for report_name in ("examined", "rows", "strict"):
        assert np.array_equal(getattr(whole, report_name), getattr(parts, report_name))
    for report_name in ("loose", "centred", "level"):
        got, wanted = getattr(parts, report_name), getattr(whole, report_name)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    if "decoder_tokens" not in how:  # with a bias the last to be able are so up to rounding
        assert np.array_equal(whole.able, parts.able)
        np.testing.assert_allclose(parts.table.a, whole.table.a, atol=1e-5)
