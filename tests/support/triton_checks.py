"""What a process with triton's interpreter checks.

    TRITON_INTERPRET=1 python -m tests.support.triton_checks

compares the Triton engine with the compiled code on every architecture of the support table,
some twenty seconds each, with a line for each that differs. Not under pytest: its checks of shapes
wrap the kernels' own functions.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hooks import collapse_probe
from tests.support import builders, matrix, models
from tests.support.engines import HandMade, assert_same
from tests.support.probes import probe

NONE = -math.inf


def check() -> None:
    """Hand-made rows in several dtypes, with patterns and sinks; a model."""
    rng = np.random.default_rng(0)
    each = [
        [10.0, 6.0], [-5.0, -9.0, -9.5], [12.0, 7.0, 6.5, 6.0, 3.0, -2.0, 0.0], [3.0], [NONE],
        [9.0, 9.0, 8.0], [9.0, 5.0, -5.0, 0.0, 2.0], [0.0, -4.0, -5.0], [20.0, *[12.5] * 60],
        [16.0, *np.linspace(12, -12, 150)], [24.0, *rng.normal(12, 1, 200)], [9.0, -1e9, 4.0, 2.0],
    ]  # fmt: skip
    widest = max(map(len, each))
    rows = torch.tensor([[*row, *[NONE] * (widest - len(row))] for row in each])
    scores = rows.view(-1, 4, 1, widest)
    pattern = torch.softmax(scores, -1).nan_to_num(0.1)
    how = {"sigmas": (0.1, 0.25, 0.5), "strict": "sampled"}
    for layer in (
        HandMade(scores),
        HandMade(scores.nan_to_num(neginf=-1e9), pattern),
        HandMade(scores.to(torch.bfloat16)),
        HandMade(scores.double(), sink=(1.0, NONE, 0.0, 2.0)),
        HandMade(scores, qk=scores - 1),
    ):
        mine = layer.reduced("triton", **how)
        assert mine.rows.sum() >= 4
        assert mine.sums["loose"].sum() > 0.5
        assert_same(mine, layer.reduced("torch", **how), loose=1e-8, strict=None)
        assert_same(mine, layer.reduced("compiled", **how), strict=None)
    ids, llama = models.tokens(batch=1, pos=12), models.tiny_llama()
    reports = [
        probe(llama, ids, draws=0, engine=engine, sigmas=[0.1, 0.4])
        for engine in ("triton", "compiled")
    ]
    assert reports[0].model["engine"] == "triton"
    assert_same(*reports)


def architectures() -> int:
    """How many architectures differ, of those that are verified or limited."""
    rows = [row for row in matrix.stored().values() if row.verdict in ("verified", "limited")]
    differing = 0
    for row in tqdm(rows):
        built = builders.build(row.name, row.heads or None)
        (tokens,), rest = built.inputs(batch=1, pos=9)
        how: dict[str, Any] = {"sparse": 0.5, "sigmas": (0.05, 0.5), "strict": False}
        if rest:
            how["decoder_tokens"] = rest["decoder_input_ids"]
        try:
            each = [
                collapse_probe(built.model, tokens, engine=engine, progress=False, **how)
                for engine in ("triton", "compiled")
            ]
            assert each[0].model["engine"] == "triton"
            assert_same(*each, strict=None)
        except Exception as error:  # the others are compared all the same
            differing += 1
            print(f"{row.name} {row.heads}: {type(error).__name__}: {error}"[:300], flush=True)
    print(f"{len(rows)} architectures, {differing} differ")
    return differing


if __name__ == "__main__":
    sys.exit(bool(architectures()))
