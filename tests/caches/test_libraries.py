"""Stores are those of transformers' quantised caches, to the bit, as its libraries round."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import torch
from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

from hooks import CacheFormat
from hooks.measures.cache import HQQ, Quanto
from tests.support.caches import against_transformers, vectors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = (
    (QuantoQuantizedLayer, Quanto(window=8), {}),
    (QuantoQuantizedLayer, Quanto(2, group=32, window=8), {"nbits": 2, "q_group_size": 32}),
    (QuantoQuantizedLayer, Quanto(axis_key=-1, window=8), {"axis_key": -1}),
    (QuantoQuantizedLayer, Quanto(axis_key=-1, axis_value=-1, group=4, window=8),
     {"axis_key": -1, "axis_value": -1, "q_group_size": 4}),
    (HQQQuantizedLayer, HQQ(window=8), {}),
    (HQQQuantizedLayer, HQQ(8, window=8), {"nbits": 8}),
    (HQQQuantizedLayer, HQQ(2, axis_key=1, axis_value=1, window=8),
     {"nbits": 2, "axis_key": 1, "axis_value": 1}),
)  # fmt: skip


def test_the_libraries_are_those_that_the_documentation_names() -> None:
    assert version("optimum-quanto") == "0.2.7"
    assert version("hqq") == "0.2.8.post1"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layer", "form", "options"), CASES, ids=str)
def test_stores_are_theirs_to_the_bit(
    layer: Any, form: CacheFormat, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Flushes among the steps, heads and lengths that groups do not fit: refused where they do."""
    refuses = "Group size" if isinstance(form, Quanto) else ""  # hqq stores what it can't read
    make = partial(layer, residual_length=8, **options)
    assert against_transformers(make, form, dtype, refuses=refuses) >= 60


def test_quanto_refuses_what_ours_refuses() -> None:
    with pytest.raises(ValueError, match="nbits"):
        QuantoQuantizedLayer(nbits=8)
    with pytest.raises(ValueError, match="nbits"):
        Quanto(8)
    for length in range(1, 130):
        form, x = Quanto(axis_key=-1), vectors(1, 3, length, 64)
        if form.refusal("k", 3, length, 64):
            with pytest.raises(ValueError, match="Group size"):
                QuantoQuantizedLayer(axis_key=-1).update(x, x)
        else:
            QuantoQuantizedLayer(axis_key=-1).update(x, x)


def test_hqq_stores_two_bits_that_it_cannot_read() -> None:
    """Groups that do not fill a byte: refused by ours, a wrong shape there."""
    x = vectors(1, 3, 1, 128)
    layer = HQQQuantizedLayer(nbits=2, axis_key=1, axis_value=1)
    layer.update(x, x)
    with pytest.raises(RuntimeError, match="size of tensor"):
        layer.update(x, x)
    assert "to fill a byte" in HQQ(2, axis_key=1).refusal("k", 3, 1, 128)
