"""What is measured: a table for each part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.quantisation import cache_effects
from qkvnorm_lens.experiments.core import Part, Size, Subject, trained, traits
from qkvnorm_lens.experiments.core.traits import Row, row

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from qkvnorm_lens.training import Windows

PREFIX: Final = "language-"
CELLS: Final = ("none", "pre", "qk", "qkv")
GRAMS: Final = ("1-gram", "2-gram", "3-gram")
SITES: Final = {"in": 0.0, "mid": 0.5, "out": 1.0}  # place within a block
RANKS: Final = ("relative_mu", "stable_rank", "mean_cosine")
GAPS: Final = ("s1", "gap", "uniform_gap", "left_s1")


@dataclass(frozen=True)
class Scale:
    """Windows that the loss is measured on (None: all), that are probed, and their length."""

    scored: int | None
    probed: int
    length: int = 128


SCALES: Final = core.by_size(Scale(16, 3, 64), Scale(128, 12), Scale(None, 64))


def measure(subject: Subject, scale: Scale) -> pd.DataFrame:
    """All numbers of one model, on books that it never read."""
    from qkvnorm_lens.training import held_out

    model = subject.load()
    windows = held_out(scale.length, scale.probed)
    ids = windows.tokens.tolist()
    normed = list(traits.norm_before(model, ids))
    rows = [
        *loss_rows(subject, model, scale),
        *traits.collapse_rows(model, ids),
        *traits.spread_rows(model, ids),
        *traits.interference_rows(model, ids, normed),
        *rank_rows(model, ids),
        *spectrum_rows(model, ids),
        *cache_rows(model, windows),
    ]
    return core.about(subject, pd.DataFrame(rows))


def loss_rows(subject: Subject, model: TransformerBridge, scale: Scale) -> Iterator[Row]:
    """Loss on held-out books, and that of n-grams from the model's card."""
    from qkvnorm_lens.models import read_card
    from qkvnorm_lens.training import score

    found = score(model, scale.length, windows=scale.scored)
    yield row("loss", found.held_out)
    yield row("bits per character", found.bits)
    yield row("per token", found.per_token)
    assert subject.path is not None
    card = read_card(subject.path / "card.json")["accuracy"]["held out"]
    for name in GRAMS:
        yield row("loss", card[name], variant=name)


def rank_rows(model: TransformerBridge, ids: traits.Ids) -> Iterator[Row]:
    """Distance from the mean token, stable rank and cosine by depth, without the first token."""
    import hooks

    report = hooks.rank_profile(model, ids, batch_size=16, progress=False)
    sites = report.to_frame(without_first=True)
    for _, each in sites[sites["site"].isin(SITES)].iterrows():
        depth = each["layer"] + SITES[each["site"]]
        for name in RANKS:
            yield row(name, each[name], layer=int(each["layer"]), at=depth)


def spectrum_rows(model: TransformerBridge, ids: traits.Ids) -> Iterator[Row]:
    """Leading singular values of attention, and those of its mask, by layer."""
    import hooks

    report = hooks.spectral_gap(model, ids, batch_size=16, progress=False)
    for _, each in report.to_frame("layer").iterrows():
        for name in GAPS:
            yield row(name, each[name], layer=int(each["layer"]))


def cache_rows(model: TransformerBridge, windows: Windows) -> Iterator[Row]:
    """What a quantised cache does, by format: sparse rows moved; the output's KL and loss."""
    ids, targets = windows.tokens.tolist(), windows.targets.tolist()
    for each in cache_effects(model, ids, targets, 8):
        n, name = each["rows"], each["scheme"]
        yield row("cache: rows moved", each["moved"] / n if n else math.nan, variant=name)
        yield row("cache: KL", each["kl"], variant=name)
        yield row("cache: loss", each["loss_change"], variant=name)


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each trained model; the first seeds in the quick form, two of these in the smoke.

    Raises:
        ValueError: none is here; the message names the command that makes them.
    """
    names = sorted(trained(PREFIX), key=_order)
    if not names:
        raise ValueError(
            f"language: wanted trained models {PREFIX}*; got none. To make them: "
            "python -m qkvnorm_lens.training.texts.make, then "
            "python -m qkvnorm_lens.experiments.train"
        )
    if size != "full":
        names = [name for name in names if name.endswith("-1")]
    if size == "smoke":
        names = [name for name in names if name.split("-")[1] in ("pre", "qkv")]
    scale = SCALES[size]
    settings = {"scored": scale.scored, "windows": scale.probed, "length": scale.length}
    return [
        Part(s.name, partial(measure, s, scale), s, settings) for s in core.find_subjects(names)
    ]


def _order(name: str) -> tuple[int, str]:
    cell = name.split("-")[1]
    return CELLS.index(cell) if cell in CELLS else len(CELLS), name
