"""Where the probe's own time goes: the compiled loop over one layer's rows, stage by stage.

    python -m benchmarks.kernel [--repeats 7] [--json FILE]

Scores as a random GPT-2 with enlarged weights has them (normal, standard deviation 20, causal, 12
heads), one thread. Stages are cumulative runs of the probe's own functions, each a part longer; a
stage's time is the difference, the median over repeats. The last one is compared with the probe's
sums on the same scores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit

from hooks.collapse import DEFAULT_SIGMAS
from hooks.kernels import (
    Rule,
    collect_plain,
    exact_plain,
    first_at_least,
    holds_sparse,
    largest,
    last_seen,
    lowest_able,
    scratch,
    sort_descending,
    survey,
)

SHAPES = ((8, 128), (1, 1024))
HEADS = 12
STAGES = (
    "dense rows told apart",
    "maximum, visible keys, mean",
    "competitors collected",
    "competitors sorted",
    "16 probabilities",
    "16 in the centred gauge",
)
REACH = float(np.sqrt(3) * DEFAULT_SIGMAS[-1])


@njit(nogil=True, error_model="numpy")
def stages(  # type: ignore[no-untyped-def]
    scores, pattern, upto, rule, use, out
):
    """The probe's loop, ended after some stages; returns how many rows were sparse."""
    found = 0
    n_matrices, n_query, _ = scores.shape
    for m in range(n_matrices):
        for q in range(n_query):
            if not holds_sparse(pattern[m, q], 0.95) or q == 0:
                continue
            found += 1
            if upto < 1:
                continue
            row = scores[m, q]
            row = row[: last_seen(row, q + 1)]
            top = largest(row)
            star = first_at_least(row, top)
            _, _, mean = survey(row)
            if upto < 2:
                continue
            bar = min(lowest_able(top, REACH), mean + lowest_able(top - mean, REACH))
            n = collect_plain(row, star, bar, use.key, use.place)
            if upto < 3:
                continue
            sort_descending(use.key, use.near, use.place, n, use.spare, use.at)
            if upto < 4:
                continue
            use.near[:n] = use.key[:n]
            exact_plain(rule, use, n, top, -np.inf, use.rates)
            out[0] += use.rates
            if upto < 5:
                continue
            use.near[:n] -= mean
            exact_plain(rule, use, n, top - mean, -np.inf, use.rates)
            out[1] += use.rates
    return found


def layer(batch: int, pos: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and pattern of one layer, [batch * head, query, key]."""
    generator = torch.Generator().manual_seed(0)
    scores = 20 * torch.randn(batch * HEADS, pos, pos, generator=generator)
    later = torch.ones(pos, pos).triu(1).bool()
    scores = scores.masked_fill(later, torch.finfo(torch.float32).min)
    return scores.numpy(), scores.softmax(-1).numpy()


def every_row(sigmas: np.ndarray) -> Rule:
    """Uniform noise on q and k, exact; no bias, no soft cap, no sink."""
    return Rule(
        law=0,
        sigmas=sigmas,
        on_q=True,
        on_k=True,
        exact=True,
        sparse=0.95,
        room=1 / 0.95 - 1,
        cutoff=1.0,
        n_heads=1,
        first_matrix=0,
        first_query=0,
        eps=float(np.finfo(np.float32).eps),
        soft_cap=0.0,
        sink=np.full(1, -np.inf),
        kv_head=np.zeros(1, np.int64),
        first=np.zeros((1, 1), np.float32),
        biased=False,
    )


def measure(batch: int, pos: int, repeats: int) -> list[dict[str, Any]]:
    scores, pattern = layer(batch, pos)
    sigmas = np.array(DEFAULT_SIGMAS)
    rule, use = every_row(sigmas), scratch(pos, len(sigmas))
    times: list[list[float]] = [[] for _ in STAGES]
    found = 0
    for repeat in range(repeats + 1):
        for upto in range(len(STAGES)):
            out = np.zeros((2, len(sigmas)))
            begin = time.process_time()
            found = stages(scores, pattern, upto, rule, use, out)
            if repeat:  # the first one compiles
                times[upto].append(1e3 * (time.process_time() - begin))
    check(scores, pattern, out[0] / found)
    medians = [statistics.median(t) for t in times]
    return [
        {
            "shape": f"{batch} x {pos}",
            "sparse share": round(found / (len(scores) * (pos - 1)), 3),
            "stage": name,
            "ms": round(total - before, 2),
            "share": round((total - before) / medians[-1], 3),
        }
        for name, total, before in zip(STAGES, medians, [0.0, *medians[:-1]], strict=True)
    ]


def check(scores: np.ndarray, pattern: np.ndarray, rates: np.ndarray) -> None:
    """The timed run's rates against the simple implementation, on some rows of every kind."""
    import hooks
    from hooks.noise import LAWS

    w = torch.from_numpy(scores).double()
    sparse = torch.from_numpy(pattern).amax(-1) >= 0.95
    sparse[:, 0] = False
    picked = sparse.nonzero()[:: max(1, int(sparse.sum()) // 400)]
    rows = w[picked[:, 0], picked[:, 1]]
    star = rows.argmax(1, keepdim=True)
    valid = (rows > -1e4).scatter(1, star, False)
    for sigma, rate in list(zip(DEFAULT_SIGMAS, rates, strict=True))[::5]:
        p = hooks.collapse_probability(
            rows.gather(1, star)[:, 0],
            rows.masked_fill(~valid, 0),
            torch.full((len(rows),), sigma, dtype=torch.float64),
            LAWS["uniform"],
            valid=valid,
        )
        error = float(p.std()) / len(p) ** 0.5
        if abs(float(p.mean()) - rate) > 5 * error + 1e-9:
            raise SystemExit(f"sigma {sigma}: the kernel has {rate}, some 400 rows {p.mean()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [r for shape in SHAPES for r in measure(*shape, options.repeats)]
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>{len(name)}}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
