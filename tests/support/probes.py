"""Probes of the tiny models, and when two reports are the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from hooks import collapse_probe
from hooks.collapse.report import CollapseReport
from tests.support import models
from tests.support.watching import (
    tiny_gemma2,
)

ids = models.tokens()
SIGMAS = [0.1, 0.2, 0.3, 0.5]
ALL = {**models.TINY, "gemma2": tiny_gemma2}


def probe(model: Any, tokens: Any = ids, **options: Any) -> CollapseReport:
    return collapse_probe(model, tokens, progress=False, **({"draws": 2} | options))


def assert_same_numbers(
    a: CollapseReport, b: CollapseReport, order: list[int] | None = None
) -> None:
    by = list(range(len(a.tokens))) if order is None else order
    assert [a.tokens[i] for i in by] == list(b.tokens)
    for name in ("examined", "single_key", "ties"):
        assert np.array_equal(getattr(a, name)[:, :, by], getattr(b, name)), name
    assert np.array_equal(a.rows[:, :, by], b.rows)
    for name in ("loose", "centred") if order is not None else ("loose", "strict", "centred"):
        np.testing.assert_allclose(getattr(a, name)[:, :, :, by], getattr(b, name), atol=1e-4)


def assert_frames(a: Any, b: Any) -> None:
    columns = ["rows", "sinks", "loose", "loose_content", "loose_centred", "score_level"]
    np.testing.assert_allclose(a[columns], b[columns], rtol=1e-5, atol=1e-7)
