"""What is measured: a table for each part."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import Part, Size, Subject, by_size
from qkvnorm_lens.experiments.paper.noise.rows import (
    ALL,
    LOST,
    NEXT,
    ROWS,
    SHIELDED,
    VECTORS,
    WITHOUT_END,
    Condition,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from hooks import SweepReport

SEED: Final = 20  # of the sums; the noise has the seed 0


@dataclass(frozen=True)
class Scale:
    """How much: prompts, their length (language models), sigmas and draws of each."""

    sums: int
    windows: int
    length: int
    sigmas: tuple[float, ...]
    draws: int


SCALES: Final = by_size(
    Scale(30, 1, 24, (0.01, 0.1, 0.5), 2),
    Scale(100, 4, 40, (0.01, 0.05, 0.1, 0.2, 0.3, 0.5), 2),
    Scale(300, 8, 128, (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5), 6),
)
ROWS_PER_PASS: Final = {"addition": 1024, "language": 32}
CURVE: Final = (
    "prompts", "sigma_lost", "sigma", "positions", "accuracy", "se_accuracy",
    "se_prompts_accuracy_change", "loss", "kl", "top1_agreement",
)  # fmt: skip


# -- measuring ------------------------------------------------------------------------------


def of_vectors(subject: Subject, scale: Scale) -> pd.DataFrame:
    """Noise on q, on k, on v and on all, of all rows; also before the norm that shields them."""
    shielded = _shield(subject.load()) != "none"
    return _measure(subject, scale, (*VECTORS, SHIELDED) if shielded else VECTORS)


def of_rows(subject: Subject, scale: Scale) -> pd.DataFrame:
    """Noise on q and k, of all rows, of the sparse ones and of the non-sparse ones."""
    return _measure(subject, scale, ROWS)


def _measure(subject: Subject, scale: Scale, conditions: tuple[Condition, ...]) -> pd.DataFrame:
    from hooks import sweep

    model = subject.load()
    tokens, target_sets = prompts_of(subject, model, scale)
    shares, shield = _shares(model, tokens), _shield(model)
    frames = []
    for condition, (scored, targets) in itertools.product(conditions, target_sets.items()):
        noise = dataclasses.asdict(condition)
        with warnings.catch_warnings():  # that a norm takes the noise away is what is shown
            warnings.filterwarnings("ignore", message="noise at the projection")
            report = sweep(
                model,
                tokens,
                targets=targets,
                sigmas=scale.sigmas,
                replicates=scale.draws,
                batch_size=ROWS_PER_PASS[subject.kind],
                progress=False,
                **noise,
            )
        about = subject.columns | noise | {"scored": scored, "shield": shield}
        frames.append(_curve_rows(about | shares[condition.rows], report))
    return pd.concat(frames, ignore_index=True)


def _curve_rows(about: dict[str, Any], report: SweepReport) -> pd.DataFrame:
    """One row for each sigma, the clean one first."""
    frame = report.to_frame()
    try:
        sigma = report.sigma_at(LOST)
    except ValueError:  # nothing to lose, or not lost within the sigmas
        sigma = math.inf if frame["accuracy"].iloc[0] > 0 else math.nan
    prompts = int((report.positions > 0).sum())
    rows = frame.assign(**about, prompts=prompts, sigma_lost=sigma)[[*about, *CURVE]]
    names = {"se_accuracy": "se_draws", "se_prompts_accuracy_change": "se_prompts"}
    return rows.rename(columns=names)


def prompts_of(
    subject: Subject, model: TransformerBridge, scale: Scale
) -> tuple[Any, dict[str, Any]]:
    """Tokens, and the sets of targets by name (None for the next token)."""
    if subject.kind == "language":
        from qkvnorm_lens.text import passage, windows

        read = windows(model, passage(), length=scale.length, limit=scale.windows)
        return read.ids, {NEXT: None}
    from qkvnorm_lens.training import END, PAD, draw

    batch = draw(subject.split, scale.sums, seed=SEED)
    targets = batch.targets.masked_fill(batch.targets == PAD, -100)
    return batch.tokens, {ALL: targets, WITHOUT_END: targets.masked_fill(targets == END, -100)}


def _shield(model: TransformerBridge) -> str:
    """What a norm behind the projections does to noise on q, k and v before it."""
    from hooks import attention_sites
    from hooks.model import ROLES

    found = {layer.vector(role).shield for layer in attention_sites(model) for role in ROLES}
    return " and ".join(sorted(found - {"none"})) or "none"


def _shares(model: TransformerBridge, tokens: Any) -> dict[str, dict[str, float]]:
    """Share of rows that are noised, and of those the share whose arg max is the first token.

    In the clean pass, of rows with two keys or more, over all heads and layers.
    """
    from hooks import attention_sites
    from hooks.model import encode
    from hooks.noise import NON_SPARSE, SPARSE
    from hooks.sites import LayerView, observe

    counts = {rows: np.zeros(2) for rows in ("all", "sparse", "non-sparse")}

    def count(view: LayerView) -> None:
        top, at = view.pattern.max(-1)
        valid = view.visible.sum(-1) > 1
        chosen = {"all": valid, "sparse": top >= SPARSE, "non-sparse": top < NON_SPARSE}
        for name, where in chosen.items():
            mine = where & valid
            counts[name] += [int(mine.sum()), int((mine & (at == 0)).sum())]

    observe(model, attention_sites(model).layers, encode(model, tokens), count, batch_size=64)
    n = counts["all"][0]
    return {
        name: {"share": mine / n, "share_first": first / mine if mine else math.nan}
        for name, (mine, first) in counts.items()
    }


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """Two for each model: by vectors and by rows."""
    scale = SCALES[size]
    settings = {**vars(scale), "sigmas": list(scale.sigmas), "seed": SEED}
    return [
        Part(f"{s.name}-{name}", partial(work, s, scale), s, settings)
        for s in subjects
        for name, work in (("vectors", of_vectors), ("rows", of_rows))
    ]
