"""What is invariant to permutations by construction is measured to be, and what is not is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

import hooks
from tests.support.symmetry import (
    BOTH_WAYS,
    EXACT,
    LENGTH,
    TWO,
    backwards,
    few,
    gap,
    ids,
    nope,
    several,
)
from tests.support.watching import shape_checks_off

ONE = {p: nope(p, n_layers=1) for p in ("none", "pre", "qkv")}
SKIPS = {s: nope(n_layers=1, skip=s) for s in ("attn", "mlp", "none")}


@pytest.mark.parametrize(
    "which", ["none", "pre", "qkv", 1, 2, 4, "skip attn", "skip mlp", "skip none"]
)
@few
@given(orders=several)
def test_invariant_by_construction(which: Any, orders: list[list[int]]) -> None:
    """No positions, and no mask or one causal layer: every permutation of the earlier tokens."""
    known = {**ONE, **BOTH_WAYS, **{f"skip {name}": m for name, m in SKIPS.items()}}
    report = gap(known[which], permutations=orders, mask=True)
    assert report.settings.variants == ("as is",)
    for name in ("logits", "tv", "stream", "added"):
        assert getattr(report, name).max() < EXACT, name
    assert report.vanishes("as is")
    assert not report.moved.any()


@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
@few
@given(orders=several)
def test_two_causal_layers_see_order_in_the_second(placement: str, orders: list[list[int]]) -> None:
    """The first layer's last row is one of a set; the second reads rows that saw prefixes."""
    report = gap(TWO[placement], permutations=orders, mask=True)
    embed, first, second = np.moveaxis(report.stream[0], -1, 0)
    assert embed.max() == 0
    assert first.max() < EXACT
    assert report.added[0, :, :, 0].max() < EXACT
    for prompt, tokens in enumerate(ids):
        for run, order in enumerate(orders):
            assert not torch.equal(tokens[order], tokens)
            assert second[prompt, run] > 1e-6
            assert report.logits[0, prompt, run] > 1e-6
    assert report.verdict("as is") == "gap"


@few
@given(orders=several)
def test_the_mask_alone_keeps_the_order(orders: list[list[int]]) -> None:
    """The same two layers without the mask do not know it."""
    report = gap(TWO["pre"], permutations=orders, mask=False)
    assert report.settings.variants == ("mask removed",)
    assert report.logits.max() < EXACT


def test_permutations_that_change_no_id_are_refused(gpt2: Any) -> None:
    """They would count as no gap, whatever the model."""
    equal = torch.full((1, 8), 5)
    with pytest.raises(ValueError, match=r"prompt 0: wanted different .*got 7 times the id"):
        hooks.symmetry_gap(gpt2, equal, progress=False)
    first = torch.tensor([[3, 5, 5, 5, 4]])
    with pytest.raises(ValueError, match="after the first"):
        hooks.symmetry_gap(gpt2, first, keep_first=True, progress=False)
    with pytest.raises(ValueError, match="change the ids of prompt 0; got one that leaves them"):
        gap(gpt2, permutations=[list(range(LENGTH))])
    two = torch.tensor([[1, 2, 3, 4], [5, 5, 6, 4]])
    with pytest.raises(ValueError, match="change the ids of prompt 1"):
        hooks.symmetry_gap(gpt2, two, permutations=[[1, 0, 2, 3]], progress=False)


@few
@given(
    tokens=st.lists(st.integers(0, 2), min_size=4, max_size=7).filter(lambda x: len({*x[1:-1]}) > 1)
)
def test_every_drawn_permutation_changes_the_ids(gpt2: Any, tokens: list[int]) -> None:
    report = hooks.symmetry_gap(
        gpt2, torch.tensor([tokens]), permutations=12, keep_first=True, positions=True, mask=True,
        progress=False,
    )  # fmt: skip
    for order in report.orders[0]:
        assert [tokens[i] for i in order] != tokens
        assert (order[0], order[-1]) == (0, len(tokens) - 1)


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple])
def test_permutations_are_lists_arrays_or_tensors(gpt2: Any, make: Any) -> None:
    orders = [backwards(LENGTH), [1, 0, *range(2, LENGTH)]]
    wanted, got = gap(gpt2, permutations=orders), gap(gpt2, permutations=make(orders))
    pd.testing.assert_frame_equal(wanted.to_frame(), got.to_frame(), check_exact=True)
    assert got.settings.seed is None
    with shape_checks_off():
        assert gap(gpt2, permutations=np.int64(2)).settings.permutations == 2
