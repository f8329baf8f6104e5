"""What is measured: a table for each part."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments.core import Amount, Part, Size, Subject, by_size, pick, reading

VARIANTS: Final = ("as is", "positions removed", "mask removed", "both removed")
LAYERS: Final = (1, 2, 4)
PLACEMENTS: Final = ("none", "pre", "qkv")
SKIPS: Final = {"both": "skip connections", "none": "no skip connections"}
LENGTH: Final = 24  # tokens that random models read
CONSTRUCTED: Final = "random"
GIVEN: Final = "-"  # skip connections of models that were given, not constructed


@dataclass(frozen=True)
class Scale:
    """How much: what is read, permutations of each prompt, seeds and prompts of random models."""

    amount: Amount
    permutations: int
    seeds: tuple[int, ...]
    prompts: int


SCALES: Final = by_size(
    Scale(Amount(sums=8, windows=1, length=24), 3, (1,), 2),
    Scale(Amount(sums=48, windows=1, length=64), 4, (1, 2), 4),
    Scale(Amount(sums=256, windows=4, length=128), 8, (1, 2, 3, 4), 8),
)


# -- measuring --------------------------------------------------------------------------------


def measure(subject: Subject, scale: Scale) -> pd.DataFrame:
    """`hooks.symmetry_gap` of a model: sums up to ``=``, or windows; the first token is kept."""
    import hooks

    model = subject.load()
    report = hooks.symmetry_gap(
        model,
        prompts_of(subject, scale.amount),
        permutations=scale.permutations,
        keep_first=True,
        batch_size=64 if subject.kind == "addition" else 8,
        progress=False,
    )
    return frames(report, {**subject.columns, "layers": int(model.cfg.n_layers), "skip": GIVEN})


def prompts_of(subject: Subject, amount: Amount) -> list[list[int]]:
    """Texts as they are read elsewhere; of sums the question: what follows ``=`` is to be said."""
    from qkvnorm_lens.training import EQUALS

    ids = reading(subject, amount).ids
    if subject.kind == "language":
        return ids
    return [row[: row.index(EQUALS) + 1] for row in ids]


def construct(n_layers: int, scale: Scale) -> pd.DataFrame:
    """Random models without positions: every placement, with and without skip connections."""
    import torch

    import hooks
    from qkvnorm_lens.models import QKVNormConfig, QKVNormTransformer, to_bridge

    fixed: dict[str, Any] = {
        "d_model": 64, "d_head": 16, "n_heads": 4, "d_mlp": 128, "d_vocab": 200, "n_ctx": 32,
        "positional_embedding_type": "none", "initializer_range": 0.15, "n_layers": n_layers,
    }  # fmt: skip
    out = []
    for placement, skip, seed in itertools.product(PLACEMENTS, SKIPS, scale.seeds):
        config = QKVNormConfig(placement=placement, skip=skip, seed=seed, **fixed)
        model = to_bridge(QKVNormTransformer(config).eval())
        rng = torch.Generator().manual_seed(seed)
        ids = torch.randint(200, (scale.prompts, LENGTH), generator=rng)
        report = hooks.symmetry_gap(
            model, ids, permutations=scale.permutations, batch_size=64, progress=False
        )
        group = f"{CONSTRUCTED}-{n_layers}-{placement}-{skip}"
        names = {"model": f"{group}-{seed}", "group": group, "placement": placement, "seed": seed}
        out.append(frames(report, {**names, "layers": n_layers, "skip": skip}))
    return pd.concat(out, ignore_index=True)


def frames(report: Any, names: dict[str, Any]) -> pd.DataFrame:
    """Rows by variant (layer -2) and by layer (-1: the embedding)."""
    whole, layers = report.to_frame("variant"), report.to_frame("layer")
    said = whole["verdict"].map({"none": 1.0, "gap": 0.0})  # NaN: undecided
    whole = whole.drop(columns="verdict").assign(layer=-2, label="all", vanishes=said)
    rows = pd.concat([whole.assign(by="variant"), layers.assign(by="layer")], ignore_index=True)
    rows = rows.assign(
        **names,
        **{name: report.model[name]["status"] for name in ("positions", "mask")},
        **{f"why_{name}": report.model[name]["why"] or "-" for name in ("positions", "mask")},
    )
    first = [*names, "positions", "mask", "why_positions", "why_mask", "by", "variant", "layer"]
    out: pd.DataFrame = rows[[*first, *(c for c in rows.columns if c not in first)]]
    return out


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each number of layers of random models, and one for each model."""
    scale = SCALES[size]
    made = {"seeds": list(scale.seeds), "prompts": scale.prompts, "length": LENGTH}
    shared = {"permutations": scale.permutations}
    out = [
        Part(f"{CONSTRUCTED}-{n}", partial(construct, n, scale), None, {**shared, **made})
        for n in LAYERS
    ]
    return out + [
        Part(s.name, partial(measure, s, scale), s, {**shared, **scale.amount.settings(s)})
        for s in subjects
    ]


# -- reading the table --------------------------------------------------------------------------


def trained(table: pd.DataFrame) -> pd.DataFrame:
    """Rows about models that were given."""
    return table[table["skip"] == GIVEN]


def constructed(table: pd.DataFrame, **cell: Any) -> pd.DataFrame:
    """Rows by variant about random models, of one cell."""
    return pick(table[table["skip"] != GIVEN], by="variant", **cell)


# -- words ------------------------------------------------------------------------------------


def nearer_stream(table: pd.DataFrame, variant: str) -> pd.Series[float]:
    """Behind the last block of each model."""
    rows = pick(table, by="layer", variant=variant)
    return rows.sort_values("layer").groupby("model")["nearer"].last()


def random_kinds(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Random models with and without skip connections: they differ in this."""
    kinds = [(words, pick(table, skip=skip)) for skip, words in SKIPS.items()]
    return [(words, mine) for words, mine in kinds if len(mine)]
