"""What the model is given: the pass that is measured is the pass the user makes.

The oracle is Hugging Face's own model, called with the same inputs: its attention weights say which
rows are sparse and which attend to a first token, its logits what the loss is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from hooks import collapse_probe, spread, sweep
from tests.support.given import (
    IDS,
    ONES,
    PACKED,
    POSITIONS,
    B,
    N,
    loss_of,
    probed,
    sparse_rows,
    weights,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:transformer_lens", "ignore::FutureWarning"
)


# -- masks, positions, caches -----------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_those_of_the_users_own_call(
    llama: Any, plain: Any, name: str, masked: bool
) -> None:
    named = {"position_ids": POSITIONS[name]} | ({"attention_mask": ONES} if masked else {})
    starts = (0, 9, 17) if name == "packed" else (0,)
    expected = sparse_rows(weights(plain, IDS, **named), starts)
    assert expected[0] > 20
    assert probed(llama, {"input_ids": IDS, **named}) == expected


@pytest.mark.parametrize("name", ["a gap of 20", "all zero", "packed"])
def test_without_a_cache_documents_are_apart_as_in_the_users_own_call(
    llama: Any, plain: Any, name: str
) -> None:
    """Without mask and cache transformers hides earlier documents, and so does the probe's pass."""
    named = {"position_ids": POSITIONS[name], "use_cache": False}
    starts = (0, 9, 17) if name == "packed" else (0,)
    apart = sparse_rows(weights(plain, IDS, **named), starts)
    assert apart != sparse_rows(weights(plain, IDS, position_ids=POSITIONS[name]), starts)
    assert probed(llama, {"input_ids": IDS, **named}) == apart


@pytest.mark.parametrize("name", ["a gap of 20", "all zero", "stretched by two"])
def test_the_sweeps_clean_loss_is_the_users_own(llama: Any, plain: Any, name: str) -> None:
    named = {"attention_mask": ONES, "position_ids": POSITIONS[name]}
    report = sweep(llama, {"input_ids": IDS, **named}, sigmas=[0.1], replicates=1)
    measured = float(report.clean_loss.sum() / report.targets.sum())
    assert measured == pytest.approx(loss_of(plain, IDS, **named), rel=1e-5)


def test_documents_kept_apart_are_each_its_own_prompt(llama: Any) -> None:
    """Rows and sinks of a packed prompt are those of its documents alone."""
    packed = {"input_ids": IDS, "position_ids": PACKED, "use_cache": False}
    edges = (0, 9, 17, N)
    alone = [row[a:b].tolist() for row in IDS for a, b in pairwise(edges)]
    assert probed(llama, packed) == probed(llama, alone)


def test_each_documents_first_token_is_a_first_token(llama: Any, plain: Any) -> None:
    report = collapse_probe(llama, {"input_ids": IDS, "position_ids": PACKED}, draws=0)
    first = {0, 9, 17}
    frame = report.fragile(10_000)
    assert (frame["sink"] == frame["key_pos"].isin(first)).all()
    assert 0 < frame["sink"].sum() > (frame["key_pos"] == 0).sum()
    assert not report.fragile(10_000, content=True)["key_pos"].isin(first).any()
    listed = [report.sigma_at(0.01, content=True), report.sigma_at(0.01)]
    assert all(np.isfinite(listed))
    assert any("packed documents" in words for words in report.model["given"])
    a = weights(plain, IDS, position_ids=PACKED)
    received = spread(llama, {"input_ids": IDS, "position_ids": PACKED}).to_frame("head")
    for layer in range(2):
        shares = a[layer].sum(2)[..., [0, 9, 17]].sum((0, 2)) / a[layer].sum((0, 2, 3))
        mine = received[received["layer"] == layer]["first_share"]
        np.testing.assert_allclose(mine, shares.numpy(), rtol=1e-5)


def test_a_documents_last_token_has_no_next_one(llama: Any) -> None:
    report = sweep(llama, {"input_ids": IDS, "position_ids": PACKED}, sigmas=[0.1], replicates=1)
    assert (report.targets == N - 3).all()


def test_a_mask_of_four_axes_goes_along(llama: Any, plain: Any) -> None:
    """Documents kept apart by a mask of the user's own."""
    of = torch.repeat_interleave(torch.arange(3), torch.tensor([9, 8, 7]))
    seen = (of[:, None] == of) & torch.ones(N, N).tril().bool()
    mask = torch.zeros(B, 1, N, N).masked_fill(~seen, torch.finfo(torch.float32).min)
    named = {"attention_mask": mask, "position_ids": PACKED}
    expected = sparse_rows(weights(plain, IDS, **named), (0, 9, 17))
    assert probed(llama, {"input_ids": IDS, **named}) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_and_positions_count_from_the_first_token(
    llama: Any, plain: Any, side: str
) -> None:
    mask = ONES.clone()
    for row, n in enumerate((0, 3, 7, 11)):
        mask[row, slice(0, n) if side == "left" else slice(N - n, N)] = 0
    rows = sinks = 0
    for row, real in zip(IDS, mask.bool(), strict=True):
        one = sparse_rows(weights(plain, row[real][None]))
        rows, sinks = rows + one[0], sinks + one[1]
    for given in (mask, mask.bool(), mask.float(), mask.numpy()):
        assert probed(llama, {"input_ids": IDS, "attention_mask": given}) == (rows, sinks)
    report = collapse_probe(llama, {"input_ids": IDS, "attention_mask": mask}, draws=0)
    assert report.padding.tolist() == [0, 3, 7, 11]
    assert any("padding is cut off" in words for words in report.model["given"])
